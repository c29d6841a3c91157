"""What a check found."""

from collections.abc import Sequence
from typing import Literal, NamedTuple

Verdict = Literal["ok", "warn", "fail"]


class CheckResult(NamedTuple):
    """A line of the doctor's table."""

    check: str
    verdict: Verdict
    value: str
    limit: str
    fix: str = ""
    """What to do where it is not ok."""


def judge(is_good: bool, is_bearable: bool) -> Verdict:
    """The verdict on something that has two limits."""
    return "ok" if is_good else "warn" if is_bearable else "fail"


def render(rows: Sequence[CheckResult]) -> str:
    """The table for people; what is to be done stands below the line that it is for."""
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    lines = []
    for row in rows:
        cells = f"{row.verdict:<{widths[1]}}  {row.check:<{widths[0]}}"
        lines.append(f"{cells}  {row.value:<{widths[2]}}  {row.limit}".rstrip())
        lines += [f"      -> {row.fix}"] if row.verdict != "ok" else []
    return "\n".join(lines)
