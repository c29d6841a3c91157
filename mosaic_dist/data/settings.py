"""The data's field of a recipe. Imports no torch, so neither does the package in a tokenising worker."""

from typing import Literal

from mosaic_dist.data.dataset import DatasetInfo
from mosaic_dist.errors import UserError
from mosaic_dist.spec import NonNegative, Positive, Spec


class Data(Spec):
    """Which prepared dataset is read, and how.

    `seq_len` None is the dataset's; another one must divide it. `workers` are reading processes per rank, 0 reads in
    the training process. `verify`: "hashes" checks every shard before its first use, "sizes" the sizes at start only.
    """

    path: str = ""
    split: str = "train"
    seq_len: Positive | None = None
    shuffle: bool = True
    workers: NonNegative = 2
    verify: Literal["hashes", "sizes"] = "hashes"

    def load(self) -> DatasetInfo:
        """The description of the dataset at `path`."""
        if not self.path:
            raise UserError(
                "no data: give --data DIR, a folder made by a tool of data_prep, such as "
                "`python -m data_prep.tokenize_to_mds`"
            )
        return DatasetInfo.load(self.path)
