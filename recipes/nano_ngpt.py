"""The nano shape as a normalised Transformer (nGPT, arXiv 2410.01131): hidden states and weights are unit vectors.

As in the paper: rotary positions, normalised queries and keys, SwiGLU, an output table of its own, no weight decay, no
warm-up. Its feed-forward width is four times the model's; here it is `nano_modern`'s.
"""

from dataclasses import replace

from nano_gpt import run

from mosaic_dist.model import MHA, NormalizedBlock, RoPE, SwiGLU, UnitHead, UnitLinearKind, UnitNorm
from mosaic_dist.optim import AdamW, Cosine
from mosaic_dist.run import main

block = NormalizedBlock(
    attention=MHA(heads=12, qk_norm=True, linear=UnitLinearKind(scaled=False)),
    ffn=SwiGLU(hidden_dim=2048, linear=UnitLinearKind()),
)
model = replace(run.model, position=RoPE(), norm=UnitNorm(), head=UnitHead(), layers=12 * (block,))
run = replace(
    run,
    name="nano_ngpt",
    model=model,
    optimizer=AdamW(learning_rate=1.5e-3, weight_decay=0.0, max_grad_norm=1.0),
    schedule=Cosine(warmup_steps=0, min_lr_ratio=0.1),
)

if __name__ == "__main__":
    main(run)
