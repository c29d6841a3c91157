"""A sweep as YAML, and the runs that it means.

recipe: recipes/t4_moe.py                # or a run written as YAML
flags: {data: work/data, steps: 300}     # of all runs, as on a recipe's command line
variants:                                # what tells them apart
  mha: {}
  gqa: {model.layers.attention: {type: gqa, heads: 8, kv_heads: 2}}
grid:                                    # each value with each variant
  optimizer.learning_rate: [1e-3, 3e-3]
seeds: [0, 1]
"""

import contextlib
import dataclasses
import itertools
import keyword
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from mosaic_dist.compare.history import read_spec
from mosaic_dist.data.settings import read_data_word
from mosaic_dist.errors import UserError
from mosaic_dist.plan.command import load_recipe
from mosaic_dist.run_spec import Run, differences, listing
from mosaic_dist.spec import NonNegative, Spec, SpecError, override
from mosaic_dist.train.folder import RunFolder

Value = bool | object
"""Any plain value: the run's field that it is for says what it may be."""
YAML_SCRIPT = "recipes/train.py"
"""What trains a run that is written as YAML."""
RECIPE_WORDS = ("ds_config", "data", "expert_parallel", "max_minutes", "stop_at_step")
"""Flags of a recipe that are no fields of its run."""
OWN_FIELDS = ("name", "seed", "output", "dry_run", "config", "local_rank")
"""What the sweep itself says of each run."""


class SweepConfig(Spec):
    """Runs of one recipe. Each of `variants` changes fields of it, with every combination of `grid` and each seed."""

    recipe: str
    flags: dict[str, Value] = dataclasses.field(default_factory=dict)
    variants: dict[str, dict[str, Value]] = dataclasses.field(default_factory=dict)
    grid: dict[str, tuple[Value, ...]] = dataclasses.field(default_factory=dict)
    seeds: tuple[NonNegative, ...] = (0,)

    def validate(self) -> None:
        """Every list has something in it, nobody sets what the sweep does, and variants can be folders."""
        lists: dict[str, tuple[Any, ...]] = {f"grid.{field}": values for field, values in self.grid.items()}
        for path, values in {"seeds": self.seeds, **lists}.items():
            if not values:
                raise SpecError(path, "the list is empty; give at least one value")
        changes: dict[str, Mapping[str, Any]] = {f"variants.{name}": fields for name, fields in self.variants.items()}
        changes |= {"flags": self.flags, "grid": self.grid}
        for path, fields in changes.items():
            if taken := [field for field in fields if field in OWN_FIELDS]:
                raise SpecError(path, f"{taken[0]} is what the sweep sets for each run; leave it out")
        for name in self.variants:
            if not re.fullmatch(r"[\w.+-]+", name):
                raise SpecError("variants", f"{name!r} is to name folders; use letters, digits and _ . + -")


@dataclasses.dataclass(frozen=True)
class PlannedRun:
    """A run of a sweep, and the words that train it."""

    run: Run
    script: tuple[str, ...]
    """What is started, with the words that come before the flags."""
    flags: dict[str, Any]
    folder: Path

    @property
    def name(self) -> str:
        """The run's, which is also its folder's."""
        return self.run.name

    def words(self, *left_out: str) -> list[str]:
        """The flags as words of a command line, but for some."""
        return [f"--{key}={written(value)}" for key, value in self.flags.items() if key not in left_out]

    @property
    def command(self) -> list[str]:
        """What a launcher is given."""
        return [*self.script, f"--output={self.folder}", *self.words()]


def plan_runs(sweep: SweepConfig, more: Mapping[str, Any], output: Path) -> list[PlannedRun]:
    """All runs of a sweep, in `output`/NAME_seedN; `more` changes its flags. Every one of them has been made.

    UserError that names the run where a field is wrong, and where a folder holds another run already.
    """
    if taken := [field for field in more if field in OWN_FIELDS]:
        raise UserError(f"--{taken[0]} is what the sweep sets for each run; leave it out")
    is_yaml = sweep.recipe.endswith((".yaml", ".yml"))
    recipe = read_spec(Run, Path(sweep.recipe)) if is_yaml else load_recipe(sweep.recipe)
    if is_yaml and not Path(YAML_SCRIPT).exists():
        raise UserError(f"{sweep.recipe} is trained by {YAML_SCRIPT}, which is not here; start this in the repository")
    script = (YAML_SCRIPT, f"--config={sweep.recipe}") if is_yaml else (sweep.recipe,)
    planned = []
    for name, changes in _combinations(sweep, recipe.name):
        for seed in sweep.seeds:
            full = f"{name}_seed{seed}"
            flags = {**sweep.flags, **more, **changes, "name": full, "seed": seed}
            with named_run(full):
                planned.append(PlannedRun(with_flags(recipe, flags), script, flags, output / full))
    twice = [name for name, times in Counter(one.name for one in planned).items() if times > 1]
    if twice:
        raise UserError(f"two runs of the sweep are called {twice[0]}: give their variants other names")
    for one in planned:
        _check_folder(one)
    return planned


@contextlib.contextmanager
def named_run(name: str) -> Iterator[None]:
    """A UserError raised inside names the run that it is about."""
    try:
        yield
    except UserError as error:
        raise UserError(f"run {name}: {error}") from None


def _combinations(sweep: SweepConfig, name: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each variant with each combination of the grid, by a name; the recipe's where there are no variants."""
    last = Counter(field.rpartition(".")[2] for field in sweep.grid)
    short = {field: end if last[end := field.rpartition(".")[2]] == 1 else field for field in sweep.grid}
    for variant, changes in (sweep.variants or {name: {}}).items():
        for values in itertools.product(*sweep.grid.values()):
            chosen = dict(zip(sweep.grid, values, strict=True))
            parts = [f"{short[field]}_{re.sub(r'[^A-Za-z0-9.+-]+', '-', written(it))}" for field, it in chosen.items()]
            yield "_".join([variant, *parts]), {**changes, **chosen}


def with_flags(run: Run, flags: Mapping[str, Any]) -> Run:
    """The run that a recipe makes of its flags. SpecError for what does not fit."""
    fields = {key: value for key, value in flags.items() if key not in RECIPE_WORDS}
    if "data" in flags:
        fields |= read_data_word(str(flags["data"]))
    if "expert_parallel" in flags:
        fields["parallel.expert_parallel"] = flags["expert_parallel"]
    return override(run, fields)


def _check_folder(one: PlannedRun) -> None:
    """UserError where the run's folder holds another experiment."""
    file = RunFolder(one.folder).run_yaml
    if file.exists():
        found = list(differences(read_spec(Run, file), one.run))
        if found:
            raise UserError(f"{one.folder} holds another run; choose another --output.{listing(found)}")


def written(value: Any) -> str:
    """A value as the command line takes it: a field of its type makes the same of it again."""
    return value if isinstance(value, str) else _nested(value)


def _nested(value: Any) -> str:
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{_nested(key)}: {_nested(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(_nested, value)) + "]"
    is_bare = isinstance(value, str) and value.isidentifier() and not keyword.iskeyword(value)
    return value if is_bare else repr(value)
