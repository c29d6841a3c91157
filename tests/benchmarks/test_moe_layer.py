"""The benchmark of one mixture-of-experts layer: its peers compute what ours does."""

import json
import subprocess
import sys

import pytest

pytest.importorskip("transformers")

from tests.launch import ROOT, clean_environment

RING = """
import json, deepspeed, torch
from benchmarks.moe_layer import Size, contenders, difference
from mosaic_dist.parallel import join_world, leave_world
join_world(60)
deepspeed.init_distributed(dist_init_required=False)
ring = contenders(Size(S=96, D=32, F=48, E=6, K=2), torch.device("cpu"), torch.float32)
print(json.dumps({name: difference(ring, name) for name in ring if ring[name].parameters}))
leave_world()
"""


def test_peers_compute_what_ours_does():
    """Outputs and input gradients; a layer with a capacity drops tokens, so its results are others."""
    command = [sys.executable, "-c", RING]
    done = subprocess.run(command, cwd=ROOT, env=clean_environment(), capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-4000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found.keys() == {"ours", "hf", "autoep", "deepspeed", "deepspeed_drop"}
    assert found.pop("deepspeed_drop") > 0.01  # so a difference is seen where there is one
    assert max(found.values()) < 1e-5, found
