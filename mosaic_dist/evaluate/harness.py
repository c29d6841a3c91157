"""Any task of EleutherAI's lm-evaluation-harness, on the model in Hugging Face's form."""

import importlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mosaic_dist.convert.hugging_face.standalone import MODEL_TYPE
from mosaic_dist.errors import UserError
from mosaic_dist.evaluate.evaluation import Evaluation, in_one_process
from mosaic_dist.evaluate.model_source import Dtype, LoadedModel
from mosaic_dist.parallel import World
from mosaic_dist.spec import NonNegative, Positive, SpecError

DTYPES = {"fp32": "float32", "bf16": "bfloat16"}


class Harness(Evaluation, type="lm_eval"):
    """Tasks of lm_eval by name: its own, which fetch their data, and those of YAML files in `tasks_folder`.

    `shots` examples stand before each question (None: what the task says); `limit` takes the first documents only. A
    folder's own code is run where `export` wrote it, and else never.
    """

    tasks: tuple[str, ...]
    tasks_folder: str = ""
    shots: NonNegative | None = None
    limit: Positive | None = None
    batch: Positive = 8
    dtype: Dtype = "fp32"

    def validate(self) -> None:
        """There is a task."""
        if not self.tasks or not all(self.tasks):
            raise SpecError("tasks", "name one or more, as --task lm_eval:hellaswag,arc_easy")

    def made_on(self) -> str:
        """The tasks."""
        return ",".join(self.tasks)

    def measure(self, opened: LoadedModel, world: World) -> dict[str, Any]:
        """Run the tasks of the harness on the model, in one process."""
        in_one_process(world, "lm_eval")
        evaluator, models, tasks = (import_harness(part) for part in ("evaluator", "models.huggingface", "tasks"))
        manager = tasks.TaskManager(include_path=self._folder())
        unknown = [name for name in self.tasks if not manager.match_tasks([name])]
        if unknown:
            raise UserError(
                f"lm_eval knows no task {unknown[0]!r}; `lm_eval ls tasks` lists its own, tasks_folder adds others"
            )
        with opened.in_hugging_face_form() as folder:
            model = models.HFLM(
                pretrained=str(folder),
                device=str(world.device),
                dtype=DTYPES[self.dtype],
                batch_size=self.batch,
                trust_remote_code=is_our_code(folder),
            )
            found = evaluator.simple_evaluate(
                model=model, tasks=list(self.tasks), num_fewshot=self.shots, limit=self.limit, task_manager=manager
            )
        return {"results": tidy(found["results"]), "task": "lm_eval", **opened.facts, "dtype": self.dtype}

    def _folder(self) -> str | None:
        if self.tasks_folder and not Path(self.tasks_folder).is_dir():
            raise UserError(f"tasks_folder {self.tasks_folder} is no folder; give one with YAML files of tasks")
        return self.tasks_folder or None

    def measures(self, figures: Mapping[str, Any]) -> dict[str, float]:
        """The metrics of each task, without their standard errors."""
        return {
            f"{task} {name}": value
            for task, measured in figures["results"].items()
            for name, value in measured.items()
            if isinstance(value, float) and not name.endswith("_stderr")
        }


def import_harness(part: str) -> Any:
    """A module of lm_eval. UserError where it is not installed."""
    try:
        return importlib.import_module(f"lm_eval.{part}")
    except ImportError as error:
        raise UserError(f"--task lm_eval needs its package ({error}): pip install 'mosaic-dist[eval]'") from None


def is_our_code(folder: Path) -> bool:
    """Whether a folder brings the code that `export` writes for models without a twin in transformers."""
    return json.loads((folder / "config.json").read_text()).get("model_type") == MODEL_TYPE


def tidy(results: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """The numbers of each task: lm_eval's `metric,filter` as `metric`, or with the filter's name where it has one."""
    return {
        task: {
            key.removesuffix(",none").replace(",", " "): value
            for key, value in measured.items()
            if isinstance(value, int | float)
        }
        for task, measured in results.items()
    }
