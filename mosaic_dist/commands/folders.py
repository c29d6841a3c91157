"""The commands that tell what lies in a folder."""

from json import dumps

from mosaic_dist.convert.facts import describe, render
from mosaic_dist.convert.locate import RUN_YAML, locate
from mosaic_dist.convert.verify import verify as verify_all
from mosaic_dist.errors import UserError
from mosaic_dist.plan.sizes import size_table
from mosaic_dist.run_spec import import_recipe, read_run
from mosaic_dist.spec import Positive


def inspect(*folder: str, json: bool = False) -> None:
    """Tell what is in a run, its checkpoints, one of them, or an exported model.

    `inspect DIR`: steps, tokens, times, the layout that wrote it, sizes by kind, the largest tensors, the position in
    the data. Reads descriptions and headers only.

    --json                for programs
    """
    facts = describe(locate(_only(folder)))
    print(dumps(facts, indent=2) if json else render(facts))


def verify(*folder: str, threads: Positive = 4, recipe: str | None = None) -> None:
    """Read every byte of a run's checkpoints, one of them, or an exported model; fail if any is not as written.

    `verify DIR` ends with exit code 0 only if all is whole: sizes, checksums, every element of every tensor, and the
    tensors of the run's model. A damaged file is named, with what is wrong and which other checkpoint is good.

    --threads N           files that are read at once
    --recipe FILE         the Python file that defines parts of the model's own, if it has any; its code is run
    """
    import_recipe(recipe)
    found = locate(_only(folder))
    model = None if found.run is None else read_run(found.run / RUN_YAML).model
    for path in verify_all(found, model, threads):
        print(f"whole: {path}")


def _only(words: tuple[str, ...]) -> str:
    if len(words) != 1:
        raise UserError(f"give one folder, not {len(words)}: {' '.join(map(str, words))}")
    return str(words[0])


def recipes(folder: str = "recipes") -> None:
    """Print a table of all recipes of a folder with their total and active parameters.

    --folder DIR          where the recipes are
    """
    print(size_table(folder))
