"""`python -m data_prep.inspect_dataset`: samples, sources and lengths of documents of a dataset."""

import dataclasses
import shutil
from json import dumps
from pathlib import Path
from typing import Any

import numpy as np

from mosaic_dist.cli import run_command
from mosaic_dist.data.dataset import DatasetInfo, SourceInfo
from mosaic_dist.data.lengths import measure_lengths
from mosaic_dist.data.shards import Shards
from mosaic_dist.data.show import excerpt, visible_text
from mosaic_dist.errors import UserError
from mosaic_dist.spec import NonNegative


def inspect_dataset(
    *folder: str, split: str = "train", samples: NonNegative = 3, plot: str | None = None, json: bool = False
) -> None:
    """Show what is in a dataset: counts, tokens per source, lengths of documents, decoded samples.

    python -m data_prep.inspect_dataset DIR --plot lengths.png

    --split is the one that lengths and samples are of. --samples are so many, at equal distances; ⟦eos⟧ is the end of
    a document. --plot FILE draws a histogram of the documents' lengths in tokens as PNG. --json is for programs.

    Reads every shard of the split, and checks it as a training run would.
    """
    if len(folder) != 1:
        raise UserError(f"give one folder, not {len(folder)}: {' '.join(map(str, folder))}")
    info = DatasetInfo.load(str(folder[0]))
    lengths = measure_lengths(info, split)
    figures = lengths.describe()
    texts = decoded(info, split, samples)
    if plot is not None:
        from mosaic_dist.data.length_plot import plot_lengths  # here, because matplotlib takes a second

        plot_lengths(lengths, Path(plot).expanduser(), f"{info.path.resolve().name}, {split}", info.seq_len)
    if json:
        facts: dict[str, Any] = dataclasses.asdict(info) | {"path": str(info.path)}
        shown = [{"sample": number, "text": text} for number, text in texts.items()]
        print(dumps(facts | {"split": split, "lengths": figures, "samples": shown}, indent=2))
        return
    print(dataclasses.replace(info, sources=[]).summary())
    print(sources_table(info.sources))
    print(f"documents of {split}, tokens each: {', '.join(f'{key} {value:,g}' for key, value in figures.items())}")
    for number, text in texts.items():
        print(f"\n--- sample {number:,} of {info.splits[split].samples:,}")
        print(excerpt(text, shutil.get_terminal_size().columns))
    if plot is not None:
        print(f"\nhistogram in {plot}")


def decoded(info: DatasetInfo, split: str, count: int) -> dict[int, str]:
    """Texts of so many samples at equal distances, by their number."""
    shards, tokenizer = Shards(info, split), info.load_tokenizer()
    count = min(count, len(shards))
    numbers = np.arange(count) * len(shards) // max(count, 1)
    rows = shards.read(numbers)
    return {number: visible_text(tokenizer, row.tolist()) for number, row in zip(numbers.tolist(), rows, strict=True)}


def sources_table(sources: list[SourceInfo]) -> str:
    """Documents and tokens of each source, the largest first, and its share of all tokens."""
    if not sources:
        return "sources: none, the text was made by the tool"
    total = max(1, sum(source.get("tokens", 0) for source in sources))
    lines = [f"{'tokens':>16}  {'share':>6}  {'documents':>12}  source"]
    for source in sorted(sources, key=lambda source: -source.get("tokens", 0)):
        if "tokens" in source:
            share = f"{100 * source['tokens'] / total:.1f}%"
            lines.append(f"{source['tokens']:>16,}  {share:>6}  {source['documents']:>12,}  {source['name']}")
        else:
            lines.append(f"{'not counted':>16}  {'':>6}  {'':>12}  {source['name']}")
    return "\n".join(lines)


if __name__ == "__main__":
    run_command(inspect_dataset, "python -m data_prep.inspect_dataset")
