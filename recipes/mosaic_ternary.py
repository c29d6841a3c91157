"""`mosaic_small` with 1.58-bit experts: their weights take the values -1, 0 and 1 times a scale per matrix (BitNet)."""

from dataclasses import replace

from mosaic_small import block, run

from mosaic_dist.model import MoE, SwiGLU, TernaryLinearKind
from mosaic_dist.run import main

ternary = replace(
    block,
    ffn=MoE(expert=SwiGLU(hidden_dim=1344, linear=TernaryLinearKind()), experts=8, top_k=2, shared_experts=1),
)
run = replace(run, name="mosaic_ternary", model=replace(run.model, layers=12 * (ternary,)))

if __name__ == "__main__":
    main(run)
