"""The data's field of a recipe. Imports no torch, so neither does the package in a tokenising worker."""

from typing import Literal

from mosaic_dist.data.dataset import DatasetInfo
from mosaic_dist.errors import UserError
from mosaic_dist.spec import NonNegative, Positive, Spec


class Data(Spec):
    """Which prepared dataset is read, and how.

    `seq_len` None is the dataset's; another one must divide it. `workers` are reading processes per rank, 0 reads in
    the training process. `verify`: "hashes" checks every shard before its first use, "sizes" the sizes at start only.
    With `document_mask` a token sees its own document only, and positions begin anew in each.
    """

    path: str = ""
    split: str = "train"
    seq_len: Positive | None = None
    shuffle: bool = True
    document_mask: bool = False
    workers: NonNegative = 2
    verify: Literal["hashes", "sizes"] = "hashes"

    def load(self) -> DatasetInfo:
        """The description of the dataset at `path`. UserError where it is not one for these settings."""
        if not self.path:
            raise UserError(
                "no data: give --data DIR, a folder made by a tool of data_prep, such as "
                "`python -m data_prep.tokenize_to_mds`"
            )
        info = DatasetInfo.load(self.path)
        self.document_end(info)
        return info

    def document_end(self, info: DatasetInfo) -> int | None:
        """The token that ends each document where documents are masked, else None."""
        if not self.document_mask:
            return None
        if info.answer_loss is not None:
            raise UserError(
                f"data.document_mask has nothing to do for {info.path}: each of its rows holds one document, and "
                "padding behind that is not scored; leave it off"
            )
        return info.eos_id
