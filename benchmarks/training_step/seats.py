"""Contenders in processes of their own, as their users run them, which take turns."""

import contextlib
import multiprocessing
import os
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from multiprocessing.connection import Connection
from typing import Any, NamedTuple

import deepspeed
import torch

from benchmarks.training_step.cases import GRANITE, SIZES, make_case
from benchmarks.training_step.contenders import Precision, makers
from benchmarks.training_step.entrant import Entrant, Told
from mosaic_dist.memory import gc_frozen, keep_freed_memory
from mosaic_dist.parallel import World, join_world, leave_world
from mosaic_dist.parallel.world import free_port

KEPT = "_kept"
"""Ends the name of a contender that is given our setting of malloc, which is a good part of a step on a CPU."""


class Place(NamedTuple):
    """Who a process is for."""

    recipe: str
    scale: str
    name: str
    precision: Precision


class RemoteEntrant:
    """An `Entrant` in a process of its own."""

    def __init__(self, place: Place):
        self.place = place
        context = multiprocessing.get_context("spawn")
        self.line, there = context.Pipe()
        self.process = context.Process(target=_serve, args=(place, there), daemon=True)
        self.process.start()
        there.close()
        self.told: Told = self._answer()

    def step(self) -> float:
        """Take one training step in the process; returns its seconds."""
        return self._ask("step")

    def ceiling(self, precision: Precision) -> float:
        """Highest rate of the process's own matrix products at this precision."""
        return self._ask("ceiling", precision)

    def phases(self) -> dict[str, float]:
        """Seconds of a step by phase."""
        return self._ask("phases")

    def end(self) -> None:
        """Let the process go."""
        with contextlib.suppress(OSError):
            self.line.send(None)
        self.process.join()

    def _ask(self, *words: str) -> Any:
        with contextlib.suppress(BrokenPipeError):  # then there is no answer either
            self.line.send(words)
        return self._answer()

    def _answer(self) -> Any:
        try:
            return self.line.recv()
        except (EOFError, ConnectionError):
            self.process.join()
            code = self.process.exitcode
            who = f"{self.place.name} of {self.place.recipe}"
            sys.exit(f"{who}: exit code {code} (-9: killed, most likely for memory); its error stands above")


@contextlib.contextmanager
def seated(recipe: str, scale: str, precisions: tuple[Precision, ...]) -> Iterator[dict[str, RemoteEntrant]]:
    """All contenders of a recipe, ready; on CPUs `transformers` a second time, with our malloc.

    But for Granite: its experts' gradients, made whole for each expert, then leave 17 GB of holes in the heap.
    """
    case = make_case(recipe, SIZES[scale][recipe])
    names = list(makers(case))
    if not torch.cuda.is_available() and case.config["model_type"] != GRANITE:
        names.insert(names.index("transformers") + 1, f"transformers{KEPT}")
    with ExitStack() as stack:
        ring = {}
        for name in names:
            ring[name] = faster([Place(recipe, scale, name, precision) for precision in precisions])
            stack.callback(ring[name].end)
        yield ring


def faster(places: list[Place]) -> RemoteEntrant:
    """The one whose step was the shortest; the others' processes are gone."""
    best, *others = places
    found = RemoteEntrant(best)
    for place in others:
        other = RemoteEntrant(place)
        found, slower = sorted((found, other), key=lambda entrant: entrant.told.seconds)
        slower.end()
    return found


def _serve(place: Place, line: Connection) -> None:
    case = make_case(place.recipe, SIZES[place.scale][place.recipe])
    world = _join(place.name)
    entrant = Entrant(case, place.name.removesuffix(KEPT), place.precision, world)
    line.send(entrant.told)
    with gc_frozen() if place.name == "ours" else contextlib.nullcontext():
        while (words := line.recv()) is not None:
            asked, *given = words
            line.send(getattr(entrant, asked)(*given))
    leave_world()


def _join(name: str) -> World:
    """Ours as our recipes start, others as DeepSpeed does it."""
    if name == "ours":
        world = join_world(600)
        deepspeed.init_distributed(dist_init_required=False)
        return world
    if name.endswith(KEPT):
        keep_freed_memory()
    alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
    os.environ.update(alone, MASTER_PORT=str(free_port()))
    is_cuda = torch.cuda.is_available()
    deepspeed.init_distributed("nccl" if is_cuda else "gloo", auto_mpi_discovery=False)
    return World(0, 1, 0, 1, torch.device("cuda", 0) if is_cuda else torch.device("cpu"))
