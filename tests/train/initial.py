"""What tests of starting weights share: a model with every place that weights can lie in, and a run that wants it."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import torch

from mosaic_dist.convert import write_model
from mosaic_dist.model import GELU, MHA, Block, Learned, MoE, SigmoidTopK, Transformer, TransformerModel
from tests.parallel.tiny import LENGTH

EXPERTS = MoE(expert=GELU(hidden_dim=32, bias=True), experts=4, router=SigmoidTopK(), shared_experts=1)
MODEL = Transformer(
    vocab_size=64,
    dim=32,
    max_seq_len=LENGTH,
    position=Learned(),
    layers=(
        Block(attention=MHA(heads=4), ffn=GELU(hidden_dim=48)),
        Block(attention=MHA(heads=4, dropout=0.5), ffn=EXPERTS, dropout=0.5),
    ),
)
"""Tied table, experts with biases, and a router whose correction is a buffer."""

CALM = replace(
    MODEL, layers=(MODEL.layers[0], replace(MODEL.layers[1], dropout=0.0, attention=MHA(heads=4)))
)  # the same function without dropout


def trained(seed: int = 5) -> TransformerModel:
    """MODEL with values everywhere that no fresh model has, in evaluation mode."""
    model = MODEL.build_initialized(seed).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.add_(0.1 * torch.randn(tensor.shape, generator=generator))
    return model


def tensors(model: TransformerModel) -> dict[str, torch.Tensor]:
    """Parameters and buffers by name, shared ones once."""
    return dict(model.named_parameters()) | dict(model.named_buffers())


def write(folder: Path, model: TransformerModel, spec: Transformer = MODEL, max_shard_bytes: int = 20_000) -> Path:
    """Several files of weights, with checksums."""
    values = ((name, tensor.detach()) for name, tensor in tensors(model).items())
    return write_model(folder, spec, values, {"run": "t", "step": 3}, None, max_shard_bytes=max_shard_bytes)


def asking(folder: Path | str, model: Transformer = CALM) -> SimpleNamespace:
    """The part of a run that says what it starts from."""
    return SimpleNamespace(init_from=str(folder), model=model)
