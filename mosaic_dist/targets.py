"""What data and model agree on about targets."""

IGNORE_INDEX = -100
"""Target of a position that is not scored (PyTorch's default `ignore_index`)."""
