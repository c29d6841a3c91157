"""Two ranks, each a node of its own, that are examined well and then with one fault after the other in rank 1."""

import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

from mosaic_dist.doctor import examine, machine, storage
from mosaic_dist.doctor.check_result import CheckResult
from mosaic_dist.doctor.exchange import check_exchange
from mosaic_dist.doctor.machine import check_clock, check_devices, check_memory, check_versions
from mosaic_dist.doctor.rank_group import RankGroup
from mosaic_dist.doctor.storage import check_storage
from mosaic_dist.parallel import join_world, leave_world

true_time, true_versions = time.time, machine.versions


def main(folder: Path, is_faulty: bool) -> dict[str, CheckResult]:
    """The rows of each fault."""
    os.environ.update(LOCAL_RANK="0", LOCAL_WORLD_SIZE="1")
    storage.VISIBLE_SECONDS = 1.0
    world = join_world(60)
    party = RankGroup(world)

    def fault(module: object, name: str, value: object, check: Callable[[RankGroup], CheckResult]) -> CheckResult:
        """What a check finds when something of a module is another in rank 1."""
        was = getattr(module, name)
        setattr(module, name, value if is_faulty else was)
        row = check(party)
        setattr(module, name, was)
        return row

    found = {row.check: row for row in examine(world, folder / "well", 0.01)}
    found |= {
        "old torch": fault(machine, "versions", lambda: true_versions() | {"torch": "2.0.0"}, check_versions),
        "no deepspeed": fault(machine, "versions", lambda: {"torch": true_versions()["torch"]}, check_versions),
        "other device": fault(machine, "device_name", lambda device: "T4", check_devices),
        "wrong product": broken(party, is_faulty),
        "little memory": fault(machine, "host_bytes", lambda: 1 << 30, check_memory),
        "late clock": fault(machine.time, "time", lambda: true_time() - 2.0, check_clock),
        "wrong clock": fault(machine.time, "time", lambda: true_time() + 3600.0, check_clock),
        "slow": fault(storage, "_write", slow_write, lambda party: check_storage(party, folder / "well")),
    }
    (folder / "file").touch()
    places = {"unwritable": folder / "file", "not shared": folder / "other"}
    for name, place in places.items():
        found[name] = check_storage(party, place if is_faulty else folder / "well")
    found["slow link"] = check_exchange(party, 3.0, between_nodes=True)
    leave_world()
    return found


def broken(party: RankGroup, is_faulty: bool) -> CheckResult:
    """The devices when products of one rank are wrong."""
    product = torch.Tensor.__matmul__
    if is_faulty:
        torch.Tensor.__matmul__ = lambda a, b: product(a, b) + 1e-3  # type: ignore[method-assign]
    row = check_devices(party)
    torch.Tensor.__matmul__ = product  # type: ignore[method-assign]
    return row


def slow_write(path: Path) -> tuple[float, str, str | None]:
    """A disk of 42 MB/s."""
    rate, *rest = true_write(path)
    return (min(rate, 42.0), *rest)  # type: ignore[return-value]


true_write = storage._write

if __name__ == "__main__":
    rows = main(Path(sys.argv[1]), os.environ["RANK"] == "1")
    print(json.dumps({name: row._asdict() for name, row in rows.items()}))
