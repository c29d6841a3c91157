"""A 120B mixture-of-experts model in the style of GPT-OSS: 16 experts of which each token takes 2.

64 layers, width 4096, 64 heads; vocabulary, context and tied embeddings as in `gptoss_20b`. The expert width is the
multiple of 128 that brings the total nearest to 120B; an eighth of the expert weights are active, 19.4B in all. Blocks
run again in the backward pass: what they would keep of one sequence of 8,192 tokens is more than a GPU of 80 GB has
(`python -m mosaic_dist plan`). The overrides of `gptoss_20b` make the grouped, untied form of this one too, 118.4B.
"""

from dataclasses import replace

from gptoss_20b import run

from mosaic_dist.model import MHA, ActivationCheckpointing, Block, MoE, SwiGLU
from mosaic_dist.parallel.spec import Parallel
from mosaic_dist.run import main

block = Block(
    attention=MHA(heads=64),
    ffn=MoE(expert=SwiGLU(hidden_dim=9088), experts=16, top_k=2, aux_loss_coef=0.01),
)
model = replace(run.model, dim=4096, layers=64 * (block,))
run = replace(
    run,
    name="gptoss_120b",
    model=model,
    optimizer=replace(run.optimizer, learning_rate=1.5e-4),
    parallel=Parallel(activation_checkpointing=ActivationCheckpointing(parts="full")),
)

if __name__ == "__main__":
    main(run)
