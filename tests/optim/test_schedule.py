"""Schedules against those of torch and transformers, whose steps are stepped one by one."""

import math

import pytest
import torch
from torch.optim import lr_scheduler
from transformers import get_inverse_sqrt_schedule, get_wsd_schedule

from mosaic_dist.optim import WSD, Cosine, Exponential, InverseSquareRoot, LinearSchedule, Schedule

WARMUP, STEPS = 8, 60


def factors(schedule: Schedule) -> list[float]:
    """After the warm-up."""
    return [schedule.factor(step, STEPS) for step in range(WARMUP, STEPS + 1)]


def stepped(make, **settings) -> list[float]:
    """What a scheduler of another library gives for as many steps without the warm-up."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler, found = make(optimizer, **settings), []
    for _ in range(STEPS - WARMUP + 1):
        found.append(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()
    return found


def test_linear_and_cosine_are_torchs():
    line = stepped(lr_scheduler.LinearLR, start_factor=1.0, end_factor=0.25, total_iters=STEPS - WARMUP)
    assert factors(LinearSchedule(warmup_steps=WARMUP, min_lr_ratio=0.25)) == pytest.approx(line)
    curve = stepped(lr_scheduler.CosineAnnealingLR, T_max=STEPS - WARMUP, eta_min=0.25)
    assert factors(Cosine(warmup_steps=WARMUP, min_lr_ratio=0.25)) == pytest.approx(curve)


def test_exponential_is_torchs():
    schedule = Exponential(first_fraction=1e-4)
    theirs = stepped(lr_scheduler.ExponentialLR, gamma=1e4 ** (1 / (STEPS - WARMUP)))  # one update more than steps
    ours = [schedule.factor(step, STEPS - WARMUP + 1) for step in range(STEPS - WARMUP + 1)]
    assert ours == pytest.approx([1e-4 * factor for factor in theirs])


@pytest.mark.parametrize("shape", ["linear", "1-sqrt"])
def test_wsd_is_transformers(shape):
    theirs = stepped(
        get_wsd_schedule,
        num_warmup_steps=0,
        num_stable_steps=STEPS - WARMUP - 15,
        num_decay_steps=15,
        decay_type=shape,
        min_lr_ratio=0.1,
    )
    ours = factors(WSD(warmup_steps=WARMUP, decay_fraction=0.25, shape=shape, min_lr_ratio=0.1))
    assert ours == pytest.approx(theirs)
    assert ours[: STEPS - WARMUP - 15] == [1.0] * (STEPS - WARMUP - 15)
    assert ours[STEPS - WARMUP - 14] < 1.0


def test_a_decay_longer_than_what_the_warmup_leaves_begins_after_it():
    schedule = WSD(warmup_steps=WARMUP, decay_fraction=1.0, shape="linear")
    assert factors(schedule) == pytest.approx(factors(LinearSchedule(warmup_steps=WARMUP)))


def test_inverse_square_root_is_transformers_and_that_of_the_paper():
    schedule = InverseSquareRoot(warmup_steps=WARMUP)
    theirs = stepped(get_inverse_sqrt_schedule, num_warmup_steps=0, timescale=WARMUP + 1)
    assert factors(schedule) == pytest.approx(theirs)
    for step in range(STEPS):  # equation 3, warm-up included, divided by its peak
        number, peak = step + 1, WARMUP + 1
        paper = min(number**-0.5, number * peak**-1.5) / peak**-0.5
        assert schedule.factor(step, STEPS) == pytest.approx(paper)
    assert schedule.factor(STEPS, STEPS) == schedule.factor(STEPS, 10 * STEPS)


@pytest.mark.parametrize("kind", [WSD, Cosine, InverseSquareRoot, LinearSchedule])
def test_all_meet_the_warmup_at_the_peak_and_never_rise_again(kind):
    schedule = kind(warmup_steps=WARMUP)
    rising = [schedule.factor(step, STEPS) for step in range(WARMUP + 1)]
    assert rising == pytest.approx([(step + 1) / (WARMUP + 1) for step in range(WARMUP + 1)])
    assert factors(schedule) == sorted(factors(schedule), reverse=True)
    assert not math.isclose(factors(schedule)[-1], 1.0)
