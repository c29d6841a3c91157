"""What a run may say about the cluster."""

from typing import Literal

from mosaic_dist.model import ActivationCheckpointing
from mosaic_dist.spec import Positive, PositiveFloat, Spec, SpecError


class Parallel(Spec):
    """`expert_parallel` ranks share the experts of a layer; "auto": the most that divide them and fit in a node.

    `expert_chunks` above 1 bounds the memory that badly balanced routing can take: the tokens of a micro-batch pass the
    experts in so many parts, each computed again in the backward pass. `activation_checkpointing` selects which other
    parts are recomputed. `sequence_parallel` ranks share each sequence, a part of its tokens each, and of the heads
    while attention scores are made (DeepSpeed-Ulysses): what a rank keeps of a sequence is so much less. With `compile`
    torch.compile makes faster code of the blocks in the first step, which then takes a minute or more.
    `timeout_seconds` is how long a rank waits in a collective for the others before the run is ended. Before that, a
    rank that stays for `step_timeout_seconds` in one part of a step (data, update, a batch of validation, save, ...)
    ends it, with a message that says which rank holds the others up, and where; "auto" is half of `timeout_seconds`.
    """

    expert_parallel: Positive | Literal["auto"] = "auto"
    expert_chunks: Positive = 1
    sequence_parallel: Positive = 1
    activation_checkpointing: ActivationCheckpointing = ActivationCheckpointing()
    compile: bool = False
    timeout_seconds: PositiveFloat = 1800.0
    step_timeout_seconds: PositiveFloat | Literal["auto"] = "auto"

    def validate(self) -> None:
        """Compiled blocks have their sequences to themselves."""
        if self.compile and self.sequence_parallel > 1:
            raise SpecError(
                "compile",
                f"with sequence_parallel ({self.sequence_parallel}) attention waits for other ranks, which compiled "
                "blocks cannot; use false, or sequence_parallel 1",
            )

    @property
    def step_limit_seconds(self) -> float:
        """`step_timeout_seconds` as a number."""
        return self.timeout_seconds / 2 if self.step_timeout_seconds == "auto" else self.step_timeout_seconds
