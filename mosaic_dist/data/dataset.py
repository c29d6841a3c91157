"""What a prepared dataset is: a folder with `dataset.json`, its tokenizer's files and the MDS shards of each split."""

import dataclasses
import json
from pathlib import Path
from typing import Any, NotRequired, Self, TypedDict

import xxhash

from mosaic_dist.data.answer import AnswerLoss
from mosaic_dist.data.mds import INDEX_NAME
from mosaic_dist.data.tokenizer import FILE_NAME, Tokenizer
from mosaic_dist.errors import UserError
from mosaic_dist.files import checksum

DATASET_NAME = "dataset.json"
FORMAT_VERSION = 1
CHECKSUM = "xxh3_128"  # in dataset.json, of all else that it says
LISTED_SOURCES = 20  # in a summary
MADE_BY = "python -m data_prep.tokenize_to_mds"  # or another tool of data_prep


class SourceInfo(TypedDict):
    """What came from one input: documents that are in the dataset, bytes of their text, and tokens with EOS.

    Datasets of the first versions know the names only.
    """

    name: str
    documents: NotRequired[int]
    text_bytes: NotRequired[int]
    tokens: NotRequired[int]


@dataclasses.dataclass(frozen=True, kw_only=True)
class SplitInfo:
    """One split. `tokens` are the scored ones: samples * seq_len, or fewer with an `AnswerLoss`.

    `dropped_tokens` did not fill a last sample.
    """

    samples: int
    tokens: int
    documents: int
    text_bytes: int
    dropped_tokens: int
    shards: int
    shard_bytes: int  # on disk
    index: str  # xxh3-128 of index.json, which holds the sizes and hashes of the shards


@dataclasses.dataclass(frozen=True, kw_only=True)
class DatasetInfo:
    """The content of dataset.json and where it lies.

    Sample i of a split holds tokens i*seq_len ... (i+1)*seq_len of its packed documents; with an `answer_loss`, the
    i-th row, padded to seq_len + 1.
    """

    path: Path
    seq_len: int
    dtype: str
    vocab_size: int
    tokenizer: str  # digest
    eos_id: int
    splits: dict[str, SplitInfo]
    options: dict[str, Any]
    sources: list[SourceInfo]
    skipped_files: int
    empty_documents: int
    filtered_documents: int = 0  # too short or too long
    duplicate_documents: int = 0
    bos_id: int | None = None  # that each document begins with
    tokenizer_files: dict[str, str] = dataclasses.field(
        default_factory=dict
    )  # xxh3-128 of those next to tokenizer.json
    answer_loss: AnswerLoss | None = None
    format_version: int = FORMAT_VERSION

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read a dataset's description and check that it, the tokenizer and the indexes belong together."""
        path = Path(path).expanduser()
        file = path / DATASET_NAME
        if not path.is_dir():
            raise UserError(f"no dataset at {path}; make one with `{MADE_BY}`")
        if not file.is_file():
            raise UserError(f"{path} has no {DATASET_NAME} and so is no dataset; make one with `{MADE_BY}`")
        try:
            data = json.loads(file.read_text(encoding="utf-8"))
            if data.pop(CHECKSUM, None) not in (_digest(data), None):  # datasets of the first versions have none
                raise UserError(f"{file} is damaged: it does not match its checksum; prepare the data again")
            if data["format_version"] != FORMAT_VERSION:
                raise UserError(
                    f"{file} has format {data['format_version']}, this version reads {FORMAT_VERSION}; "
                    f"prepare the data again with `{MADE_BY}`"
                )
            splits = {name: SplitInfo(**split) for name, split in data.pop("splits").items()}
            answer = data.pop("answer_loss", None)
            sources = [SourceInfo(name=item) if isinstance(item, str) else item for item in data.pop("sources")]
            info = cls(path=path, splits=splits, sources=sources, answer_loss=answer and AnswerLoss(**answer), **data)
        except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{file} is damaged ({type(error).__name__}: {error}); prepare the data again") from None
        info._check_files()
        return info

    def _check_files(self) -> None:
        for name, digest in self.tokenizer_files.items():
            file = self.path / name
            if not file.is_file():
                raise UserError(f"{file} is missing; the copy of the dataset is not whole")
            if checksum(file) != digest:
                raise UserError(f"{file} is not the one that {self.path / DATASET_NAME} describes")
        found = self.load_tokenizer()
        if (found.digest, found.vocab_size) != (self.tokenizer, self.vocab_size):
            raise UserError(
                f"the tokenizer and the data of {self.path} disagree: {FILE_NAME} has digest {found.digest} and "
                f"{found.vocab_size} tokens, the data was made with {self.tokenizer} and {self.vocab_size}"
            )
        if found.eos_id != self.eos_id:
            raise UserError(
                f"the documents of {self.path} end with token {self.eos_id}, and the EOS of its tokenizer is "
                f"{found.eos_id}; prepare the data again with `{MADE_BY}`"
            )
        for name, split in self.splits.items():
            index = self.path / name / INDEX_NAME
            if not index.is_file():
                raise UserError(f"{index} is missing; the copy of the dataset is not whole")
            if checksum(index) != split.index:
                raise UserError(f"{index} is not the one that {self.path / DATASET_NAME} describes")

    def split(self, name: str) -> SplitInfo:
        """One split by name; UserError for one that is not there."""
        if name not in self.splits:
            raise UserError(f"{self.path} has no split {name!r}; it has: {', '.join(self.splits)}")
        return self.splits[name]

    @property
    def tokenizer_path(self) -> Path:
        """The tokenizer.json that the data was made with."""
        return self.path / FILE_NAME

    def load_tokenizer(self) -> Tokenizer:
        """The tokenizer that the data was made with."""
        return Tokenizer.load(self.tokenizer_path)

    def index(self, name: str) -> list[dict[str, Any]]:
        """Shards of a split as streaming's index.json describes them."""
        self.split(name)
        return json.loads((self.path / name / INDEX_NAME).read_text())["shards"]

    def to_json(self) -> str:
        """The text of dataset.json."""
        data = dataclasses.asdict(self)
        del data["path"]
        if self.answer_loss is None:
            del data["answer_loss"]
        return json.dumps(data | {CHECKSUM: _digest(data)}, indent=2) + "\n"

    def summary(self) -> str:
        """What was made, for people."""
        lines = [f"{self.path}: seq_len {self.seq_len}, {self.dtype}, vocabulary {self.vocab_size}"]
        for name, split in self.splits.items():
            packing = (
                f"{split.tokens:,} tokens, {split.documents:,} documents, "
                f"{split.text_bytes / max(split.tokens + split.dropped_tokens, 1):.2f} bytes of text per token, "
                f"{split.dropped_tokens:,} tokens dropped"
            )
            content = f"{split.tokens:,} scored tokens" if self.answer_loss else packing
            lines.append(
                f"  {name:<11} {split.samples:,} samples, {content}, {split.shards} shards, "
                f"{split.shard_bytes / 1e6:,.1f} MB"
            )
        if len(self.sources) > 1:
            lines += [_source_line(source) for source in self.sources[:LISTED_SOURCES]]
            lines += [f"  ... {len(self.sources)} inputs in all"] * (len(self.sources) > LISTED_SOURCES)
        passed_over = {
            "files that are no text": self.skipped_files,
            "empty texts": self.empty_documents,
            "documents too short or too long": self.filtered_documents,
            "copies": self.duplicate_documents,
        }
        if any(passed_over.values()):
            lines.append(f"  passed over: {', '.join(f'{count:,} {what}' for what, count in passed_over.items())}")
        return "\n".join(lines)


def _digest(description: dict[str, Any]) -> str:
    """Of what dataset.json says, however it is written."""
    return xxhash.xxh3_128_hexdigest(json.dumps(description, sort_keys=True).encode())


def _source_line(source: SourceInfo) -> str:
    """One input in a summary."""
    counts = f"{source['documents']:,} documents, {source['tokens']:,} tokens" if "tokens" in source else "not counted"
    return f"  from {source['name']}: {counts}"
