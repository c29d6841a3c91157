"""Whole matrices for Muon where ZeRO has cut them up.

Every matrix is made orthogonal once, by one of the ranks that hold it. What the others hold of it travels there in one
all-to-all and the result back in another, so no rank gathers what it does not work on. Under ZeRO 1 and 2 only the
matrices across the ends of a rank's share travel, under ZeRO 3 most that are not experts'.
"""

from collections.abc import Iterable, Iterator
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from mosaic_dist.optim.muon import Step, iteration_dtype, orthogonalize_all, step_scale
from mosaic_dist.parallel.partition import Partition, Partitioned


class CutMatrices:
    """The seam `MuonAdamW.directions` under ZeRO. The work is done on `device`, wherever the updates are."""

    def __init__(self, parameters: Iterable[Partitioned], device: torch.device):
        self.device = device
        self.parameters: dict[Tensor, list[Partitioned]] = {}
        for parameter in parameters:
            self.parameters.setdefault(parameter.flat, []).append(parameter)
        self.flats: dict[Tensor, FlatMatrices] = {}

    def __call__(self, flat: Tensor, update: Tensor) -> Iterator[Step]:
        """The steps of all elements of a flat tensor but its padding. All ranks that hold its parameters must call."""
        if flat not in self.flats:
            self.flats[flat] = FlatMatrices(self.parameters[flat])
        return self.flats[flat].steps(flat, update.to(self.device, iteration_dtype(self.device)))


class Matrix(NamedTuple):
    """A matrix in the flat tensors of the ranks of a group."""

    rows: int
    columns: int
    places: dict[int, slice]
    """By rank that holds some of its elements, in their order: where in its flat tensor."""

    @property
    def work(self) -> int:
        """Of making it orthogonal, in proportion."""
        return self.rows * self.columns * min(self.rows, self.columns)


class FlatMatrices:
    """The matrices of a flat tensor: who works on which, and what travels."""

    def __init__(self, parameters: list[Partitioned]):
        self.group = parameters[0].group
        self.rank, ranks = dist.get_rank(self.group), dist.get_world_size(self.group)
        matrices = [matrix for parameter in parameters for matrix in matrices_of(parameter.cut)]
        self.is_cut = any(len(matrix.places) > 1 for matrix in matrices)
        self.mine: list[Matrix] = []
        """Those that this rank works on."""
        self.held: list[list[Matrix]] = [[] for _ in range(ranks)]
        """By who works on them, those that this rank holds something of."""
        for matrix, worker in zip(matrices, choose_workers(matrices, ranks), strict=True):
            if worker == self.rank:
                self.mine.append(matrix)
            if self.rank in matrix.places:
                self.held[worker].append(matrix)
        self.here = [[matrix.places[self.rank] for matrix in of_worker] for of_worker in self.held]
        """Where these lie in this rank's tensor."""
        self.there: list[list[slice]] = [[] for _ in range(ranks)]
        """Where those that this rank works on lie in the tensor of each."""
        for matrix in self.mine:
            for rank, place in matrix.places.items():
                self.there[rank].append(place)

    def steps(self, flat: Tensor, update: Tensor) -> Iterator[Step]:
        """The orthogonal steps of this rank's slices, from its `update`, which is where and in the dtype that it is
        worked on.
        """
        arrived = self._swap(update, [[update[place] for place in places] for places in self.here], self.there)
        coming = [iter(pieces) for pieces in arrived]
        whole = [join([next(coming[rank]) for rank in m.places]).view(m.rows, m.columns) for m in self.mine]
        leaving: list[list[Tensor]] = [[] for _ in self.held]
        for matrix, direction in zip(self.mine, orthogonalize_all(whole), strict=True):
            pieces = direction.flatten().split([size(place) for place in matrix.places.values()])
            for rank, piece in zip(matrix.places, pieces, strict=True):
                leaving[rank].append(piece)
        for matrices, pieces in zip(self.held, self._swap(update, leaving, self.here), strict=True):
            for matrix, piece in zip(matrices, pieces, strict=True):
                yield Step(flat[matrix.places[self.rank]], piece, step_scale(matrix.rows, matrix.columns))

    def _swap(self, like: Tensor, pieces: list[list[Tensor]], coming: list[list[slice]]) -> list[list[Tensor]]:
        """Send a list of pieces to each rank; the lists that come from each, of the sizes of these places.

        What a rank has for itself does not move, and where no matrix is cut, nothing does. All are `like` one tensor.
        """
        if not self.is_cut:
            return pieces
        leaving = [[] if rank == self.rank else mine for rank, mine in enumerate(pieces)]
        sizes = [[] if rank == self.rank else [size(place) for place in places] for rank, places in enumerate(coming)]
        out = torch.cat([like.new_empty(0), *(piece for of_rank in leaving for piece in of_rank)])
        received = out.new_empty(sum(map(sum, sizes)))
        sent = [sum(piece.numel() for piece in of_rank) for of_rank in leaving]
        dist.all_to_all_single(received, out, [sum(of_rank) for of_rank in sizes], sent, group=self.group)
        found = iter(received.split([one for of_rank in sizes for one in of_rank]))
        arrived = [[next(found) for _ in of_rank] for of_rank in sizes]
        arrived[self.rank] = pieces[self.rank]
        return arrived


def size(place: slice) -> int:
    """Elements of a place."""
    return place.stop - place.start


def join(pieces: list[Tensor]) -> Tensor:
    """The pieces in a row; a single one is not copied."""
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces)


def matrices_of(cut: Partition) -> Iterator[Matrix]:
    """The matrices of a parameter [rows, columns] or [matrices, rows, columns]."""
    *stack, rows, columns = cut.shape
    for i in range(stack[0] if stack else 1):
        start, stop = i * rows * columns, (i + 1) * rows * columns
        places = {}
        for rank in cut.ranks_of(start, stop):
            part = cut.part(rank)
            assert part is not None, "a rank holds what lies in its share"
            begin, end = max(start, part.start), min(stop, part.start + part.length)
            places[rank] = slice(part.offset + begin - part.start, part.offset + end - part.start)
        yield Matrix(rows, columns, places)


def choose_workers(matrices: list[Matrix], ranks: int) -> list[int]:
    """For each matrix a rank that holds some of it, of these always the least busy; the same on every rank."""
    busy, workers = [0] * ranks, [0] * len(matrices)
    for i in sorted(range(len(matrices)), key=lambda i: len(matrices[i].places) > 1):  # those without a choice first
        workers[i] = min(matrices[i].places, key=lambda rank: busy[rank])
        busy[workers[i]] += matrices[i].work
    return workers
