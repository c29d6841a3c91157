"""What the sweeps of this folder start from: 4 layers of width 128, grouped-query attention, rotary positions, SwiGLU.

About 1.4M parameters over 4,096 tokens, for minutes on one CPU core. The data, once for all sweeps:

    python -m data_prep.train_tokenizer --input stdlib --vocab_size 4096 --output work/sweeps/tokenizer.json
    python -m data_prep.tokenize_to_mds --input stdlib --tokenizer work/sweeps/tokenizer.json --output work/sweeps/data --seq_len 256 --validation_fraction 0.02
"""  # noqa: E501 - commands in one piece

from mosaic_dist.checkpoint import CheckpointPolicy
from mosaic_dist.data import Data
from mosaic_dist.model import GQA, Block, RMSNorm, RoPE, SwiGLU, Table, Tied, Transformer
from mosaic_dist.optim import AdamW, Cosine
from mosaic_dist.run import main
from mosaic_dist.run_spec import Run

block = Block(attention=GQA(heads=4, kv_heads=2), ffn=SwiGLU(hidden_dim=384))

run = Run(
    name="small",
    model=Transformer(
        vocab_size=4096,
        dim=128,
        max_seq_len=256,
        embedding=Table(multiplier=128**0.5),
        position=RoPE(),
        layers=4 * (block,),
        norm=RMSNorm(),
        head=Tied(),
    ),
    data=Data(path="work/sweeps/data", workers=1),
    optimizer=AdamW(learning_rate=2e-3, weight_decay=0.1, max_grad_norm=1.0),
    schedule=Cosine(warmup_steps=20, min_lr_ratio=0.1),
    steps=300,
    batch_tokens=2048,
    micro_batch_size=8,
    validate_every_steps=100,
    validation_samples=64,
    checkpoint=CheckpointPolicy(every_steps=100, keep_last=2),
)

if __name__ == "__main__":
    main(run)
