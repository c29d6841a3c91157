"""`python -m data_prep.arithmetic`: expressions with their results, as JSONL and as a dataset ready for training."""

import sys
import time

from mosaic_dist.cli import run_command
from mosaic_dist.data.arithmetic import prepare_arithmetic
from mosaic_dist.data.expressions import Expressions
from mosaic_dist.spec import NonNegative, Positive, UnitInterval


def arithmetic(
    *,
    output: str,
    samples: Positive = 70_000,
    operands: Positive = 2,
    low: int = 0,
    high: int = 999,
    ops: str = "+",
    seed: NonNegative = 0,
    seq_len: Positive = 64,
    train_fraction: UnitInterval | None = None,
    validation_fraction: UnitInterval = 0.05,
    test_fraction: UnitInterval = 0.05,
    overwrite: bool = False,
) -> None:
    """Write expressions and their results, all different, as train, validation and test split.

    python -m data_prep.arithmetic --output data --samples 70000 --operands 2 --low 0 --high 999 --ops + --seed 0

    An expression has --operands integers in --low..--high and operators out of --ops, some of + - * / (a single minus
    is written --ops=-). * and / come before + and -; divisions leave no remainder; results may be negative. Operators
    are drawn uniformly, and so are the numbers; a divisor is drawn among the numbers that divide what is before it.

    The output holds <split>.jsonl with prompt ("12+7="), target ("19") and text ("12+7=19"), and the same rows as MDS
    shards of --seq_len tokens with the 18-token character tokenizer; training on them scores the answers only. A run
    reads them with a shorter --data.seq_len too, as long as the rows fit. --train_fraction is what the other two leave.
    The output appears when it is whole; --overwrite replaces an existing dataset at that moment.
    """
    start = time.perf_counter()
    expressions = Expressions(operands=operands, low=low, high=high, ops=ops)
    info = prepare_arithmetic(
        expressions,
        output,
        samples,
        seed=seed,
        seq_len=seq_len,
        train_fraction=train_fraction,
        validation_fraction=validation_fraction,
        test_fraction=test_fraction,
        overwrite=overwrite,
    )
    print(f"{info.summary()}\n  {time.perf_counter() - start:.1f} s", file=sys.stderr)


if __name__ == "__main__":
    run_command(arithmetic, "python -m data_prep.arithmetic")
