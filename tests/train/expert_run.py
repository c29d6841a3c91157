"""A tiny run whose blocks have no experts, four, and eight; test_experts starts it as ranks."""

from mosaic_dist.checkpoint import CheckpointPolicy
from mosaic_dist.data import Data
from mosaic_dist.model import MHA, Block, MoE, SigmoidTopK, SwiGLU, Transformer
from mosaic_dist.optim import AdamW, Constant
from mosaic_dist.run import main
from mosaic_dist.run_spec import Logging, Run

RANKS, RATE = 2, 0.01

attention, expert = MHA(heads=2), SwiGLU(hidden_dim=16)

run = Run(
    name="experts",
    model=Transformer(
        vocab_size=18,
        dim=16,
        max_seq_len=16,
        layers=(
            Block(attention=attention, ffn=expert),
            Block(
                attention=attention, ffn=MoE(expert=expert, experts=4, top_k=1, capacity_factor=1.0, z_loss_coef=0.1)
            ),
            Block(
                attention=attention,
                ffn=MoE(expert=expert, experts=8, top_k=2, router=SigmoidTopK(expert_bias_update_rate=RATE)),
            ),
        ),
    ),
    data=Data(workers=1),
    optimizer=AdamW(learning_rate=1e-2),
    schedule=Constant(),
    steps=5,
    batch_tokens=128,
    micro_batch_size=4,
    precision="fp32",
    checkpoint=CheckpointPolicy(every_steps=5),
    logging=Logging(experts_every_steps=1),
)

if __name__ == "__main__":
    main(run)
