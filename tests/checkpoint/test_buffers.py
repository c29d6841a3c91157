"""State beside the weights is part of a checkpoint."""

from tests.launch import check, run_ranks


def test_a_routers_correction_is_saved_and_restored(tmp_path):
    check(run_ranks("tests.checkpoint.buffer_ranks", 2, str(tmp_path)))
