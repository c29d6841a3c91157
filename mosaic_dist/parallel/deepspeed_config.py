"""The DeepSpeed JSON: what it may say, and what the run fills in.

A JSON file holds what DeepSpeed alone knows (ZeRO stage, buckets, offload, loss scaling). Batch sizes, accumulation,
clipping, precision, optimizer and schedule belong to the recipe: in the file these keys may be absent, "auto", or
equal to the recipe's value. DeepSpeed ignores keys that it does not know; here they are refused.
"""

import json
from pathlib import Path
from typing import Any, Literal

import torch

from mosaic_dist.errors import UserError
from mosaic_dist.spec import nearest

Precision = Literal["auto", "fp32", "bf16", "fp16"]

DEFAULT: dict[str, Any] = {"zero_optimization": {"stage": 1, "reduce_bucket_size": 200_000_000}}
"""Used when no file is given. DeepSpeed's own bucket of 5e8 elements would take 1 GB of a GPU beside any model."""

OWN_KEYS = (
    "aio",
    "activation_checkpointing",
    "comms_logger",
    "communication_data_type",
    "data_types",
    "dump_state",
    "flops_profiler",
    "gradient_predivide_factor",
    "memory_breakdown",
    "prescale_gradients",
    "steps_per_print",
    "wall_clock_breakdown",
    "zero_allow_untested_optimizer",
    "zero_force_ds_cpu_optimizer",
    "zero_optimization",
)
"""Top-level keys that a file may set freely."""

RUN_KEYS = (
    "train_batch_size",
    "train_micro_batch_size_per_gpu",
    "gradient_accumulation_steps",
    "gradient_clipping",
    "optimizer",
    "scheduler",
    "bf16",
    "fp16",
)
"""Top-level keys that the recipe decides."""


def read_config(path: str | None) -> dict[str, Any]:
    """Parse a DeepSpeed JSON file (None: ZeRO stage 1). Raises UserError for what cannot be read or is not known."""
    if path is None:
        return json.loads(json.dumps(DEFAULT))
    try:
        config = json.loads(Path(path).read_text())
    except OSError as error:
        raise UserError(f"cannot read the DeepSpeed config {path}: {error.strerror}") from None
    except json.JSONDecodeError as error:
        raise UserError(f"{path}:{error.lineno}: not valid JSON ({error.msg})") from None
    if not isinstance(config, dict):
        raise UserError(f"{path}: expected a JSON object, got {type(config).__name__}")
    for key in config:
        if key not in OWN_KEYS + RUN_KEYS:
            raise UserError(f"{path}: unknown DeepSpeed key {key!r}; {nearest(key, OWN_KEYS + RUN_KEYS)}")
    if not isinstance(config.get("zero_optimization", {}), dict):
        raise UserError(f'{path}: zero_optimization must be an object such as {{"stage": 2}}')
    if zero_stage(config) not in (0, 1, 2, 3):
        raise UserError(f"{path}: zero_optimization.stage is {zero_stage(config)!r}; it must be 0, 1, 2 or 3")
    return config


def zero_stage(config: dict[str, Any]) -> int:
    """ZeRO stage that a config asks for."""
    return config.get("zero_optimization", {}).get("stage", 0)


def resolve_precision(asked: Precision, config: dict[str, Any]) -> Literal["fp32", "bf16", "fp16"]:
    """The precision of a run: what recipe and file say, else bf16 or fp16 by what the GPU can do, fp32 on CPU."""
    names: tuple[Literal["bf16", "fp16"], ...] = ("bf16", "fp16")
    filed = {key: config.get(key, {}).get("enabled", "auto") for key in names}
    said = [key for key, value in filed.items() if value is True]
    if len(said) == 2:
        raise UserError("the DeepSpeed config enables bf16 and fp16; one of them at most can be true")
    for key, value in filed.items():
        conflict = value != "auto" and asked != "auto" and value != (asked == key)
        if conflict:
            raise UserError(f"{key}.enabled is {value} in the DeepSpeed config, but the run's precision is {asked!r}")
    chosen: Literal["fp32", "bf16", "fp16"]
    if asked != "auto":
        chosen = asked
    elif said:
        chosen = said[0]
    elif not torch.cuda.is_available():
        chosen = "fp32"
    else:
        has_bf16 = torch.cuda.get_device_capability() >= (8, 0)  # older ones, as the T4, emulate it slowly
        natural: Literal["bf16", "fp16"] = "bf16" if has_bf16 else "fp16"
        chosen = natural if filed[natural] == "auto" else "fp32"
    if chosen != "fp32" and zero_stage(config) == 0:
        raise UserError(
            f"precision {chosen!r} with ZeRO stage 0 would train wrongly (DeepSpeed's unfused 16-bit optimizer spoils "
            "its first step); use ds_configs/zero1.json, or --precision fp32"
        )
    if chosen == "fp16" and not torch.cuda.is_available():
        raise UserError("precision 'fp16' needs a GPU; DeepSpeed refuses it on CPU. Use --precision bf16 or fp32")
    return chosen


def fill_config(
    config: dict[str, Any],
    *,
    precision: Literal["fp32", "bf16", "fp16"],
    micro_batch_size: int,
    accumulation: int,
    world_size: int,
    max_grad_norm: float,
) -> dict[str, Any]:
    """The config that DeepSpeed gets: the file's own keys, the run's values, and the defaults that must not drift."""
    run_values = {
        "train_micro_batch_size_per_gpu": micro_batch_size,
        "gradient_accumulation_steps": accumulation,
        "train_batch_size": micro_batch_size * accumulation * world_size,
        "gradient_clipping": max_grad_norm,
    }
    for key, value in run_values.items():
        if config.get(key, "auto") not in ("auto", value):
            raise UserError(f'{key} is {config[key]} in the DeepSpeed config, but the run says {value}; write "auto"')
    for key in ("optimizer", "scheduler"):
        if config.get(key, "auto") != "auto":
            raise UserError(f"the DeepSpeed config has a section {key!r}; it is the recipe that decides it: remove it")
    zero = dict(config.get("zero_optimization", {}))
    for key, needed, why in (
        ("round_robin_gradients", False, "it hides which rank holds which part of a parameter from checkpoints"),
        ("reduce_scatter", True, "DeepSpeed needs it for expert parallelism"),
    ):
        if zero.setdefault(key, needed) != needed:
            raise UserError(f"zero_optimization.{key} must be {needed}: {why}")
    _check_offload(zero)
    filled = {key: value for key, value in config.items() if key in OWN_KEYS} | run_values
    filled["zero_optimization"] = {"stage": 0} | zero
    if zero_stage(config) == 0:
        filled["gradient_clipping"] = 0.0  # DeepSpeed's norm is wrong with experts here; the engine clips by itself
    filled["bf16"] = {"enabled": precision == "bf16"}
    filled["fp16"] = {"enabled": precision == "fp16"}
    for key in ("bf16", "fp16"):
        filled[key] |= {name: value for name, value in config.get(key, {}).items() if name != "enabled"}
    if precision == "bf16":
        filled["bf16"].setdefault("check_grad_overflow", True)  # so that a NaN gradient never reaches the weights
        if accumulation > 1:  # bfloat16 sums would lose 0.6 % of the gradient over 32 micro-batches, 2.2 % over 512
            filled["data_types"] = {"grad_accum_dtype": "fp32"} | filled.get("data_types", {})
    if filled.setdefault("zero_force_ds_cpu_optimizer", False):
        raise UserError(
            "zero_force_ds_cpu_optimizer must be false: the recipe's optimizer also updates what is offloaded"
        )
    filled.setdefault("steps_per_print", 1 << 60)
    filled.setdefault("zero_allow_untested_optimizer", True)
    return filled


def _check_offload(zero: dict[str, Any]) -> None:
    """Refuse what DeepSpeed would pass over in silence, and what checkpoints could not read."""
    for key, stages, needed in (
        ("offload_optimizer", (1, 2, 3), "stage 1, 2 or 3"),
        ("offload_param", (3,), "stage 3"),
    ):
        device = (zero.get(key) or {}).get("device", "none")
        if device == "none":
            continue
        if device != "cpu":
            raise UserError(f"zero_optimization.{key}.device is {device!r}, where checkpoints cannot read; use cpu")
        if zero.get("stage", 0) not in stages:
            raise UserError(f"zero_optimization.{key} needs {needed}; the stage is {zero.get('stage', 0)}")
