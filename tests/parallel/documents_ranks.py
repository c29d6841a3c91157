"""Ranks of test_documents: packed rows with a mask, through the engine, against their documents one by one."""

import torch
from torch import Tensor

from mosaic_dist.parallel import join_world, leave_world
from tests.parallel.tiny import MODEL, batches, make_engine, my_part

END = 5


def numbers(inputs_BT: Tensor) -> Tensor:
    """The document of each token; END belongs to the document that it ends."""
    ends_BT = (inputs_BT == END).long()
    return ends_BT.cumsum(1) - ends_BT


def one_by_one(inputs_BT: Tensor, targets_BT: Tensor) -> float:
    """Mean cross-entropy of the first weights over documents that are rows of their own."""
    model, total = MODEL.build_initialized(0), 0.0
    for inputs_T, targets_T in zip(inputs_BT, targets_BT, strict=True):
        begin = 0
        for at, token in enumerate(inputs_T.tolist()):
            if token == END or at == len(inputs_T) - 1:
                document = slice(begin, at + 1)
                total += model(inputs_T[None, document], targets_T[None, document]).cross_entropy_sum.item()
                begin = at + 1
    return total / targets_BT.numel()


def main() -> None:
    """The engine's loss in evaluation and in training is that of the documents, and not that of the rows."""
    world = join_world(60)
    engine = make_engine(world, 1, 1)
    inputs_BT, targets_BT = batches()[0]
    with torch.no_grad():
        expected = one_by_one(inputs_BT, targets_BT)
    mine = my_part(world)
    x, y = inputs_BT[mine], targets_BT[mine]
    assert numbers(inputs_BT).max() > 0, "the rows hold several documents"
    apart = engine.evaluate([(x, y, numbers(x))])
    together = engine.evaluate([(x, y, None)])
    trained = engine.train_step(x, y, 0.0, numbers(x)).loss
    assert abs(apart - expected) < 1e-5, (apart, expected)
    assert abs(trained - expected) < 1e-5, (trained, expected)
    assert abs(together - expected) > 1e-4, (together, expected)
    leave_world()


if __name__ == "__main__":
    main()
