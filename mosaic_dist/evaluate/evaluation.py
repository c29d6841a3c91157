"""What can be measured of a model: a family of specs, so that a command line and a suite name the same things."""

from collections.abc import Mapping
from typing import Any

from mosaic_dist.errors import UserError
from mosaic_dist.evaluate.model_source import LoadedModel
from mosaic_dist.parallel import World
from mosaic_dist.spec import Spec


class Evaluation(Spec):
    """One measurement with its options. `name` is what tables call it; by default the kind and what it is made on."""

    name: str = ""

    @property
    def label(self) -> str:
        """What tables call it."""
        return self.name or f"{self.type_name} {self.made_on()}"

    def made_on(self) -> str:
        """The data, in a word."""
        raise TypeError(f"{type(self).__name__} has no data: choose a kind of evaluation")

    def measure(self, opened: LoadedModel, world: World) -> dict[str, Any]:
        """The figures, as JSON takes them. Every rank calls, and gets the same. UserError for what does not fit."""
        raise TypeError(f"{type(self).__name__} has no figures: choose a kind of evaluation")

    def measures(self, figures: Mapping[str, Any]) -> dict[str, float]:
        """The few of the figures that a table shows, by their names there."""
        raise TypeError(f"{type(self).__name__} has no table: choose a kind of evaluation")


def in_one_process(world: World, what: str) -> None:
    """UserError where there are more."""
    if world.size > 1:
        raise UserError(f"{what} runs in one process, not in {world.size}; start it without a launcher")
