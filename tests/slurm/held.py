"""gptoss_20b, made tiny. It waits before the step that the file of HOLD names, until it is told to stop or to go on."""

import os
import time
from dataclasses import replace
from pathlib import Path

from gptoss_20b import run

from mosaic_dist.checkpoint import CheckpointPolicy
from mosaic_dist.data import Data
from mosaic_dist.data.batch import Batch
from mosaic_dist.model import GQA, Block, MoE, SwiGLU
from mosaic_dist.optim import Cosine
from mosaic_dist.parallel import Parallel, StepResult
from mosaic_dist.run import main
from mosaic_dist.train.trainer import Trainer

block = Block(
    attention=GQA(heads=4, kv_heads=2),
    ffn=MoE(expert=SwiGLU(hidden_dim=64), experts=4, top_k=2, aux_loss_coef=0.01),
)
tiny = replace(
    run,
    model=replace(run.model, vocab_size=512, dim=32, max_seq_len=16, layers=2 * (block,)),
    data=Data(workers=1),
    optimizer=replace(run.optimizer, learning_rate=1e-2),
    schedule=Cosine(warmup_steps=2),
    steps=12,
    batch_tokens=128,
    micro_batch_size=2,
    validate_every_steps=6,
    validation_samples=8,
    parallel=Parallel(timeout_seconds=120.0),
    checkpoint=CheckpointPolicy(every_steps=2, keep_last=2),
)
HOLD = Path(os.environ["HOLD"])
take_step = Trainer._step


def held_at() -> int:
    """The step before which the run waits; 0 for none."""
    return int(HOLD.read_text() or 0) if HOLD.exists() else 0


def held_step(trainer: Trainer, batch: Batch) -> StepResult:
    """Wait, and then take the step."""
    while held_at() == trainer.progress.step + 1 and not trainer.reasons_to_stop["a signal"]():
        time.sleep(0.05)
    return take_step(trainer, batch)


if __name__ == "__main__":
    Trainer._step = held_step  # type: ignore[method-assign]
    main(tiny)
