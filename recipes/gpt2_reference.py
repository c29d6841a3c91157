"""GPT-2 as published: 124,439,808 parameters (Radford et al. 2019), trained as in nanoGPT.

12 layers, width 768, 12 heads, learned positions, LayerNorm, GELU, biases everywhere, tied embeddings.
"""

from mosaic_dist.checkpoint import CheckpointPolicy
from mosaic_dist.data import Data
from mosaic_dist.model import GELU, MHA, Block, LayerNorm, Learned, Tied, Transformer
from mosaic_dist.optim import AdamW, Cosine
from mosaic_dist.run import main
from mosaic_dist.run_spec import Run

block = Block(attention=MHA(heads=12, bias=True), ffn=GELU(hidden_dim=3072, bias=True))

run = Run(
    name="gpt2_reference",
    model=Transformer(
        vocab_size=50_257,
        dim=768,
        max_seq_len=1024,
        position=Learned(),
        layers=12 * (block,),
        norm=LayerNorm(),
        head=Tied(),
    ),
    data=Data(),
    optimizer=AdamW(learning_rate=6e-4, weight_decay=0.1, max_grad_norm=1.0),
    schedule=Cosine(warmup_steps=2000, min_lr_ratio=0.1),
    steps=600_000,
    batch_tokens=491_520,
    micro_batch_size=12,
    validate_every_steps=1000,
    checkpoint=CheckpointPolicy(every_steps=1000, keep_last=2),
)

if __name__ == "__main__":
    main(run)
