"""How far a preparation has come, on disk, so that one that was killed goes on.

In the folder `<output>.unfinished`, beside the `data` that is made: `command.json` tells what the bytes depend on (the
options, the tokenizer and the inputs with their sizes and dates), `progress.json` how many documents are done, where
reading goes on and which shards are whole, `<split>.<documents>.tokens` the tokens that are in no shard yet. Everything
that progress.json speaks of is durable before it is, and it is replaced in one step; so whatever happens, it is true.
"""

import dataclasses
import json
import os
import time
from pathlib import Path
from typing import Any

import numpy as np

from mosaic_dist.data.documents import Mark, Place
from mosaic_dist.data.packing import Packer
from mosaic_dist.data.publish import PROGRESS, clear, has_progress
from mosaic_dist.data.selection import Seen
from mosaic_dist.errors import UserError
from mosaic_dist.files import write_atomic

SECONDS = 30.0  # of work that a kill may cost
SHARE = 0.05  # of the time that keeping the journal may take, where the disk is slow
COMMAND, SEEN = "command.json", "seen"
NAMED_FILES = 3  # in a complaint


class Journal:
    """The progress of a preparation in its folder. `mark` and `counts` (of each input) are those to go on from."""

    def __init__(self, folder: Path, command: dict[str, Any] | None, *, restart: bool = False):
        """Go on with what is in the folder, or clear it if there is nothing to go on with.

        UserError if that was made by another command, unless `restart` throws it away. `command` None is equal to
        nothing: no progress is kept.
        """
        self.folder, self.command = folder, command
        self.mark, self.counts = Mark(), list[dict[str, int]]()
        self._splits: dict[str, Any] = {}
        self._next = time.monotonic() + SECONDS
        if has_progress(folder) and not restart:
            self._load()
            return
        clear(folder)
        if command is not None:
            write_atomic(folder / COMMAND, json.dumps(command))

    def _load(self) -> None:
        damaged = UserError(f"{self.folder} is damaged, so the preparation cannot go on: give --restart")
        try:
            known = json.loads((self.folder / COMMAND).read_text(encoding="utf-8"))
            found = json.loads((self.folder / PROGRESS).read_text(encoding="utf-8"))
            self.mark = Mark(**found["mark"] | {"place": Place(**found["mark"]["place"])})
            self.counts, self._splits = found["counts"], found["splits"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise damaged from error
        changes = _differences(known, json.loads(json.dumps(self.command)))
        if changes:
            raise UserError(
                f"{self.folder} holds an unfinished preparation of {self.mark.documents:,} documents that cannot go on "
                f"with this command: {'; '.join(changes)}. Give what it was started with, or --restart to start over"
            )

    def resume(self, packers: dict[str, Packer]) -> None:
        """Bring packers to where the journal stands."""
        if not self._splits:
            return
        for name, packer in packers.items():
            state = self._splits[name]
            path = self._tokens_path(name, self.mark.documents)
            if not path.is_file() or path.stat().st_size != state["waiting"] * packer.dtype.itemsize:
                raise UserError(f"{path} is missing or damaged, so the preparation cannot go on: give --restart")
            packer.load_state(state["packer"], np.fromfile(path, packer.dtype))

    def is_due(self) -> bool:
        """Whether it is time to save."""
        return self.command is not None and time.monotonic() >= self._next

    def save(self, mark: Mark, counts: list[dict[str, int]], packers: dict[str, Packer], seen: Seen | None) -> None:
        """Make the state behind a mark durable, in place of the former one."""
        begin = time.monotonic()
        splits = {}
        if seen is not None:
            seen.sync()
        for name, packer in packers.items():
            with open(self._tokens_path(name, mark.documents), "wb") as file:
                packer.tokens().tofile(file)
                file.flush()
                os.fsync(file.fileno())
            splits[name] = {"packer": packer.state(), "waiting": packer.waiting}
        state = {"mark": dataclasses.asdict(mark), "counts": counts, "splits": splits}
        write_atomic(self.folder / PROGRESS, json.dumps(state))
        current = {self._tokens_path(name, mark.documents) for name in packers}
        for path in set(self.folder.glob("*.tokens")) - current:
            path.unlink()
        now = time.monotonic()
        self._next = now + max(SECONDS, (now - begin) / SHARE)

    def _tokens_path(self, split: str, documents: int) -> Path:
        return self.folder / f"{split}.{documents}.tokens"


def _differences(known: dict[str, Any], given: dict[str, Any] | None) -> list[str]:
    """What differs between two commands, told for people."""
    if given is None:
        return ["the texts are given by a program now"]
    changes = []
    for key in known.keys() | given.keys():
        there, here = known.get(key), given.get(key)
        if key == "files" and there is not None and here is not None:
            changes += _file_differences(there, here)
        elif there != here:
            changes.append(f"{key} was {there} and is {here}")
    return sorted(changes)


def _file_differences(there: dict[str, Any], here: dict[str, Any]) -> list[str]:
    kinds = {
        "changed": [path for path in there if path in here and there[path] != here[path]],
        "gone": [path for path in there if path not in here],
        "new": [path for path in here if path not in there],
    }
    found = []
    for kind, paths in kinds.items():
        more = f" and {len(paths) - NAMED_FILES} more" if len(paths) > NAMED_FILES else ""
        found += [f"{kind}: {', '.join(paths[:NAMED_FILES])}{more}"] if paths else []
    return found
