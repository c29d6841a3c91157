from tests.launch import check, run_ranks


def test_the_mask_reaches_the_model_in_training_and_evaluation():
    check(run_ranks("tests.parallel.documents_ranks", 2))
