"""`arithmetic_llama2` in Mixtral's form: 4 experts, of which each token takes 2."""

from dataclasses import replace

from arithmetic_llama2 import block, run

from mosaic_dist.model import MoE, SwiGLU, TopKSoftmax
from mosaic_dist.run import main

sparse = replace(block, ffn=MoE(expert=SwiGLU(width=512), experts=4, top_k=2, router=TopKSoftmax()))
run = replace(run, name="arithmetic_mixtral", model=replace(run.model, blocks=4 * (sparse,)))

if __name__ == "__main__":
    main(run)
