"""Ranks of test_spikes: runs of which the labels of some batches are wrong, and plain loops that know which."""

import gc
import hashlib
import json
import shutil
import sys
from collections.abc import Collection, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from mosaic_dist.checkpoint import CheckpointPolicy, newest
from mosaic_dist.checkpoint.engine_state import engine_state
from mosaic_dist.data import Data
from mosaic_dist.data.batch import Batch
from mosaic_dist.data.dataset import DatasetInfo
from mosaic_dist.data.stream import Loader
from mosaic_dist.errors import UserError
from mosaic_dist.model import MHA, Block, MoE, SigmoidTopK, SwiGLU, Transformer, count_parameters
from mosaic_dist.optim import AdamW, Constant, Spikes
from mosaic_dist.parallel import Engine, World, join_world, leave_world
from mosaic_dist.run_spec import Logging, Run
from mosaic_dist.train.interruption import Deadline
from mosaic_dist.train.metrics import read_metrics
from mosaic_dist.train.session import Start, train_run

STEPS, SAVED, BATCH, LENGTH, VOCAB = 14, 10, 8, 16, 300
BAD = (8, 11, 13)
"""Batches, counted from 0, whose labels are wrong: one before the checkpoint of step SAVED, two behind it."""
ENDLESS = range(11, 100)
LIMIT = 3

expert = SwiGLU(hidden_dim=16)
RUN = Run(
    name="spikes",
    model=Transformer(
        vocab_size=VOCAB,
        dim=16,
        max_seq_len=LENGTH,
        layers=(
            Block(attention=MHA(heads=2), ffn=expert),
            Block(
                attention=MHA(heads=2),
                ffn=MoE(expert=expert, experts=4, top_k=2, router=SigmoidTopK(expert_bias_update_rate=0.01)),
            ),
        ),
    ),
    data=Data(workers=0),
    optimizer=AdamW(learning_rate=3e-2),
    schedule=Constant(),
    steps=STEPS,
    batch_tokens=BATCH * LENGTH,
    micro_batch_size=2,
    precision="fp32",
    spikes=Spikes(action="rewind", deviations=2.0, window_steps=4, limit=LIMIT),
    checkpoint=CheckpointPolicy(every_steps=SAVED),
    logging=Logging(experts_every_steps=0),
)
SKIP = replace(RUN, spikes=replace(RUN.spikes, action="skip"))
signals = SimpleNamespace(received=None, settle=lambda: None)
take_batches = Loader.__iter__


def spoil(bad: Collection[int], stop_at: int | None = None) -> None:
    """Let the labels of these batches be wrong from now on, and a stop signal come in the middle of one."""

    def batches(loader: Loader) -> Iterator[Batch]:
        for batch in take_batches(loader):
            number = loader.cursor // BATCH - 1
            signals.received = "SIGTERM" if number == stop_at else signals.received
            wrong_BT = (batch.targets_BT + 1) % VOCAB
            yield batch._replace(targets_BT=wrong_BT) if number in bad else batch

    Loader.__iter__ = batches  # type: ignore[method-assign]
    signals.received = None


def digest(engine: Engine) -> str:
    """Of all weights, moments and buffers that this rank would save."""
    state = engine_state(engine, {})
    found = hashlib.sha256(str(state.state["optimizer_step"]).encode())
    for piece in sorted(state.pieces, key=lambda piece: (piece.tensor, piece.kind, piece.start)):
        found.update(f"{piece.tensor} {piece.kind} {piece.start}".encode() + piece.data.numpy().tobytes())
    return found.hexdigest()


class Bench:
    """What all runs of this process have in common."""

    def __init__(self, world: World, info: DatasetInfo, folder: Path, stage: int):
        self.world, self.info, self.folder, self.stage = world, info, folder, stage
        self.degree = world.size

    def config(self, run: Run) -> dict[str, Any]:
        return run.fill_config({"zero_optimization": {"stage": self.stage}}, "fp32", self.world.size)

    def train(self, name: str, run: Run, stop_at_step: int | None = None) -> dict[str, Any]:
        """A start of a run in its folder: its end, or what it was refused with."""
        output = self.folder / f"{self.stage}_{name}"
        start = Start(
            run=replace(run, data=replace(run.data, path=str(self.info.path))),
            info=self.info,
            config=self.config(run),
            degree=self.degree,
            counts=count_parameters(run.model),
            output=str(output),
            stop_at_step=stop_at_step,
            initial=None,
            deadline=Deadline(None),
            signals=signals,  # type: ignore[arg-type]
        )
        told: dict[str, Any] = {}
        try:
            trainer = train_run(start, self.world)
            told = {"digest": digest(trainer.engine), "cursor": trainer.loader.cursor, "step": trainer.progress.step}
            told["progress"] = {name: value for name, value in vars(trainer.progress).items() if name != "best"}
            del trainer
        except UserError as error:
            told["error"] = str(error)
        gc.collect()  # lets go of the folder's lock
        return told | {"records": read_metrics(output / "metrics.jsonl") if self.world.is_main else []}

    def crash(self, name: str, crashed: str) -> None:
        """Make a folder that is what a run leaves that crashed shortly before it wrote its newest checkpoint."""
        if self.world.is_main:
            there, here = (self.folder / f"{self.stage}_{run}" for run in (name, crashed))
            shutil.copytree(there, here)
            found = newest(here / "checkpoints")
            assert found is not None
            shutil.rmtree(found.directory)

    def loop(self, numbers: Sequence[int]) -> dict[str, Any]:
        """The plain loop over the batches of these numbers: a step for each."""
        run = RUN
        engine = Engine(run.model, run.optimizer, self.config(run), self.degree, run.seed, self.world)
        loader = Loader(
            run.data,
            self.info,
            seq_len=LENGTH,
            global_batch=BATCH,
            rank=self.world.rank,
            world_size=self.world.size,
            seed=run.seed,
        )
        losses = []
        for number, batch in zip(range(max(numbers) + 1), take_batches(loader), strict=False):
            if number in numbers:
                losses.append(engine.train_step(batch.inputs_BT, batch.targets_BT, run.optimizer.learning_rate).loss)
        return {"digest": digest(engine), "losses": losses}


def tell(bench: Bench) -> dict[str, Any]:
    """The runs of every stage, as this rank saw them."""
    before, behind = [n for n in range(SAVED) if n not in BAD], BAD[-1] + 1
    told = {"loop that goes back": bench.loop([*before, *range(behind, behind + STEPS - SAVED)])}
    spoil(BAD)
    return told | {"rewind": bench.train("rewind", RUN)}


def tell_of_skips(bench: Bench) -> dict[str, Any]:
    """A run that leaves all updates out."""
    told = {"loop that skips": bench.loop([n for n in range(STEPS) if n not in BAD])}
    spoil(BAD)
    return told | {"skip": bench.train("skip", SKIP)}


def tell_of_ends(bench: Bench) -> dict[str, Any]:
    """Runs that end early, and go on."""
    told = {}
    spoil(BAD)
    bench.train("behind", RUN, stop_at_step=BAD[1] + 1)
    bench.crash("behind", "crashed")
    told["went on behind"] = bench.train("behind", RUN)
    told["went on before"] = bench.train("crashed", RUN)
    spoil(BAD, stop_at=BAD[1])
    told["stopped"] = bench.train("stopped", RUN)
    spoil(BAD)
    told["went on stopped"] = bench.train("stopped", RUN)
    spoil(ENDLESS)
    told["endless skip"] = bench.train("endless skip", SKIP)
    told["endless rewind"] = bench.train("endless rewind", RUN)
    return told


def main(data: str, output: str, *stages: str) -> None:
    """Write {stage: {name: what was seen}} of this rank to `output/rank_N.json`."""
    world, told = join_world(60), {}
    for stage in map(int, stages):
        bench = Bench(world, DatasetInfo.load(Path(data)), Path(output), stage)
        told[str(stage)] = tell(bench)
    told[stages[-1]] |= tell_of_ends(bench) if world.size > 1 else tell_of_skips(bench)
    (Path(output) / f"rank_{world.rank}.json").write_text(json.dumps(told))
    leave_world()


if __name__ == "__main__":
    main(*sys.argv[1:])
