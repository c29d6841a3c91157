"""GPT-2 as people write it by hand: one file, one loop, no DeepSpeed. It sets what frameworks cost."""

import torch
from torch import Tensor, nn
from torch.nn import functional

from mosaic_dist.model import Transformer


class PlainBlock(nn.Module):
    """Attention with one matrix for queries, keys and values, then a network four times as wide."""

    def __init__(self, dim: int, heads: int, width: int):
        super().__init__()
        self.heads = heads
        self.before_attention, self.before_mlp = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.qkv, self.output = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.up, self.down = nn.Linear(dim, width), nn.Linear(width, dim)

    def forward(self, x_BTD: Tensor) -> Tensor:
        """x_BTD -> [B, T, D]."""
        qkv = self.qkv(self.before_attention(x_BTD)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        seen_BNTH = functional.scaled_dot_product_attention(*qkv, is_causal=True)
        x_BTD = x_BTD + self.output(seen_BNTH.transpose(1, 2).flatten(2))
        hidden = functional.gelu(self.up(self.before_mlp(x_BTD)), approximate="tanh")
        return x_BTD + self.down(hidden)


class PlainGPT2(nn.Module):
    """The model of `gpt2_reference`, with the weights of one of ours."""

    def __init__(self, spec: Transformer, seed: int):
        super().__init__()
        block = spec.layers[0]
        heads, width = block.attention.heads, block.ffn.hidden_dim  # type: ignore[attr-defined]
        self.tokens, self.positions = nn.Embedding(spec.vocab_size, spec.dim), nn.Embedding(spec.max_seq_len, spec.dim)
        self.blocks = nn.ModuleList(PlainBlock(spec.dim, heads, width) for _ in spec.layers)
        self.norm = nn.LayerNorm(spec.dim)
        self._copy(dict(spec.build_initialized(seed).named_parameters()))

    @torch.no_grad()
    def _copy(self, ours: dict[str, nn.Parameter]) -> None:
        self.tokens.weight.copy_(ours["embedding.weight"])
        self.positions.weight.copy_(ours["position.weight"])
        for i, block in enumerate(self.blocks):
            names = {"output": "attention.output", "up": "ffn.network.up", "down": "ffn.network.down"}
            for kind in ("weight", "bias"):
                qkv = [ours[f"layers.{i}.attention.{name}.{kind}"] for name in ("query", "key", "value")]
                getattr(block.qkv, kind).copy_(torch.cat(qkv))
                for mine, other in names.items():
                    getattr(block.get_submodule(mine), kind).copy_(ours[f"layers.{i}.{other}.{kind}"])

    def forward(self, tokens_BT: Tensor, targets_BT: Tensor) -> Tensor:
        """The mean cross-entropy."""
        positions_T = torch.arange(tokens_BT.shape[1], device=tokens_BT.device)
        x_BTD = self.tokens(tokens_BT) + self.positions(positions_T)
        for block in self.blocks:
            x_BTD = block(x_BTD)
        logits_BTV = functional.linear(self.norm(x_BTD), self.tokens.weight)
        return functional.cross_entropy(logits_BTV.flatten(0, 1), targets_BT.flatten())
