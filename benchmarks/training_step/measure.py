"""The figures of a case: its contenders take turns, whoever they are and wherever they run."""

import statistics
from collections.abc import Mapping
from typing import Any, Protocol

from benchmarks.training_step.cases import Case
from benchmarks.training_step.contenders import Precision
from benchmarks.training_step.entrant import Told
from mosaic_dist.model.count import flops_per_token


class Seat(Protocol):
    """An entrant here or in another process; see `entrant.Entrant`."""

    told: Told

    def step(self) -> float:
        """Seconds of a step."""

    def ceiling(self, precision: Precision) -> float:
        """Operations per second of its own products alone."""

    def phases(self) -> dict[str, float]:
        """Share of each phase of its step."""


def measure(case: Case, ring: Mapping[str, Seat], rounds: int) -> dict[str, Any]:
    """All figures of a case, as the JSON has them."""
    seconds = time_rounds(ring, rounds)
    ceilings = {name: ring["ours"].ceiling(name) for name in sorted({seat.told.precision for seat in ring.values()})}
    flops = flops_per_token(case.run.model, case.run.seq_len) * case.tokens
    rows = {}
    for name, seat in ring.items():
        told, median = seat.told, statistics.median(seconds[name])
        rows[name] = {
            "precision": told.precision,
            "parameters": told.parameters,
            "seconds": median,
            "all_seconds": seconds[name],
            "tokens_per_second": case.tokens / median,
            "tflops": flops / median / 1e12,
            "mfu": flops / median / ceilings[told.precision],
            "state_bytes": told.memory.state,
            "peak_bytes": told.memory.peak,
            "losses": told.losses,
        }
    return {
        "recipe": case.recipe,
        "said": case.said,
        "twin": case.config["model_type"],
        "layers": len(case.run.model.layers),
        "dim": case.run.model.dim,
        "vocab": case.run.model.vocab_size,
        "seq_len": case.run.seq_len,
        "micro_batch_size": case.run.micro_batch_size,
        "flops": flops,
        "ceiling_tflops": {name: rate / 1e12 for name, rate in ceilings.items()},
        "times": times(seconds),
        "best_peer": best_peer(seconds),
        "contenders": rows,
        "phases": ring["ours"].phases(),
    }


def time_rounds(ring: Mapping[str, Seat], rounds: int) -> dict[str, list[float]]:
    """Seconds of each contender in each round. Each round begins with another one."""
    seconds: dict[str, list[float]] = {name: [] for name in ring}
    for turn in range(rounds):
        for name in rotated(list(ring), turn):
            seconds[name].append(ring[name].step())
    return seconds


def rotated(names: list[str], turn: int) -> list[str]:
    """The names, beginning with another one each turn."""
    first = turn % len(names)
    return names[first:] + names[:first]


def best_peer(seconds: dict[str, list[float]]) -> str:
    """Who is the fastest beside us."""
    return min((name for name in seconds if name != "ours"), key=lambda name: statistics.median(seconds[name]))


def times(seconds: dict[str, list[float]]) -> dict[str, float]:
    """How many times as many tokens we do in each peer's time: the median over the rounds, each by itself."""

    def ratio(name: str) -> float:
        return statistics.median(theirs / ours for theirs, ours in zip(seconds[name], seconds["ours"], strict=True))

    return {name: ratio(name) for name in seconds if name != "ours"}
