"""One mixture over three ranks: bad balance, ranks without tokens, what travels, and what is done while rows travel."""

import json
import math

import pytest

from tests.launch import check, run_ranks
from tests.parallel.layer_ranks import CASES, CHUNKS, DIM, EXPERTS, RANKS

COUNT_BYTES = 8


@pytest.fixture(scope="module")
def told(tmp_path_factory):
    path = tmp_path_factory.mktemp("layer") / "told.json"
    check(run_ranks("tests.parallel.forked", 1, "tests.parallel.layer_ranks", str(RANKS), str(path), timeout=120))
    return json.loads(path.read_text())


@pytest.mark.parametrize("chunks", [1, CHUNKS])
@pytest.mark.parametrize("name", CASES)
def test_the_layer_is_that_of_one_device(told, name, chunks):
    """In values and all gradients; and no rank ever has more rows at its experts than chunks allow."""
    case, found = CASES[name], [rank["cases"][f"{name}/{chunks}"] for rank in told]
    assert max(rank["apart"] for rank in found) < 2e-5  # gradients are up to 10, sums of up to 27 rows
    rows = [rank["rows"] for rank in found]
    assert max(rows) <= RANKS * math.ceil(max(case.tokens) / chunks) * case.top_k
    if chunks == 1:
        assert sum(rows) == sum(case.tokens) * case.top_k  # every choice once, and nothing dropped
    assert {rank["passes"] for rank in found} == {1 if chunks == 1 else 2 * chunks}  # chunks pass again backward


@pytest.mark.parametrize(("name", "busy"), [("all to one expert", {2}), ("all to one rank", {0})])
def test_the_worst_balance_is_as_bad_as_it_can_be(told, name, busy):
    """The bound of the test above is reached, on the rank that has the experts; the others get nothing."""
    case = CASES[name]
    for chunks in (1, CHUNKS):
        rows = [rank["cases"][f"{name}/{chunks}"]["rows"] for rank in told]
        bound = RANKS * math.ceil(case.tokens[0] / chunks) * case.top_k
        assert rows == [bound if rank in busy else 0 for rank in range(RANKS)]


def test_chunks_keep_less_for_the_backward_pass(told):
    """On the rank that gets the rows of all, only the tokens that are its own are left to keep."""
    kept = told[0]["kept_bytes"]
    assert kept[str(CHUNKS)] < kept["1"] / 3
    assert len({rank["kept_bytes"][str(CHUNKS)] for rank in told}) == 1  # whatever the balance


@pytest.mark.parametrize("kind", [0, 1], ids=["float32", "bfloat16"])
def test_a_choice_costs_what_is_written(told, kind):
    """A row and its weight there, a row back, both again for the gradient; a count of each expert from each rank."""
    journals = [rank["journals"][kind] for rank in told]
    choices = sum(journal["tokens"] for journal in journals) * CASES["as the router chooses"].top_k
    numbers = 2 * choices * ((DIM + 1) + DIM)
    sent = sum(journal["sent_bytes"] for journal in journals)
    assert sent == numbers * journals[0]["itemsize"] + RANKS * EXPERTS * COUNT_BYTES


def test_shared_experts_work_while_rows_travel(told):
    forward = ["counts", "start", "shared", "wait", "experts", "start", "wait"]
    backward = ["start", "wait", "experts backward", "start", "shared backward", "wait"]
    for rank in told:
        for journal in rank["journals"]:
            assert journal["events"] == forward + backward
