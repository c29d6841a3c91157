"""`nano_modern` with DeepSeekMoE's experts: 8 macro experts of 2048, each cut into 4; 3 of these and a shared one act.

So 32 experts of width 512, of which a token takes 3, and one for all tokens: as many active weights as the dense model.
"""

from dataclasses import replace

from nano_modern import run

from mosaic_dist.model import MQA, Block, MoE, SwiGLU
from mosaic_dist.run import main

block = Block(
    attention=MQA(heads=12),
    ffn=MoE(expert=SwiGLU(hidden_dim=2048), split=4, experts=8 * 4, top_k=3, shared_experts=1, aux_loss_coef=0.01),
)
run = replace(run, name="nano_moe", model=replace(run.model, layers=12 * (block,)))

if __name__ == "__main__":
    main(run)
