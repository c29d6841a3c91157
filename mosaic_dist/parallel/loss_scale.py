"""The loss scale of fp16 where it adapts, and so is state: what DeepSpeed (0.19) keeps of it."""

from typing import Any

FIELDS = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")


def scale_state(optimizer: Any) -> dict[str, Any]:
    """The state of a loss scaler that adapts, as plain values; empty where DeepSpeed's optimizer has none."""
    scaler = _adapting_scaler(optimizer)
    return {} if scaler is None else {name: getattr(scaler, name) for name in FIELDS}


def restore_scale(optimizer: Any, saved: dict[str, Any]) -> None:
    """The inverse of `scale_state`. A loss scaler that adapts stays as it is where the saved state has none."""
    scaler = _adapting_scaler(optimizer)
    # older checkpoints of fp32 and bf16 hold the scale 1 alone, with which fp16 would lose its small gradients
    if scaler is not None and saved.keys() == set(FIELDS):
        for name, value in saved.items():
            setattr(scaler, name, value)


def _adapting_scaler(optimizer: Any) -> Any:
    """The loss scaler of fp16, or None; a scale that stays as it is set is no state."""
    scaler = getattr(optimizer, "loss_scaler", None)
    return scaler if getattr(scaler, "dynamic", False) else None
