"""Plans against four real ranks: bytes that lie there and bytes that are sent are exact, the peak nearly so."""

import json
from collections import Counter

import pytest
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

from mosaic_dist.plan.layout import ZERO_DEFAULTS, rank_groups
from mosaic_dist.plan.states import rank_states
from tests.launch import check, run_ranks
from tests.plan.cases import CASES, PROFILED, RANKS, Measured, plan_of

RELATIVE_ERROR = 0.05
"""Of the most that a step allocates: tokens are few here, and routed unevenly."""


@pytest.fixture(scope="module")
def told(tmp_path_factory):
    output = tmp_path_factory.mktemp("plan") / "measured.json"
    words = ("tests.plan.measured_ranks", str(RANKS), str(output))
    check(run_ranks("tests.parallel.forked", 1, *words, timeout=480))
    return json.loads(output.read_text())


def states_of(measured: Measured):
    layout = plan_of(measured).layout
    groups = rank_groups(layout.run.model, layout.run.optimizer, layout.degree)
    return [rank_states(layout, groups, rank) for rank in range(RANKS)]


@pytest.mark.parametrize("measured", CASES, ids=lambda measured: measured.name)
def test_weights_gradients_and_optimizer_states_are_exact(told, measured):
    for of_rank, states in zip(told[measured.name], states_of(measured), strict=True):
        assert of_rank["parameters"] == states.parameters
        assert of_rank["optimizer"] == states.optimizer
        if measured.case.stage != 1:
            assert set(of_rank["gradients"]) == {states.gradients}
        elif measured.case.accumulation > 1:  # after the last micro-batch stage 1 reduces at once
            assert of_rank["gradients"][0] == states.gradients


@pytest.mark.parametrize("measured", CASES, ids=lambda measured: measured.name)
def test_exchanged_bytes_are_exact(told, measured):
    """What all ranks hand over, by kind and size of the group: uneven routing is even over all of them together."""
    expected: Counter[str] = Counter()
    for flow in plan_of(measured).flows:
        expected[f"{flow.kind} {flow.span.ranks}"] += RANKS * round(flow.handed_over)
    got = sum((Counter(of_rank["sent"]) for of_rank in told[measured.name]), Counter())
    assert got == expected


@pytest.mark.parametrize("measured", PROFILED, ids=lambda measured: measured.name)
def test_peak_is_nearly_what_the_allocator_gave(told, measured):
    memory = plan_of(measured).memory
    allocated = memory.peak_bytes - memory.resident_bytes
    if measured.case.stage == 3:  # whose gradients and bucket are there from the start
        allocated -= memory.states.gradients + memory.states.buffers
    average = sum(of_rank["most"] for of_rank in told[measured.name]) / RANKS
    assert allocated == pytest.approx(average, rel=RELATIVE_ERROR)


def test_what_is_not_said_is_what_deepspeed_takes():
    theirs = {
        (field.alias or name): field.default
        for name, field in DeepSpeedZeroConfig.model_fields.items()
        if (field.alias or name) in ZERO_DEFAULTS
    }
    assert theirs == ZERO_DEFAULTS
