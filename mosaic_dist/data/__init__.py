"""Text to tokens to batches. The package itself imports no torch; `stream` does."""

from mosaic_dist.data.settings import Data

__all__ = ["Data"]
