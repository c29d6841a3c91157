"""The layouts that test_measured measures, each with its plan."""

from functools import cache
from typing import Any, NamedTuple

from mosaic_dist.data import Data
from mosaic_dist.hardware import Device
from mosaic_dist.model import ActivationCheckpointing
from mosaic_dist.parallel import Parallel
from mosaic_dist.plan.plan import Plan, make_plan
from mosaic_dist.run_spec import Run
from tests.parallel.mixed import BATCH, LENGTH, MODEL, OPTIMIZERS, Case

RANKS = 4
HERE = Device(
    name="CPU",
    kind="cpu",
    fp32=1e11,
    bf16=1e11,
    reachable=1.0,
    memory_bytes=1e9,
    memory_bytes_per_second=1e10,
    node_bytes_per_second=1e10,
    network_bytes_per_second=1e9,
    source="nobody measured it",
)


class Measured(NamedTuple):
    """A layout of the engine, and ZeRO's settings beside."""

    case: Case
    activation_checkpointing: str = "none"
    reuse_distance: int = 1_000_000_000
    persistence: int = 0
    shared: int = 1
    """Ranks to a sequence."""

    @property
    def name(self) -> str:
        """Of all that is in it."""
        return f"{self.case}_{self.activation_checkpointing}_{self.reuse_distance}_{self.persistence}_{self.shared}"

    @property
    def zero(self) -> dict[str, Any]:
        """Settings that are not DeepSpeed's own; the bucket is a third of the model."""
        return {
            "reduce_bucket_size": 4000,
            "stage3_max_reuse_distance": self.reuse_distance,
            "stage3_prefetch_bucket_size": min(self.reuse_distance, 50_000_000),
            "stage3_param_persistence_threshold": self.persistence,
        }

    @property
    def parallel(self) -> Parallel:
        """The run's."""
        return Parallel(
            expert_parallel=self.case.degree,
            sequence_parallel=self.shared,
            activation_checkpointing=ActivationCheckpointing(parts=self.activation_checkpointing),
        )


CASES = [
    *(Measured(Case(RANKS, stage, degree, 2, "fp32")) for stage in range(4) for degree in (1, 2, 4)),
    *(Measured(Case(RANKS, stage, 2, 1, "fp32")) for stage in (1, 2)),
    *(Measured(Case(RANKS, stage, 2, 2, "bf16")) for stage in (1, 2, 3)),
    *(Measured(Case(RANKS, 1, 2, 2, "fp32"), parts) for parts in ("full", "moe")),
    Measured(Case(RANKS, 3, 2, 2, "fp32"), reuse_distance=0),
    Measured(Case(RANKS, 3, 2, 2, "fp32"), persistence=300),
    Measured(Case(RANKS, 1, 4, 2, "fp32"), shared=2),
    Measured(Case(RANKS, 3, 2, 2, "fp32"), "full", shared=2),
    *(Measured(Case(RANKS, stage, 2, 2, "fp32", "muon")) for stage in range(4)),
]
PROFILED = [*(Measured(Case(RANKS, stage, 2, 2, "fp32")) for stage in range(4))]
"""Those whose allocations are counted too, which takes seconds each."""


@cache
def plan_of(measured: Measured) -> Plan:
    """The plan of a layout, all ranks in one node."""
    case = measured.case
    run = Run(
        name="mixed",
        model=MODEL,
        data=Data(seq_len=LENGTH),
        optimizer=OPTIMIZERS[case.optimizer],
        steps=1,
        batch_tokens=BATCH * LENGTH,
        micro_batch_size=BATCH * measured.shared // RANKS // case.accumulation,
        precision=case.precision,
        parallel=measured.parallel,
    )
    return make_plan(run, {"zero_optimization": measured.zero | {"stage": case.stage}}, HERE, 1, RANKS)
