"""A 20B mixture-of-experts model in the style of GPT-OSS: 8 experts of which each token takes 2.

32 layers, width 2048, 32 heads over 8 key-value heads, vocabulary 200,000, context 131,072. The expert width makes the
total 20B; a quarter of the expert weights are active, 5.9B in all.
"""

from mosaic_dist.checkpoint import CheckpointPolicy
from mosaic_dist.data import Data
from mosaic_dist.model import GQA, Block, MoE, RMSNorm, RoPE, SwiGLU, Transformer, Untied
from mosaic_dist.optim import AdamW, Cosine
from mosaic_dist.run import main
from mosaic_dist.run_spec import Run

block = Block(
    attention=GQA(heads=32, kv_heads=8),
    ffn=MoE(expert=SwiGLU(width=12_032), experts=8, top_k=2, balance_weight=0.01),
)

run = Run(
    name="gptoss_20b",
    model=Transformer(
        vocab=200_000,
        dim=2048,
        context=131_072,
        position=RoPE(base=150_000.0),
        blocks=32 * (block,),
        norm=RMSNorm(),
        head=Untied(),
    ),
    data=Data(seq_len=8192),
    optimizer=AdamW(learning_rate=3e-4, weight_decay=0.1, clip_norm=1.0),
    schedule=Cosine(warmup_steps=2000, final_fraction=0.1),
    steps=100_000,
    batch_tokens=4_194_304,
    micro_batch=1,
    validate_every_steps=1000,
    checkpoint=CheckpointPolicy(every_steps=500, keep_last=2),
)

if __name__ == "__main__":
    main(run)
