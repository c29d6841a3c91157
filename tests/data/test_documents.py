"""Documents of packed rows: told by the loader, kept apart by the model."""

import json

import pytest
import torch

from mosaic_dist.data import Data
from mosaic_dist.data.arithmetic import prepare_arithmetic
from mosaic_dist.data.expressions import Expressions
from mosaic_dist.data.stream import Loader, ValidationBatches
from mosaic_dist.errors import UserError
from mosaic_dist.run_spec import differences
from mosaic_dist.spec import override
from recipes.t4_moe import run

MASKED = Data(workers=0, document_mask=True)


def loader(data, info, state=None) -> Loader:
    return Loader(data, info, global_batch=32, rank=0, world_size=1, seed=1, state=state)


def numbered(row: list[int], end: int) -> list[int]:
    """The document of each token, told token by token."""
    numbers, document = [], 0
    for token in row:
        numbers.append(document)
        document += token == end
    return numbers


@pytest.mark.parametrize("workers", [0, 1])
def test_documents_are_counted_in_each_row(dataset, workers):
    data = Data(workers=workers, document_mask=True)
    held_out = ValidationBatches(data, dataset, batch=8, rank=0, world_size=1)
    several = 0
    for batch in (next(iter(loader(data, dataset))), *held_out):
        assert batch.documents_BT.dtype == torch.int64
        expected = [numbered(row, dataset.eos_id) for row in batch.inputs_BT.tolist()]
        assert batch.documents_BT.tolist() == expected
        several += sum(row[-1] > 0 for row in expected)
    assert several > 10


def test_without_the_mask_nothing_changes(dataset):
    plain, masked = (next(iter(loader(data, dataset))) for data in (Data(workers=0), MASKED))
    assert plain.documents_BT is None
    assert torch.equal(plain.inputs_BT, masked.inputs_BT)
    assert torch.equal(plain.targets_BT, masked.targets_BT)
    assert "document_mask" not in loader(Data(workers=0), dataset).fingerprint


def test_a_run_goes_on_with_the_same_setting_alone(dataset):
    states = [json.loads(json.dumps(loader(data, dataset).state())) for data in (Data(workers=0), MASKED)]
    loader(MASKED, dataset, states[1])
    with pytest.raises(UserError, match="document_mask was None and is True"):
        loader(MASKED, dataset, states[0])
    with pytest.raises(UserError, match="document_mask was True and is None"):
        loader(Data(workers=0), dataset, states[1])
    found = list(differences(run, override(run, {"data.document_mask": True})))
    assert found == ["data.document_mask: False there, True here"]


def test_rows_of_one_document_need_no_mask(tmp_path):
    info = prepare_arithmetic(Expressions(), tmp_path / "set", 50, seq_len=16)
    for use in (
        lambda: loader(MASKED, info),
        lambda: ValidationBatches(MASKED, info, batch=2, rank=0, world_size=1),
        lambda: Data(path=str(info.path), document_mask=True).load(),
    ):
        with pytest.raises(UserError, match=r"document_mask has nothing to do for .*: each of its rows holds one"):
            use()
