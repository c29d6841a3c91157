"""`nano_gpt` with today's parts: RMSNorm, rotary positions, multi-query attention, SwiGLU of equal size.

Any number of key-value heads: `--model.layers.attention "{type: gqa, heads: 12, kv_heads: 4}"`; gated GELU:
`--model.layers.ffn geglu`.
"""

from dataclasses import replace

from nano_gpt import run

from mosaic_dist.model import MQA, Block, RMSNorm, RoPE, SwiGLU
from mosaic_dist.run import main

block = Block(attention=MQA(heads=12), ffn=SwiGLU(hidden_dim=2048))
model = replace(run.model, position=RoPE(), norm=RMSNorm(), layers=12 * (block,))
run = replace(run, name="nano_modern", model=model)

if __name__ == "__main__":
    main(run)
