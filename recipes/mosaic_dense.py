"""`mosaic_small` with a dense feed-forward network: latent attention and SwiGLU, about 150M parameters."""

from dataclasses import replace

from mosaic_small import block, run

from mosaic_dist.model import SwiGLU
from mosaic_dist.run import main

dense = replace(block, ffn=SwiGLU(hidden_dim=3584))
run = replace(run, name="mosaic_dense", model=replace(run.model, layers=12 * (dense,)))

if __name__ == "__main__":
    main(run)
