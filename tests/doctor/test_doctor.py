"""Every check of the doctor on two ranks: all well, and then with a fault in rank 1 that must be named."""

import json
import socket
import subprocess
import sys

import pytest

from mosaic_dist.doctor import CheckResult, render
from mosaic_dist.doctor.exchange import slow_ranks
from mosaic_dist.doctor.rank_group import unlike
from tests.launch import ROOT, check, clean_environment, run_ranks

CHECKS = ["devices", "memory", "shared memory", "versions", "clock", "storage"]
CHECKS += ["exchange in a node", "exchange between nodes"]


@pytest.fixture(scope="module")
def rows(tmp_path_factory) -> dict[str, CheckResult]:
    folder = tmp_path_factory.mktemp("doctor")
    outputs = run_ranks("tests.doctor.ranks", 2, str(folder))
    check(outputs)
    found = [json.loads(process.stdout.splitlines()[-1]) for process in outputs]
    assert found[0] == found[1]  # every rank knows
    assert not any((folder / "well").iterdir())
    return {name: CheckResult(**row) for name, row in found[0].items()}


@pytest.mark.parametrize("name", CHECKS)
def test_all_is_well(rows, name):
    assert rows[name].verdict != "fail", rows[name]  # a busy machine may be slow
    assert list(rows)[: len(CHECKS)] == CHECKS
    assert ("nothing to measure" in rows[name].value) == (name == "exchange in a node")


@pytest.mark.parametrize(
    ("name", "verdict", "says"),
    [
        ("old torch", "fail", "torch 2.0.0: {who}; else 2."),
        ("no deepspeed", "fail", "commit none: {who}; else "),
        ("other device", "fail", "T4: {who}; else CPU"),
        ("wrong product", "fail", "wrong products: {who}"),
        ("little memory", "fail", "least: 1.0 GiB free, {who}"),
        ("late clock", "warn", " s apart, rank "),
        ("wrong clock", "fail", " s apart, rank "),
        ("slow", "warn", "slowest: 42 MB/s, {who}"),
        ("unwritable", "fail", "{who}: cannot write in "),
        ("not shared", "fail", "does not see "),
    ],
)
def test_a_fault_is_named(rows, name, verdict, says):
    assert rows[name].verdict == verdict, rows[name]
    assert says.format(who=f"rank 1 on {socket.gethostname()}") in rows[name].value
    assert rows[name].fix


def test_clocks_are_compared(rows):
    apart = {name: float(rows[name].value.split()[1]) for name in ("clock", "late clock", "wrong clock")}
    assert apart["late clock"] == pytest.approx(2, abs=0.9)  # a busy machine lets ranks leave a barrier apart
    assert apart["wrong clock"] == pytest.approx(3600, abs=0.9)
    assert apart["clock"] < 0.9


def test_a_rank_is_slow_if_all_its_pairs_are(rows):
    assert rows["slow link"].verdict == "fail"  # both have the median, and three times as much is asked for
    assert slow_ranks([10.0, 9.0, 4.0, None, 11.0, 5.2], 0.5) == [2]
    assert slow_ranks([1.0, 1.0], 0.5) == []


def test_the_odd_ones_are_those_that_differ_from_most():
    assert unlike(["a", "a", "b", "a", "c"]) == ("a", [2, 4])


def test_the_table():
    table = render(
        [
            CheckResult("clock", "ok", "fine", "within 1 s", "unused"),
            CheckResult("storage", "fail", "full", "room", "clean up"),
        ]
    )
    assert table.splitlines() == ["ok    clock    fine  within 1 s", "fail  storage  full  room", "      -> clean up"]


def test_the_command(tmp_path):
    """Alone; the exit code is the verdict."""
    (tmp_path / "file").touch()
    words = [sys.executable, "-m", "mosaic_dist", "doctor", "--folder", tmp_path / "file"]
    done = subprocess.run(words, cwd=ROOT, env=clean_environment(), capture_output=True, text=True, check=False)
    assert done.returncode == 1, done.stderr
    assert "cannot write in " in done.stdout
    assert done.stdout.count("ok    ") >= 4
