"""Which checkpoint a run goes on from, and how it gets there."""

from mosaic_dist.checkpoint import Checkpoint, CheckpointError, candidates, refuse_unknown_formats
from mosaic_dist.checkpoint.engine_state import load_engine
from mosaic_dist.parallel import Engine, World, gather_problems, on_main
from mosaic_dist.train.folder import RunFolder
from mosaic_dist.train.telling import say
from mosaic_dist.train.trainer import Progress


def restore_run(checkpoint: Checkpoint, engine: Engine) -> Progress:
    """Bring the engine to a checkpoint, whatever it has done before; where the run was then. Every rank calls."""
    load_engine(checkpoint, engine)
    return Progress(**checkpoint.state["progress"])


def newest_good(folder: RunFolder, world: World) -> Checkpoint | None:
    """The newest checkpoint whose every file has its checksum, each rank reading its share; None for a fresh folder.

    One that is damaged is named and passed over. If all are, CheckpointError: a run never starts from zero in silence.
    The same if another version of this package wrote one of them, as it may be whole.
    """
    on_main(world, lambda: refuse_unknown_formats(folder.checkpoints))
    found = on_main(world, lambda: candidates(folder.checkpoints))
    for path in reversed(found.values()):
        checkpoint, problem = None, None
        try:
            checkpoint = Checkpoint.open(path)
            checkpoint.verify(world.rank, world.size)
        except CheckpointError as error:
            problem = str(error)
        problems = gather_problems(problem)
        if not problems:
            return checkpoint
        say(world, f"warning: passing over a damaged checkpoint: {problems[0]}")
    if found:
        raise CheckpointError(f"every checkpoint in {folder.checkpoints} is damaged; remove them to start afresh")
    return None
