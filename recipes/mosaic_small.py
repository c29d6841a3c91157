"""The modular research model: latent attention and a mixture of experts, about 160M active of 385M parameters.

12 layers, width 768, 12 heads. Keys and values come from a latent of 256; positions are decoupled rotary ones. Each
token takes 2 of 8 experts and one that all tokens share.
"""

from mosaic_dist.checkpoint import CheckpointPolicy
from mosaic_dist.data import Data
from mosaic_dist.model import MLA, Block, DecoupledRoPE, MoE, RMSNorm, SwiGLU, Tied, Transformer
from mosaic_dist.optim import AdamW, Cosine
from mosaic_dist.run import main
from mosaic_dist.run_spec import Run

block = Block(
    attention=MLA(heads=12, kv_compression_dim=256),
    ffn=MoE(expert=SwiGLU(hidden_dim=1344), experts=8, top_k=2, shared_experts=1, aux_loss_coef=0.01),
)

run = Run(
    name="mosaic_small",
    model=Transformer(
        vocab_size=32_768,
        dim=768,
        max_seq_len=2048,
        position=DecoupledRoPE(rope_head_dim=32),
        layers=12 * (block,),
        norm=RMSNorm(),
        head=Tied(),
    ),
    data=Data(),
    optimizer=AdamW(learning_rate=6e-4, weight_decay=0.1, max_grad_norm=1.0),
    schedule=Cosine(warmup_steps=500, min_lr_ratio=0.1),
    steps=20_000,
    batch_tokens=524_288,
    micro_batch_size=8,
    validate_every_steps=500,
    checkpoint=CheckpointPolicy(every_steps=500, keep_last=2),
)

if __name__ == "__main__":
    main(run)
