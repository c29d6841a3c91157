"""What is evaluated: an exported model of ours, a Hugging Face folder, or a checkpoint of a run as it is."""

import contextlib
import json
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from mosaic_dist.convert import load_exported
from mosaic_dist.convert.hugging_face import export_folder, import_folder
from mosaic_dist.convert.locate import RUN_YAML, choose_checkpoint
from mosaic_dist.convert.native import check_complete
from mosaic_dist.convert.reading import prove_files, read_weight_map
from mosaic_dist.convert.weights import DTYPES, CheckpointTensors
from mosaic_dist.data.tokenizer import Tokenizer
from mosaic_dist.errors import UserError
from mosaic_dist.model import Transformer, TransformerModel, materialize
from mosaic_dist.run_spec import read_run
from mosaic_dist.spec import Positive, Spec, SpecError

Dtype = Literal["fp32", "bf16"]


class ModelSource(Spec):
    """A model, by where it lies: the folder `model`, or a `run`, of which `step` is a checkpoint before the newest.

    `name` is what tables call it; by default the folder's last name, and the step.
    """

    model: str = ""
    run: str = ""
    step: Positive | None = None
    name: str = ""

    def validate(self) -> None:
        """There is one place."""
        if bool(self.model) == bool(self.run):
            raise SpecError("model", "give either model (an exported model) or run (a run folder)")
        if self.step is not None and not self.run:
            raise SpecError("step", f"{self.step} is of a run, and {self.model} is an exported model")

    @property
    def label(self) -> str:
        """What tables call it."""
        step = f" step {self.step}" if self.step is not None else ""
        return self.name or Path(self.model or self.run).name + step

    def open(self) -> "LoadedModel":
        """Look at the folder; weights are read when they are asked for. UserError for what is no model."""
        if self.run:
            return _open_run(self.run, self.step)
        return _open_exported(self.model) if _is_ours(Path(self.model)) else _open_hugging_face(self.model)


@dataclass
class LoadedModel:
    """A model that is there. `facts` tell which one it is, `tokenizer_path` is a file, or a folder that holds one."""

    facts: dict[str, Any]
    tokenizer_path: Path
    load: Callable[[], TransformerModel]
    """Reads the weights, on the CPU in the dtype in which they are stored."""
    in_hugging_face_form: Callable[[], AbstractContextManager[Path]]
    """A folder that transformers loads; where it has to be made first, it is gone afterwards."""
    _held: tuple[Any, TransformerModel] | None = None

    @property
    def tokenizer(self) -> Tokenizer:
        """The model's."""
        return Tokenizer.load(self.tokenizer_path)

    def network(self, device: torch.device, dtype: Dtype | None = None) -> TransformerModel:
        """The model in evaluation mode, its parameters in `dtype` (None: as stored). The last one stays in memory."""
        if self._held is None or self._held[0] != (device, dtype):
            self._held = None
            network = self.load()
            for parameter in network.parameters() if dtype is not None else ():
                parameter.data = parameter.data.to(DTYPES[dtype or "fp32"])
            self._held = (device, dtype), network.to(device).eval()
        return self._held[1]


def _is_ours(path: Path) -> bool:
    """Whether a folder is an exported model in our own form; what is none at all is told by `load_exported`."""
    try:
        return json.loads((path / "config.json").read_text())["model_type"] == "mosaic_dist"
    except (OSError, ValueError, KeyError, TypeError):
        return not (path / "config.json").exists()


def _open_exported(model: str) -> LoadedModel:
    def refuse() -> AbstractContextManager[Path]:
        raise UserError(
            f"{model} is in our own form, and lm_eval needs Hugging Face's: use `export --format hf`, or --run"
        )

    return LoadedModel({"model": model}, Path(model), lambda: load_exported(model), refuse)


def _open_hugging_face(model: str) -> LoadedModel:
    @contextlib.contextmanager
    def proven() -> Iterator[Path]:
        read_weight_map(Path(model))  # transformers has rules of its own for a folder with files of two models
        prove_files(Path(model))
        yield Path(model)

    return LoadedModel({"model": model}, Path(model), lambda: _build(*import_folder(model)), proven)


def _open_run(run: str, step: int | None) -> LoadedModel:
    folder, checkpoint = choose_checkpoint(run, None, step)
    spec = read_run(folder / RUN_YAML).model
    tensors = CheckpointTensors(checkpoint)

    @contextlib.contextmanager
    def exported() -> Iterator[Path]:
        with tempfile.TemporaryDirectory(prefix="mosaic_") as place:
            yield export_folder(spec, tensors, Path(place) / folder.name, "fp32", folder / "tokenizer.json")

    return LoadedModel(
        {"run": run, "step": checkpoint.step},
        folder / "tokenizer.json",
        lambda: _build(spec, tensors.items()),
        exported,
    )


def _build(spec: Transformer, tensors: Iterable[tuple[str, Tensor]]) -> TransformerModel:
    """The model with these weights in float32, which are read one after another. UserError unless all are there."""
    with torch.device("meta"):
        network = spec.build()
    materialize(network, torch.device("cpu"))
    places, seen = dict(network.named_parameters()) | dict(network.named_buffers()), {}
    with torch.no_grad():
        for name, tensor in tensors:
            seen[name] = tuple(tensor.shape)
            if name in places and seen[name] == tuple(places[name].shape):
                places[name].copy_(tensor)
    check_complete({name: tuple(place.shape) for name, place in places.items()}, seen)
    return network
