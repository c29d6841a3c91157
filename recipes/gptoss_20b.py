"""A 20B mixture-of-experts model in the style of GPT-OSS: 8 experts of which each token takes 2.

32 layers, width 2048, 32 heads, vocabulary 200,000 with tied embeddings, context 131,072. The expert width is the
multiple of 128 that brings the total nearest to 20B; a quarter of the expert weights are active, 5.7B in all.

For long sequences there is a form with 8 key-value heads and an output table of its own, 20.3B in all:
`--model.layers.attention gqa --model.layers.attention.kv_heads 8 --model.head linear`.
"""

from mosaic_dist.checkpoint import CheckpointPolicy
from mosaic_dist.data import Data
from mosaic_dist.model import MHA, Block, MoE, RMSNorm, RoPE, SwiGLU, Tied, Transformer
from mosaic_dist.optim import AdamW, Cosine
from mosaic_dist.run import main
from mosaic_dist.run_spec import Run

block = Block(
    attention=MHA(heads=32),
    ffn=MoE(expert=SwiGLU(hidden_dim=12_160), experts=8, top_k=2, aux_loss_coef=0.01),
)

run = Run(
    name="gptoss_20b",
    model=Transformer(
        vocab_size=200_000,
        dim=2048,
        max_seq_len=131_072,
        position=RoPE(theta=150_000.0),
        layers=32 * (block,),
        norm=RMSNorm(),
        head=Tied(),
    ),
    data=Data(seq_len=8192),
    optimizer=AdamW(learning_rate=3e-4, weight_decay=0.1, max_grad_norm=1.0),
    schedule=Cosine(warmup_steps=2000, min_lr_ratio=0.1),
    steps=100_000,
    batch_tokens=4_194_304,
    micro_batch_size=1,
    validate_every_steps=1000,
    checkpoint=CheckpointPolicy(every_steps=500, keep_last=2),
)

if __name__ == "__main__":
    main(run)
