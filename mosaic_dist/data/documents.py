"""A document on its way from an input to the tokenizer, and the place behind it where reading can go on.

Light: tokenising workers import this file.
"""

import dataclasses
from typing import NamedTuple


@dataclasses.dataclass(frozen=True, kw_only=True)
class Place:
    """Where reading stands: behind row `row` of a file, and what was passed over until there.

    `offset` is that place in bytes for files that can be entered there; `done_bytes` counts all files, for a progress
    bar. A Hugging Face dataset is one file.
    """

    file: int = 0
    row: int = 0
    offset: int = 0
    done_bytes: int = 0
    empty: int = 0
    skipped: int = 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Mark:
    """A place, and the documents that were chosen and left out up to it."""

    place: Place = Place()
    documents: int = 0
    filtered: int = 0
    duplicates: int = 0


class Document(NamedTuple):
    """A text, the number of the input that it comes from, and the place behind it."""

    text: str
    source: int
    place: Place


class Chosen(NamedTuple):
    """A document that is to be tokenised, and the mark behind it."""

    text: str
    source: int
    mark: Mark
