"""The data's field of a recipe. Imports no torch, so neither does the package in a tokenising worker."""

import re
from collections import Counter
from pathlib import Path
from typing import Annotated, Any, Literal

from mosaic_dist.data.dataset import DatasetInfo
from mosaic_dist.data.mixture import Corpus, MixtureSource, mix
from mosaic_dist.data.remote import is_url, open_remote
from mosaic_dist.errors import UserError
from mosaic_dist.spec import NonNegative, Positive, Range, Spec, SpecError


class Stream(Spec):
    """A dataset of a mixture. Of the samples, `proportion` over the sum of all proportions are of it."""

    path: str
    proportion: Annotated[float, Range(1e-30, 1e30)] = 1.0
    split: str = "train"


class Data(Spec):
    """Which prepared dataset is read, or which mixture of several (`streams` instead of `path`), and how.

    A path is a folder or a URL such as s3://bucket/folder, whose credentials come from the environment; what is remote
    is fetched into the folder `cache` as it is used. `seq_len` None is the dataset's; another one must divide it.
    `workers` are threads per rank that read some batches ahead; with 0 only the next one is read while a step runs.
    `verify`: "hashes" checks every shard before its first use, "sizes" the sizes at start only. With `document_mask` a
    token sees its own document only, and positions begin anew in each.
    """

    path: str = ""
    streams: tuple[Stream, ...] = ()
    cache: str = ""
    split: str = "train"
    seq_len: Positive | None = None
    shuffle: bool = True
    document_mask: bool = False
    workers: NonNegative = 2
    verify: Literal["hashes", "sizes"] = "hashes"

    def validate(self) -> None:
        """`streams` say all that `path` and `split` do, and name no data twice."""
        if not self.streams:
            return
        for field, default in (("path", ""), ("split", "train")):
            if getattr(self, field) != default:
                raise SpecError(field, f"{getattr(self, field)!r} is given besides streams; each of these has its own")
        (place, times), *_ = Counter((stream.path, stream.split) for stream in self.streams).most_common(1)
        if times > 1:
            raise SpecError("streams", f"{place[0]!r} stands there {times} times; give it once, with the sum")

    def load(self) -> Corpus:
        """The description of the data. UserError where it is not there, or does not fit these settings or each other.

        Of what is remote, all but the shards is fetched.
        """
        if not self.path and not self.streams:
            raise UserError(
                "no data: give --data DIR, a folder made by a tool of data_prep, such as "
                "`python -m data_prep.tokenize_to_mds`"
            )
        corpus: Corpus
        if self.streams:
            names = stream_names(self.streams)
            corpus = mix(
                [
                    MixtureSource(
                        name=name, info=self._open(stream.path), split=stream.split, proportion=stream.proportion
                    )
                    for name, stream in zip(names, self.streams, strict=True)
                ]
            )
        else:
            corpus = self._open(self.path)
        self.document_end(corpus)
        return corpus

    def _open(self, path: str) -> DatasetInfo:
        return open_remote(path, self.cache) if is_url(path) else DatasetInfo.load(path)

    def document_end(self, corpus: Corpus) -> int | None:
        """The token that ends each document where documents are masked, else None."""
        if not self.document_mask:
            return None
        if corpus.answer_loss is not None:
            raise UserError(
                f"data.document_mask has nothing to do for {corpus.path}: each of its rows holds one document, and "
                "padding behind that is not scored; leave it off"
            )
        return corpus.eos_id


def stream_names(streams: tuple[Stream, ...]) -> list[str]:
    """A name of each stream for metrics: the last part of its path, with as much before it as tells them apart."""
    places = [[*stream.path.rstrip("/").split("/"), stream.split] for stream in streams]
    for length in range(2, max(map(len, places)) + 1):
        names = ["/".join(place[-length:-1]) for place in places]
        if len(set(names)) == len(names):
            return names
    return ["/".join(place) for place in places]


PROPORTION = re.compile(r"(.+)=(\d+(?:\.\d*)?(?:e[+-]?\d+)?|\.\d+)", re.IGNORECASE)


def read_data_word(word: str) -> dict[str, Any]:
    """The fields that `--data WORD` sets: a folder or URL, or several with proportions, `web=0.7,code=0.3`.

    A mixture has at least two items and each of them ends in a proportion, so `runs/date=2024` is a folder, and what
    exists under the whole name always is. Paths with a comma can be mixed in YAML, or with `--data.streams`.
    """
    items = word.split(",")
    found = [PROPORTION.fullmatch(item) for item in items]
    if len(items) == 1 or not any(found) or Path(word).expanduser().exists():
        return {"data.path": word, "data.streams": ()}
    streams = []
    for item, match in zip(items, found, strict=True):
        if match is None:
            raise UserError(
                f"--data {word}: {item!r} does not end in a proportion such as {item}=0.5. For paths with a comma use "
                "--data.streams \"[{path: 'DIR', proportion: 0.5}, ...]\""
            )
        streams.append({"path": match[1], "proportion": float(match[2])})
    return {"data.path": "", "data.split": "train", "data.streams": streams}
