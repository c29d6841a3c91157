"""Samples as people read them in a terminal."""

import itertools
from collections.abc import Iterable

from mosaic_dist.data.tokenizer import Tokenizer

SHOWN_LINES = 12
TAB_COLUMNS = 4


def visible_text(tokenizer: Tokenizer, ids: Iterable[int]) -> str:
    """Decoded tokens with BOS, EOS and padding as ⟦bos⟧, ⟦eos⟧ and ⟦pad⟧, and a new line between documents.

    Text that only looks like a special token stays as it is, so the two can be told apart. Repeated ones are counted.
    """
    names = {tokenizer.pad_id: "pad", tokenizer.bos_id: "bos", tokenizer.eos_id: "eos"}  # one id may be all three
    shown, before = "", None
    for name, run in itertools.groupby(ids, names.get):
        found = list(run)
        if before == "eos" and name != "pad":
            shown += "\n"
        if name is None:
            shown += tokenizer.decode(found, skip_special_tokens=False)
        else:
            shown += f"⟦{name}⟧" + (f" x {len(found)}" if len(found) > 1 else "")
        before = name
    return shown


def printable(text: str) -> str:
    """Text that moves no cursor and rings no bell: what is not printable is written as its escape."""
    plain = (c if c.isprintable() or c == "\n" else repr(c)[1:-1] for c in text.expandtabs(TAB_COLUMNS))
    return "".join(plain)


def excerpt(text: str, columns: int, lines: int = SHOWN_LINES) -> str:
    """The first lines of a text, each cut at the number of columns, with a word on what is left out."""
    rows = printable(text).split("\n")
    shown = [row if len(row) <= columns else f"{row[: columns - 1]}…" for row in rows[:lines]]
    more = len(rows) - len(shown)
    return "\n".join([*shown, *([f"… {more} more lines"] if more else [])])
