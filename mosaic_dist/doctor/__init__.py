"""Whether the machines are fit for a run, before it starts."""

from mosaic_dist.doctor.examine import FAILED_EXIT_CODE, examine
from mosaic_dist.doctor.row import Row, render

__all__ = ["FAILED_EXIT_CODE", "Row", "examine", "render"]
