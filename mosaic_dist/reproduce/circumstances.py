"""What a run was started with, against what is here: software, hardware, sources, and the data byte by byte."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from mosaic_dist.checkpoint import newest
from mosaic_dist.data.stream import Loader
from mosaic_dist.data.tokenizer import Tokenizer
from mosaic_dist.errors import UserError
from mosaic_dist.run_spec import Run, read_run
from mosaic_dist.train.folder import RunFolder

CHANGES_NUMBERS = {
    "mosaic-dist",
    "torch",
    "deepspeed",
    "mosaicml-streaming",
    "numpy",
    "device",
    "git_commit",
    "git_clean",
}
"""Facts of an environment on which the last bits of a loss, or the order of samples, may depend."""


class Change(NamedTuple):
    """Something that was otherwise when the run was made."""

    what: str
    there: Any
    here: Any
    changes_numbers: bool


def changes(there: Mapping[str, Any], here: Mapping[str, Any]) -> Iterator[Change]:
    """What two environments (see `train.folder.environment`) differ in.

    Uncommitted changes of the sources are told even where both have some, as nobody knows whether they are the same.
    """
    was, now = _flat(there), _flat(here)
    for what in was | now:
        doubtful = what == "git_clean" and was.get(what) is False
        if was.get(what) != now.get(what) or doubtful:
            yield Change(what, was.get(what), now.get(what), what in CHANGES_NUMBERS)


def _flat(environment: Mapping[str, Any]) -> dict[str, Any]:
    plain = {key: environment.get(key) for key in ("python", "host", "device", "git_commit", "git_clean")}
    return dict(environment.get("packages", {})) | plain


def check_data(run: Run, folder: RunFolder) -> str:
    """What was found of the data, in a sentence. UserError where it is not what the run was trained on.

    A checkpoint holds the digests of the splits' indexes, which hold those of the shards; these are proven as they are
    read. A run without one has a copy of the tokenizer only.
    """
    corpus = run.data.load()
    if folder.tokenizer.exists() and (digest := Tokenizer.load(folder.tokenizer).digest) != corpus.tokenizer:
        raise UserError(f"{corpus.path} was made with tokenizer {corpus.tokenizer}, the run's data with {digest}")
    checkpoint = newest(folder.checkpoints)
    if checkpoint is None:
        return f"{corpus.path}: the tokenizer is the run's; without a checkpoint nothing is known of the samples"
    there = checkpoint.state["data"]["fingerprint"]
    here = Loader(
        run.data,
        corpus,
        seq_len=run.seq_len,
        global_batch=run.batch_sequences,
        rank=0,
        world_size=1,
        seed=run.seed,
    ).fingerprint
    wrong = [
        f"{key} was {there.get(key)!r} and is {here.get(key)!r}"
        for key in there | here
        if there.get(key) != here.get(key)
    ]
    if wrong:
        raise UserError(f"{corpus.path} is not the data that the run was trained on: {'; '.join(wrong)}")
    return f"{corpus.path}: tokenizer, samples and their order have the digests of step {checkpoint.step}"


def read_folder(path: str) -> tuple[RunFolder, Run]:
    """A run folder and its run. UserError where files are missing."""
    folder = RunFolder(path)
    for name in ("run.yaml", "environment.json", "ds_config.json", "metrics.jsonl"):
        if not (Path(path) / name).exists():
            raise UserError(f"{path} cannot be reproduced: it has no {name}; give the folder of a run that has trained")
    return folder, read_run(folder.run_yaml)
