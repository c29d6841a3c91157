"""A small mixture-of-experts model for one T4 (16 GB), or a laptop.

4 layers, width 512, 8 heads, context 512, learned positions. A feed-forward width of 2048 is divided over 8 experts of
256, of which each token takes 2. The embedding is 128 wide, projected up to 512, and its table is the output's too.
RMSNorm, pre-norm, no biases. 18.2M parameters, 8.8M of them active.
"""

from mosaic_dist.checkpoint import CheckpointPolicy
from mosaic_dist.data import Data
from mosaic_dist.model import MHA, Block, Factored, Learned, MoE, RMSNorm, SwiGLU, Tied, Transformer
from mosaic_dist.optim import AdamW, Cosine
from mosaic_dist.run import main
from mosaic_dist.run_spec import Run

block = Block(
    attention=MHA(heads=8),
    ffn=MoE(expert=SwiGLU(hidden_dim=2048), split=8, experts=8, top_k=2, aux_loss_coef=0.01),
)

run = Run(
    name="t4_moe",
    model=Transformer(
        vocab_size=8192,
        dim=512,
        max_seq_len=512,
        embedding=Factored(rank=128, multiplier=512**0.5),
        position=Learned(),
        layers=4 * (block,),
        norm=RMSNorm(),
        head=Tied(),
    ),
    data=Data(),
    optimizer=AdamW(learning_rate=1e-3, weight_decay=0.1, max_grad_norm=1.0),
    schedule=Cosine(warmup_steps=200, min_lr_ratio=0.1),
    steps=20_000,
    batch_tokens=32_768,
    micro_batch_size=8,
    validate_every_steps=500,
    checkpoint=CheckpointPolicy(every_steps=500, keep_last=2),
)

if __name__ == "__main__":
    main(run)
