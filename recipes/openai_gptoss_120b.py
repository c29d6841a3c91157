"""The released gpt-oss-120b architecture: `openai_gptoss_20b` with 36 layers and 128 experts. 116.83B, 5.13B active.

Blocks run again in the backward pass, as in `gptoss_120b`.
"""

from dataclasses import replace

from openai_gptoss_20b import full, run, sliding

from mosaic_dist.model import ActivationCheckpointing
from mosaic_dist.parallel.spec import Parallel
from mosaic_dist.run import main

blocks = 18 * tuple(replace(block, ffn=replace(block.ffn, experts=128)) for block in (sliding, full))
run = replace(
    run,
    name="openai_gptoss_120b",
    model=replace(run.model, layers=blocks),
    parallel=Parallel(activation_checkpointing=ActivationCheckpointing(parts="full")),
)

if __name__ == "__main__":
    main(run)
