"""`python -m mosaic_dist COMMAND`: what is done with a run after training."""

from mosaic_dist.cli import run_subcommand
from mosaic_dist.memory import keep_freed_memory

COMMANDS = {
    "export": "mosaic_dist.commands.models:export",
    "import": "mosaic_dist.commands.models:import_model",
    "generate": "mosaic_dist.commands.models:generate",
    "evaluate": "mosaic_dist.evaluate.command:evaluate",
    "inspect": "mosaic_dist.commands.folders:inspect",
    "verify": "mosaic_dist.commands.folders:verify",
    "recipes": "mosaic_dist.commands.folders:recipes",
    "plan": "mosaic_dist.plan.command:plan",
    "doctor": "mosaic_dist.doctor.command:doctor",
    "profile": "mosaic_dist.profiling.command:profile",
    "plot": "mosaic_dist.compare.plot:plot",
    "report": "mosaic_dist.compare.report:report",
    "sweep": "mosaic_dist.compare.sweep:sweep",
    "compare": "mosaic_dist.compare.compare:compare",
    "find_lr": "mosaic_dist.compare.find_lr:find_lr",
    "coordinate_check": "mosaic_dist.compare.coordinate_check:coordinate_check",
    "reproduce": "mosaic_dist.reproduce.command:reproduce",
}
"""Where each command's function is. Only the one that is called is imported: all of them together take seconds."""


def main() -> None:
    """Run the command that the first word names."""
    keep_freed_memory()
    run_subcommand(COMMANDS, "python -m mosaic_dist")


if __name__ == "__main__":
    main()
