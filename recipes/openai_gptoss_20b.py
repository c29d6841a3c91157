"""The released gpt-oss-20b architecture (OpenAI, arXiv 2508.10925): 20.91B parameters, 3.61B active.

24 layers, width 2880, 64 heads of 64 over 8 key-value heads with biases and attention sinks, every other layer in a
window of 128; 32 experts of 2880 with biases and clamped SwiGLU, 4 per token; YaRN from 4,096 to 131,072 tokens.
"""

from dataclasses import replace

from gptoss_20b import run

from mosaic_dist.model import GQA, Block, ClampedSwiGLU, MoE, RMSNorm, RoPE, TopKSoftmax, Untied, YaRN
from mosaic_dist.run import main

sliding = Block(
    attention=GQA(heads=64, kv_heads=8, head_dim=64, bias=True, attention_sinks=True, sliding_window=128),
    ffn=MoE(
        expert=ClampedSwiGLU(hidden_dim=2880, bias=True), experts=32, top_k=4, router=TopKSoftmax(), router_bias=True
    ),
)
full = replace(sliding, attention=replace(sliding.attention, sliding_window=None))
model = replace(
    run.model,
    vocab_size=201_088,
    dim=2880,
    position=RoPE(theta=150_000.0, scaling=YaRN(factor=32.0, original_max_seq_len=4096, truncate=False)),
    norm=RMSNorm(eps=1e-5),
    layers=12 * (sliding, full),
    head=Untied(),
)
run = replace(run, name="openai_gptoss_20b", model=model)

if __name__ == "__main__":
    main(run)
