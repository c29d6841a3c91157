"""`arithmetic_gpt2` in Llama 2's form: rotary positions, RMSNorm, SwiGLU, no biases, an output head of its own."""

from dataclasses import replace

from arithmetic_gpt2 import run

from mosaic_dist.model import MHA, Block, RMSNorm, RoPE, SwiGLU, Untied
from mosaic_dist.run import main

block = Block(attention=MHA(heads=4, dropout=0.1), ffn=SwiGLU(hidden_dim=512), dropout=0.1)
# a base for sequences of 16 tokens: with 10,000 most pairs of dimensions would hardly turn
model = replace(run.model, position=RoPE(theta=100.0), norm=RMSNorm(), head=Untied(), layers=4 * (block,))
run = replace(run, name="arithmetic_llama2", model=model)

if __name__ == "__main__":
    main(run)
