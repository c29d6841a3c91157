"""The job scripts on a real SLURM: a run that is disturbed in every way ends as one that was not, bit for bit."""

import sys

import pytest

from tests.end_to_end.test_resume import story
from tests.slurm.cluster import wait_until
from tests.slurm.conftest import Job

pytestmark = pytest.mark.timeout(900)


@pytest.fixture(scope="module")
def undisturbed(cluster, dataset, tmp_path_factory) -> Job:
    """A run without a fault, on nodes that the doctor has examined; its first port was busy."""
    job = Job(cluster, tmp_path_factory.mktemp("undisturbed"), dataset)
    job.submit(options=("--hold",), DOCTOR="1", MASTER_PORT="23456")
    listener = cluster.on("node1", sys.executable, "-m", "http.server", "23456")
    cluster.run("scontrol", "release", job.number)
    job.wait_for_end()
    listener.kill()
    return job


def test_a_run_over_two_nodes(undisturbed):
    told = undisturbed.log()
    assert [record["step"] for record in story(undisturbed.output)] == list(range(1, 13))
    assert "2 nodes (node[1-2]) x 1 ranks, expert parallel 2" in told
    assert "port 23456 of node1 is busy" in told
    assert "meeting at  node1:23457" in told
    assert "done: step 12" in told
    logs = undisturbed.output / "slurm" / f"{undisturbed.number}.1"
    assert {path.name for path in logs.iterdir()} == {
        f"{kind}_{i}_node{i + 1}.log" for kind in ("doctor", "node") for i in (0, 1)
    }
    assert "2 ranks, expert parallel 2, ZeRO 2" in (logs / "node_0_node1.log").read_text()
    assert "exchange between nodes  slowest" in told


def test_preemption_and_time_limit(undisturbed, job):
    """Both are told by a signal; nothing is lost, and W&B goes on under the same id."""
    job.hold(4)
    job.submit("--logging.trackers", "[wandb]")
    job.wait_for_step(3)
    wandb_id = (job.output / "wandb_id").read_text()
    urgent = job.cluster.submit("--partition=high", "--nodes=3", "--output=/dev/null", "--wrap=sleep 1")
    job.wait_for_restart(1)
    assert "saved: step 4" in job.log()
    job.hold(8)
    job.wait_for_step(7)
    assert job.cluster.job(urgent)["JobState"] == "COMPLETED"
    job.cluster.run("scontrol", "update", f"jobid={job.number}", "timelimit=2")  # the signal is due 5 minutes before
    job.wait_for_restart(2)
    job.cluster.run("scontrol", "update", f"jobid={job.number}", "timelimit=20")
    assert "saved: step 8" in job.log()
    job.wait_for_end()
    assert story(job.output) == story(undisturbed.output)
    assert (job.output / "wandb_id").read_text() == wandb_id
    assert len(list((job.output / "wandb").glob(f"offline-run-*-{wandb_id}"))) == 3
    assert job.log().count("told to stop") == 2


@pytest.mark.slow
def test_power_loss_and_a_cut_cable(undisturbed, job):
    """The node with the batch shell and rank 0 loses its power; later the next such node its network.

    SLURM starts the job again. The ranks on the node without a network still hold the run folder, which they reach.
    """
    cluster = job.cluster
    job.hold(6)
    job.submit()
    job.wait_for_step(5)
    cluster.power_off("node1")
    job.wait_for_restart(1)
    assert "saved" not in job.log()
    job.hold(10)
    job.wait_for_step(9)
    assert "start 2, from step 4, 0 failures there" in job.log()
    assert cluster.job(job.number)["NodeList"] == "node[2-3]"
    cluster.power_on("node1")
    wait_until(lambda: cluster.idle() == ["node1"], 60, "node1")
    cluster.cut("node2")
    job.wait_for_restart(2)
    job.hold(0)
    job.wait_for_end()
    assert "start 3, from step 8, 0 failures there" in job.log()
    assert cluster.job(job.number)["NodeList"] == "node[1,3]"
    assert story(job.output) == story(undisturbed.output)
    (agent,) = (job.output / "slurm" / f"{job.number}.2").glob("node_*_node2.log")
    assert "[agent of node2] a newer start of this job runs elsewhere" in agent.read_text()
    cluster.mend("node2")
    wait_until(lambda: cluster.idle() == cluster.names, 60, "all nodes")
    assert job.state() == "COMPLETED"
