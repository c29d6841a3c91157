"""Arithmetic expressions such as `12+7=19`, with a given number of operands out of a range, drawn from a seed."""

import functools
import itertools
import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from mosaic_dist.errors import UserError

OPERATORS = "+-*/"
EQUALS = "="
MOST_DIVISORS = 1 << 20  # numbers that are looked through for one division
PATIENCE = 1000  # draws in a row that give nothing new, before the expressions are listed instead
MOST_LISTED = 1 << 21


class Row(NamedTuple):
    """One example: `prompt` "12+7=" and `target` "19"."""

    prompt: str
    target: str

    @property
    def text(self) -> str:
        """Prompt and target, as the model is to see them."""
        return self.prompt + self.target


class Partial(NamedTuple):
    """An expression read from left to right: its value is `total + term`, `term` may still be multiplied."""

    text: str = ""
    total: int = 0
    term: int = 0

    def then(self, operator: str, number: int) -> "Partial":
        """The expression with one more number; the first is added to an empty one."""
        text = f"{self.text}{operator}{number}" if self.text else str(number)
        match operator:
            case "*":
                return Partial(text, self.total, self.term * number)
            case "/":
                return Partial(text, self.total, self.term // number)
        return Partial(text, self.total + self.term, number if operator == "+" else -number)


@dataclass(frozen=True, kw_only=True)
class Expressions:
    """All expressions of `operands` integers in low..high with operators out of `ops`.

    The usual precedence: `*` and `/` before `+` and `-`, else from left to right. Every division leaves no remainder
    where it stands (`7*4/2` is in, `7/2*4` is not) and none is by zero. A negative number follows its operator without
    brackets (`5--3`, which Python reads alike); results may be negative.
    """

    operands: int = 2
    low: int = 0
    high: int = 999
    ops: str = "+"

    def __post_init__(self) -> None:
        if self.operands < 2:
            raise UserError(f"operands ({self.operands}) must be at least 2")
        if self.low > self.high:
            raise UserError(f"low ({self.low}) must not be more than high ({self.high})")
        unknown = "".join(dict.fromkeys(character for character in self.ops if character not in OPERATORS))
        if unknown or not self.ops or len(set(self.ops)) < len(self.ops):
            fault = f"{unknown!r} is not known" if unknown else "each at most once, and one at least"
            raise UserError(f"ops ({self.ops!r}) must be some of {OPERATORS}: {fault}")
        largest = max(abs(self.low), abs(self.high)) ** (self.operands - 1)
        if "/" in self.ops and (self.high - self.low >= MOST_DIVISORS or largest >= 1 << 63):
            raise UserError(
                f"low..high ({self.low}..{self.high}) is too wide for division: at most {MOST_DIVISORS} numbers, "
                f"and any {self.operands - 1} of them multiplied less than 2^63; narrow it, or leave / out of ops"
            )

    def choices(self, operator: str, before: Partial) -> Sequence[int]:
        """Numbers that may follow an operator."""
        if operator == "/":
            return divisors(abs(before.term), self.low, self.high)
        return range(self.low, self.high + 1)

    def draw(self, generator: random.Random) -> Partial | None:
        """One at random: operators uniformly, then numbers from left to right, each uniformly among its choices.

        None where a division has no choice.
        """
        made = Partial()
        for operator in ["+", *generator.choices(self.ops, k=self.operands - 1)]:
            choices = self.choices(operator, made)
            if not choices:
                return None
            made = made.then(operator, generator.choice(choices))
        return made

    def every(self) -> Iterator[Partial]:
        """All of them, each once, in a fixed order."""
        for operators in itertools.product(self.ops, repeat=self.operands - 1):
            yield from self._continue(Partial(), ("+", *operators))

    def _continue(self, made: Partial, operators: tuple[str, ...]) -> Iterator[Partial]:
        if not operators:
            yield made
            return
        for number in self.choices(operators[0], made):
            yield from self._continue(made.then(operators[0], number), operators[1:])

    @property
    def bound(self) -> int:
        """How many there are, or with division, at most."""
        return (self.high - self.low + 1) ** self.operands * len(self.ops) ** (self.operands - 1)


@functools.lru_cache(maxsize=1 << 16)
def divisors(value: int, low: int, high: int) -> Sequence[int]:
    """Numbers in low..high that divide `value`, which is not negative; never 0."""
    root = math.isqrt(value)
    if value == 0 and not low < 0 < high:
        return range(max(low, 1), high + 1) if high > 0 else range(low, min(high, -1) + 1)
    if value == 0 or high - low < root:
        numbers = np.arange(low, high + 1)
        numbers = numbers[numbers != 0]
        return tuple(numbers[value % numbers == 0].tolist())
    small = np.arange(1, root + 1)
    small = small[value % small == 0]
    positive = np.union1d(small, value // small)
    numbers = np.concatenate([-positive[::-1], positive])
    return tuple(numbers[(numbers >= low) & (numbers <= high)].tolist())


def draw_rows(expressions: Expressions, samples: int, seed: int) -> list[Row]:
    """`samples` different expressions in random order, a function of the arguments alone.

    Raises UserError with the number there is, where that is less (with division and more than MOST_LISTED combinations,
    the number of combinations).
    """
    if samples > expressions.bound:
        listable = "/" in expressions.ops and expressions.bound <= MOST_LISTED
        raise _too_many(samples, sum(1 for _ in expressions.every()) if listable else expressions.bound, expressions)
    generator = random.Random(seed)
    found: dict[str, Row] = {}
    repeats, patience = 0, PATIENCE
    with tqdm(total=samples, desc="drawing", unit=" expressions", disable=None) as bar:
        while len(found) < samples:
            made = expressions.draw(generator)
            repeats += 1
            if made is not None and made.text not in found:
                found[made.text] = _row(made)
                repeats = 0
                bar.update()
            elif repeats == patience:
                found |= _draw_from_list(expressions, samples, found, generator)
                repeats, patience = 0, 10 * patience
    rows = list(found.values())
    generator.shuffle(rows)  # rare ones are found late and would all go to the last split
    return rows


def _draw_from_list(
    expressions: Expressions, samples: int, found: dict[str, Row], generator: random.Random
) -> dict[str, Row]:
    """What `found` lacks, out of a list of all; nothing where it would be too long, so drawing can go on."""
    unseen = (made for made in expressions.every() if made.text not in found)
    rest = list(itertools.islice(unseen, MOST_LISTED))
    if len(rest) == MOST_LISTED:
        return {}
    if len(found) + len(rest) < samples:
        raise _too_many(samples, len(found) + len(rest), expressions)
    return {made.text: _row(made) for made in generator.sample(rest, samples - len(found))}


def _row(made: Partial) -> Row:
    return Row(made.text + EQUALS, str(made.total + made.term))


def _too_many(samples: int, existing: int, expressions: Expressions) -> UserError:
    return UserError(
        f"samples ({samples}) are more than the {existing} different expressions of "
        f"{expressions.operands} numbers in {expressions.low}..{expressions.high} with {expressions.ops}; "
        f"ask for fewer, or for a wider range"
    )
