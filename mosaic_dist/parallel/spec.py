"""What a run may say about the cluster."""

from typing import Literal

from mosaic_dist.spec import Positive, PositiveFloat, Spec


class Parallel(Spec):
    """`expert_parallel` ranks share the experts of a layer; "auto": the most that divide them and fit in a node.

    `timeout_seconds` is how long a rank waits in a collective for the others before the run is ended.
    """

    expert_parallel: Positive | Literal["auto"] = "auto"
    timeout_seconds: PositiveFloat = 1800.0
