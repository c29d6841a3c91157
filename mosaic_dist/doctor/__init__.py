"""Whether the machines are fit for a run, before it starts."""

from mosaic_dist.doctor.check_result import CheckResult, render
from mosaic_dist.doctor.examine import FAILED_EXIT_CODE, examine

__all__ = ["FAILED_EXIT_CODE", "CheckResult", "examine", "render"]
