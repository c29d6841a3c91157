"""Addition learnt from answers alone, in GPT-2's form: learned positions, LayerNorm, GELU, biases, dropout.

Data: `python -m data_prep.arithmetic --output data --samples 70000 --operands 2 --low 0 --high 999 --ops +`. Rows of
two operands below 1,000 fit in 16 tokens; longer ones need a larger `data.seq_len`, up to the context of 64.
"""

from mosaic_dist.checkpoint import CheckpointPolicy
from mosaic_dist.data import Data
from mosaic_dist.model import GELU, MHA, Block, Init, LayerNorm, Learned, Tied, Transformer
from mosaic_dist.optim import AdamW, Cosine
from mosaic_dist.run import main
from mosaic_dist.run_spec import Run

block = Block(attention=MHA(heads=4, bias=True, dropout=0.1), ffn=GELU(hidden_dim=512, bias=True), dropout=0.1)

run = Run(
    name="arithmetic_gpt2",
    model=Transformer(
        vocab_size=18,
        dim=128,
        max_seq_len=64,
        position=Learned(),
        layers=4 * (block,),
        norm=LayerNorm(),
        head=Tied(),
        init=Init(std=0.08),  # about 1 / sqrt(width): with GPT-2's 0.02 so narrow a model learns four times slower
    ),
    data=Data(seq_len=16),
    optimizer=AdamW(learning_rate=2e-3, weight_decay=0.1, max_grad_norm=1.0, beta2=0.99),
    schedule=Cosine(warmup_steps=100, min_lr_ratio=0.05),
    steps=9000,
    batch_tokens=2048,
    micro_batch_size=128,
    validate_every_steps=500,
    validation_samples=0,
    exact_match_samples=1024,
    early_stopping_patience=10,
    checkpoint=CheckpointPolicy(every_steps=500, keep_last=1, keep_best=2),
)

if __name__ == "__main__":
    main(run)
