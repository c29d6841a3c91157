"""Streams of tokens cut into samples, written as shards that appear whole, with an index over them."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np

from mosaic_dist.data import mds
from mosaic_dist.data.dataset import SplitInfo
from mosaic_dist.data.encode import Encoded
from mosaic_dist.data.publish import describe_split
from mosaic_dist.errors import UserError
from mosaic_dist.files import sync_directory


class Packer:
    """Cuts a stream of tokens into overlapping samples of seq_len + 1 and writes them as one split.

    Tokens that are not in a shard yet are kept, among them always the newest sample, so that it can still be given to
    another split. `state` and `tokens` are all that a later process needs to go on.
    """

    def __init__(self, folder: Path, seq_len: int, dtype: str, compression: str | None, shard_bytes: int):
        self.folder, self.seq_len, self.dtype, self.compression = folder, seq_len, np.dtype(dtype), compression
        self.shard_samples = max(1, shard_bytes // ((seq_len + 1) * self.dtype.itemsize + 4))  # and an offset each
        self.documents = self.text_bytes = 0
        self.shards: list[dict[str, Any]] = []  # as in index.json; each has shard_samples
        self.parts = [np.empty(0, dtype)]  # tokens from the first one of the next shard on
        self.waiting = 0  # their number
        self.moved: np.ndarray | None = None  # a sample of another split
        self.given = False
        folder.mkdir(exist_ok=True)

    @property
    def samples(self) -> int:
        """Samples that this split will have."""
        return len(self.shards) * self.shard_samples + self._open_samples() - self.given + (self.moved is not None)

    def _open_samples(self) -> int:
        return max(self.waiting - 1, 0) // self.seq_len

    def add(self, encoded: Encoded) -> None:
        """Take the next documents."""
        self.documents += encoded.documents
        self.text_bytes += encoded.text_bytes
        self.parts.append(encoded.tokens)
        self.waiting += len(encoded.tokens)
        while self._open_samples() > self.shard_samples:
            self._write_shard(self._cut(self.shard_samples))

    def tokens(self) -> np.ndarray:
        """The tokens that are in no shard yet; the first one is also the last one of the newest shard."""
        self.parts = [np.concatenate(self.parts)]
        return self.parts[0]

    def _cut(self, samples: int) -> np.ndarray:
        """Take the next samples [samples, seq_len + 1] off the stream; their last token stays."""
        stream = self.tokens()
        end = samples * self.seq_len
        windows = np.lib.stride_tricks.sliding_window_view(stream[: end + 1], self.seq_len + 1)[:: self.seq_len]
        self.parts, self.waiting = [stream[end:].copy()], self.waiting - end
        return windows

    def _write_shard(self, samples: np.ndarray) -> None:
        """Write a shard aside, make it durable, and give it its name and place in the index."""
        aside = self.folder.with_name(f"{self.folder.name}.shard")
        shutil.rmtree(aside, ignore_errors=True)
        writer = mds.open_writer(str(aside), self.dtype.name, self.seq_len + 1, self.compression, None)
        for sample in samples:
            writer.write({mds.COLUMN: sample})
        writer.finish()
        (entry,) = writer.shards
        for part in filter(None, (entry["raw_data"], entry["zip_data"])):
            old = part["basename"]
            part["basename"] = old.replace("00000", f"{len(self.shards):05}", 1)
            if (aside / old).exists():  # of a compressed shard, only the one file is written
                with open(aside / old, "rb") as file:
                    os.fsync(file.fileno())
                os.replace(aside / old, self.folder / part["basename"])
        sync_directory(self.folder)
        shutil.rmtree(aside)
        self.shards.append(entry)

    def give_last(self) -> np.ndarray:
        """Hand out the newest sample instead of writing it."""
        assert self._open_samples(), "there is no sample to give"
        self.given = True
        end = self._open_samples() * self.seq_len
        return self.tokens()[end - self.seq_len : end + 1]

    def finish(self) -> SplitInfo:
        """Write what is left and the index, and describe the split."""
        samples = self.samples
        dropped = self.waiting - self._open_samples() * self.seq_len - (samples > (self.moved is not None))
        while left := self._open_samples() - self.given:
            self._write_shard(self._cut(min(left, self.shard_samples)))
        if self.moved is not None:
            self._write_shard(self.moved[None])
        (self.folder / mds.INDEX_NAME).write_text(json.dumps({"shards": self.shards, "version": 2}, sort_keys=True))
        return describe_split(
            self.folder,
            self.shards,
            samples=samples,
            tokens=samples * self.seq_len,
            documents=self.documents,
            text_bytes=self.text_bytes,
            dropped_tokens=dropped,
        )

    def state(self) -> dict[str, Any]:
        """What a later process needs beside the shards and `tokens`, for JSON."""
        return {"documents": self.documents, "text_bytes": self.text_bytes, "shards": self.shards}

    def load_state(self, state: dict[str, Any], tokens: np.ndarray) -> None:
        """Go on where another packer stood; shards that it wrote later are removed."""
        self.documents, self.text_bytes, self.shards = state["documents"], state["text_bytes"], state["shards"]
        self.parts, self.waiting = [tokens], len(tokens)
        files = [shard["zip_data"] or shard["raw_data"] for shard in self.shards]
        expected = {file["basename"]: file["bytes"] for file in files}
        found = {path.name: path.stat().st_size for path in self.folder.iterdir()}
        for name in found.keys() - expected.keys():
            (self.folder / name).unlink()
        if wrong := sorted(name for name, size in expected.items() if found.get(name) != size):
            raise UserError(
                f"{self.folder / wrong[0]} is missing or damaged, so the preparation cannot go on: give --restart"
            )
