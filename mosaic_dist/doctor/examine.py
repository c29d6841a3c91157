"""The examination: all checks, in order."""

from pathlib import Path

from mosaic_dist.doctor.check_result import CheckResult
from mosaic_dist.doctor.exchange import check_exchange
from mosaic_dist.doctor.machine import check_clock, check_devices, check_memory, check_shared_memory, check_versions
from mosaic_dist.doctor.rank_group import RankGroup
from mosaic_dist.doctor.storage import check_storage
from mosaic_dist.parallel import World

FAILED_EXIT_CODE = 1


def examine(world: World, folder: Path, exchange_factor: float) -> list[CheckResult]:
    """What the checks found of all ranks together; the same on every rank. Every rank must call."""
    party = RankGroup(world)
    return [
        check_devices(party),
        check_memory(party),
        check_shared_memory(party),
        check_versions(party),
        check_clock(party),
        check_storage(party, folder),
        check_exchange(party, exchange_factor, between_nodes=False),
        check_exchange(party, exchange_factor, between_nodes=True),
    ]
