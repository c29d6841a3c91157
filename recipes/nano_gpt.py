"""nanoGPT's form of GPT-2: no biases and a vocabulary padded to 50,304; otherwise `gpt2_reference`."""

from dataclasses import replace

from gpt2_reference import run

from mosaic_dist.model import GELU, MHA, Block, LayerNorm
from mosaic_dist.run import main

block = Block(attention=MHA(heads=12), ffn=GELU(hidden_dim=3072))
model = replace(run.model, vocab_size=50_304, norm=LayerNorm(bias=False), layers=12 * (block,))
run = replace(run, name="nano_gpt", model=model)

if __name__ == "__main__":
    main(run)
