"""The time of a ramp is that of its batches, each planned as a run of its own."""

from dataclasses import replace

import pytest

from mosaic_dist.data import Data
from mosaic_dist.errors import UserError
from mosaic_dist.optim import BatchRamp
from mosaic_dist.plan.plan import Plan, make_plan
from mosaic_dist.plan.report import render_plan
from mosaic_dist.run_spec import Run
from tests.parallel.mixed import LENGTH, MODEL, OPTIMIZER
from tests.plan.cases import HERE

RANKS, STEPS = 4, 10
FULL, START = 32 * LENGTH, 8 * LENGTH
RUN = Run(
    name="mixed",
    model=MODEL,
    data=Data(seq_len=LENGTH),
    optimizer=OPTIMIZER,
    steps=STEPS,
    batch_tokens=FULL,
    batch_ramp=BatchRamp(start_tokens=START, over_tokens=48 * LENGTH),
    precision="fp32",
)


def plan_of(run: Run, stage: int, budget_tokens: int | None = None) -> Plan:
    return make_plan(run, {"zero_optimization": {"stage": stage}}, HERE, 1, RANKS, budget_tokens)


@pytest.mark.parametrize("stage", range(4))
def test_tokens_and_time_are_those_of_the_batches(stage):
    smaller = list(RUN.batch_ramp.batches(FULL))
    alone = {
        size: plan_of(replace(RUN, batch_tokens=size, batch_ramp=None), stage).duration.total
        for size in {*smaller, FULL}
    }
    plan = plan_of(RUN, stage)
    full_steps = STEPS - len(smaller)
    assert (plan.ramp.steps, plan.ramp.tokens) == (len(smaller), sum(smaller))
    assert plan.budget_tokens == sum(smaller) + full_steps * FULL
    assert plan.ramp.seconds == pytest.approx(sum(alone[size] for size in smaller))
    assert plan.seconds == pytest.approx(plan.ramp.seconds + full_steps * alone[FULL])
    assert plan.to_dict()["gpu_hours"] == pytest.approx(RANKS * plan.seconds / 3600)
    short = plan_of(RUN, stage, sum(smaller[:2]))
    assert short.seconds == pytest.approx(sum(alone[size] for size in smaller[:2]))


def test_a_ramp_is_told_and_costs_more_than_full_batches():
    plain, plan = plan_of(replace(RUN, batch_ramp=None), 1), plan_of(RUN, 1)
    assert plain.ramp == (0, 0, 0.0)
    assert plain.budget_tokens == STEPS * FULL
    assert plan.seconds / plan.budget_tokens > plain.seconds / plain.budget_tokens
    text = render_plan(plan)
    assert f"ramp: the batch grows from {START:,} tokens by {START:,} at a time" in text
    assert f"{plan.ramp.tokens:,} of them in {plan.ramp.steps} smaller batches" in text
    assert "ramp" not in render_plan(plain)


def test_ranks_that_cannot_take_the_ramp_are_refused():
    with pytest.raises(UserError, match="multiples of 192 tokens, which 4 ranks with micro-batches of 4 take"):
        plan_of(replace(RUN, micro_batch_size=4), 1)
