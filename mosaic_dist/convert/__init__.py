"""From checkpoints to files that other tools load, and back."""

from mosaic_dist.convert.native import export_checkpoint, load_exported, parse_size, write_model

__all__ = ["export_checkpoint", "load_exported", "parse_size", "write_model"]
