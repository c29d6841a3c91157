"""DeepSpeed's counters and loss scaler across precisions: what adapts is state, what is set is not."""

from types import SimpleNamespace
from typing import Any

import pytest
from deepspeed import comm
from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler

from mosaic_dist.parallel.loss_scale import restore_scale, scale_state
from mosaic_dist.parallel.state import counters, restore_counters

FRESH_SCALE, ADAPTED_SCALE = 65536.0, 4096.0


@pytest.fixture(autouse=True)
def silent(monkeypatch: pytest.MonkeyPatch) -> None:
    """The scaler asks for its rank, which is to say something on the first one, and here are no processes."""
    monkeypatch.setattr(comm, "get_rank", lambda: 1)


def engine(scaler: Any, steps: int = 0, accumulation: int = 1) -> Any:
    """What `counters` asks of an engine; ZeRO 0 in float32 has no scaler at all."""
    optimizer = SimpleNamespace() if scaler is None else SimpleNamespace(loss_scaler=scaler)
    own = SimpleNamespace(global_steps=steps, micro_steps=steps * accumulation, skipped_steps=0, optimizer=optimizer)
    return SimpleNamespace(deepspeed=own, accumulation=accumulation)


def fp16_scaler() -> DynamicLossScaler:
    return DynamicLossScaler(FRESH_SCALE, 3, min_scale=1.0, delayed_shift=2, consecutive_hysteresis=False)


def adapted() -> DynamicLossScaler:
    """Four overflows and some good steps later."""
    scaler = fp16_scaler()
    for overflow in (True, True, True, True, True, False, False):
        scaler.update_scale(overflow)
    assert scaler.cur_scale == ADAPTED_SCALE
    return scaler


def test_a_scaler_that_adapts_goes_on_where_it_was() -> None:
    old, new = adapted(), fp16_scaler()
    restore_counters(engine(new, accumulation=2), counters(engine(old, 7)))
    for overflow in (False, False, False, True, False, True, True):
        assert new.cur_scale == old.cur_scale
        for scaler in (old, new):
            scaler.update_scale(overflow)
    assert new.cur_scale == old.cur_scale


@pytest.mark.parametrize("scaler", [None, LossScaler(1.0)], ids=["zero 0", "bf16"])
def test_fp16_begins_with_its_own_scale_after_another_precision(scaler: Any) -> None:
    saved = counters(engine(scaler, 7))
    assert saved["loss_scaler"] == {}
    for state in (saved, saved | {"loss_scaler": {"cur_scale": 1.0}}):  # the other as earlier versions wrote it
        new = fp16_scaler()
        restore_counters(engine(new), state)
        assert new.cur_scale == FRESH_SCALE


def test_a_scale_that_is_set_stays_and_micro_batches_are_counted_in_those_of_this_run() -> None:
    fixed = LossScaler(1.0)
    loaded = engine(fixed, accumulation=3)
    restore_counters(loaded, counters(engine(adapted(), 7, accumulation=2)))
    assert fixed.cur_scale == 1.0
    assert (loaded.deepspeed.global_steps, loaded.deepspeed.micro_steps) == (7, 21)


def test_an_overflow_that_was_none_can_be_taken_back() -> None:
    """As after a step that was rejected for its loss, whose gradients are NaN on purpose."""
    scaler, other = adapted(), adapted()
    optimizer = SimpleNamespace(loss_scaler=scaler)
    before = scale_state(optimizer)
    scaler.update_scale(True)
    assert vars(scaler) != vars(other)
    restore_scale(optimizer, before)
    assert vars(scaler) == vars(other)
