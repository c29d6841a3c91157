"""The validation loss stands for the held-out text."""

import itertools
import random
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from mosaic_dist.data.prepare import prepare
from mosaic_dist.data.stream import Loader
from mosaic_dist.data.tokenizer import train_bpe
from mosaic_dist.spec import override
from mosaic_dist.targets import IGNORE_INDEX
from mosaic_dist.train.session import held_out_streams
from mosaic_dist.train.trainer import mean, measure
from recipes.t4_moe import run

ALPHABET = "abcdefghijklmnopqrstuvwxyz"


def test_both_losses_agree_on_equally_distributed_text(tmp_path):
    """With a model that knows only how often each token occurs. The text begins with documents that are easy for it."""
    draw = random.Random(0)
    texts = ["".join(draw.choices(letters, k=200)) for letters in ("ab", ALPHABET) for _ in range(200)]
    info = prepare(texts, train_bpe(texts, 260), tmp_path / "data", 32, validation_fraction=0.2, workers=1)
    data = override(run.data, {"seq_len": 32, "workers": 0})
    loader = Loader(data, info, global_batch=8, rank=0, world_size=1, seed=run.seed)
    seen = torch.cat([batch.targets_BT.flatten() for batch in itertools.islice(loader, 200)])
    log_p_V = (1.0 + seen.bincount(minlength=info.vocab_size)).log()
    log_p_V -= log_p_V.logsumexp(0)

    def loss(batches) -> float:
        targets = torch.cat([targets_BT.flatten() for _, targets_BT, _ in batches])
        return F.nll_loss(log_p_V.expand(len(targets), -1), targets, ignore_index=IGNORE_INDEX).item()

    ranks = SimpleNamespace(data_rank=0, data_ranks=1)
    engine = SimpleNamespace(sequences=ranks, world=SimpleNamespace(device=torch.device("cpu")))
    held_out = held_out_streams(override(run, {"data": data, "seed": 3}), info, engine, samples=32)
    validation_loss = mean(held_out, measure(held_out, loss, lambda: None))
    assert validation_loss == pytest.approx(-log_p_V[seen].mean().item(), rel=0.05)
