"""Metrics, curves, the loss guard, and what belongs to a run."""

import math
from dataclasses import replace
from types import SimpleNamespace

import pytest

from mosaic_dist.errors import UserError
from mosaic_dist.run_spec import Run, differences
from mosaic_dist.spec import SpecError, override
from mosaic_dist.train.metrics import MetricsFile, read_metrics
from mosaic_dist.train.plot import plot_loss, smooth
from mosaic_dist.train.reporting import FirstStep
from mosaic_dist.train.trainer import MAX_SKIPS_IN_A_ROW, HeldOutStream, NonfiniteGuard, Progress, Trainer, Validation
from recipes.t4_moe import run


def test_metrics_survive_a_cut_line_and_drop_what_lies_beyond(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "loss": 2.5}\n{"step": 2, "loss": 2.25}\n{"step": 3, "lo')
    assert [record["step"] for record in read_metrics(path)] == [1, 2]
    MetricsFile(path, step=1).write({"step": 2, "loss": 0.1 + 0.2})
    assert read_metrics(path) == [{"step": 1, "loss": 2.5}, {"step": 2, "loss": 0.1 + 0.2}]
    path.write_text('{"step": 1}\nrubbish\n{"step": 2}\n')
    with pytest.raises(ValueError, match=r"metrics\.jsonl:2: not a JSON record"):
        read_metrics(path)


def test_metrics_go_back_as_a_run_that_starts_again_does(tmp_path):
    path = tmp_path / "metrics.jsonl"
    file = MetricsFile(path, step=0)
    for step in (1, 2, 3):
        file.write({"step": step, "loss": 1.0})
    file.go_back(1)
    assert file.last_step == 1
    file.write({"step": 2, "loss": 2.0})
    assert read_metrics(path) == [{"step": 1, "loss": 1.0}, {"step": 2, "loss": 2.0}]


def test_smoothing_is_the_weighted_mean_of_the_past():
    values, half_life = [4.0, 2.0, math.nan, 8.0], 2.0
    weights = [0.5 ** (age / half_life) for age in (2, 1, 0)]
    expected = sum(w * v for w, v in zip(weights, (4.0, 2.0, 8.0), strict=True)) / sum(weights)
    got = smooth(values, half_life)
    assert got[0] == 4.0
    assert got[2] == got[1]
    assert got[3] == pytest.approx(expected)
    spans = [2, 1, 5, 3]  # the same as so many values each
    repeated = [value for value, span in zip(values, spans, strict=True) for _ in range(span)]
    assert smooth(values, half_life, spans)[::3] == pytest.approx([4.0, smooth(repeated, half_life)[-1]])


def test_the_curve_is_a_png(tmp_path):
    records = [{"step": i, "loss": 9 - i / 50} for i in range(1, 200)]
    records[99]["validation_loss"] = 7.5
    pictures = []
    for exact_match in ({}, {"validation_exact_match": 0.5}, {"validation_exact_match": 1.0}):
        plot_loss([*records[:99], records[99] | exact_match, *records[100:]], tmp_path / "loss.png", "t")
        pictures.append((tmp_path / "loss.png").read_bytes())
        assert pictures[-1].startswith(b"\x89PNG")
    assert len(set(pictures)) == 3


class Judge:
    """An engine that gives validation losses from a list."""

    def __init__(self, losses: list[float]):
        self.losses = iter(losses)

    def evaluate(self, batches: object) -> float:
        return next(self.losses)

    def exact_match(self, batches: object) -> float:
        return 0.25


class Rows(list):
    """Batches for each pass, as `ValidationBatches` gives them."""

    def __iter__(self):
        yield from list.__iter__(self)


def test_validation_keeps_the_best_and_stops_what_gains_nothing():
    judged = override(run, {"validate_every_steps": 500, "checkpoint.keep_best": 2, "early_stopping_patience": 2})
    trainer = Trainer(judged, Judge([3.0, 2.0, 2.5, 2.25]), None, Progress(), until_step=20_000)
    held_out = [HeldOutStream("", 1.0, Rows([]))]
    validation, seen = Validation(held_out, held_out), []
    while not trainer.is_ending:
        trainer.progress.step += 250
        validation.post_step(trainer, None)
        seen.append(trainer.validation_loss)
        assert trainer.validation_exact_match == (None if seen[-1] is None else 0.25)
    assert seen == [None, 3.0, None, 2.0, None, 2.5, None, 2.25]
    assert trainer.progress.best == [[2.0, 1000], [2.25, 2000]]
    assert trainer.progress.stopped_early


def test_each_batch_of_a_validation_is_a_part_of_the_step():
    """Or a long validation would look like a hang."""
    row, told = SimpleNamespace(inputs_BT=1, targets_BT=2, documents_BT=3), []
    judge = SimpleNamespace(evaluate=lambda batches: float(len(list(batches))))
    trainer = Trainer(override(run, {"validate_every_steps": 500}), judge, None, Progress(step=500), until_step=20_000)
    trainer.entered = lambda step, part: told.append((step, part))
    Validation([HeldOutStream("", 1.0, Rows(3 * [row]))]).post_step(trainer, None)
    assert trainer.validation_loss == 3.0
    assert told == 3 * [(500, "Validation")]


def test_due():
    trainer = Trainer(run, None, None, Progress(), until_step=10)
    found = []
    for step in range(1, 11):
        trainer.progress.step = step
        assert not trainer.is_due(0)
        found += [step] if trainer.is_due(4) else []
    assert found == [4, 8, 10]


def fake_trainer(scaled: bool) -> SimpleNamespace:
    return SimpleNamespace(
        engine=SimpleNamespace(loss_is_scaled=scaled),
        progress=SimpleNamespace(step=7),
        learning_rate=0.1,
        loader=SimpleNamespace(cursor=70),
    )


def result(loss: float, skipped: bool, rejected: bool = False) -> SimpleNamespace:
    norm = math.inf if skipped else 1.0
    return SimpleNamespace(loss=loss, auxiliary_loss=0.0, grad_norm=norm, skipped=skipped, rejected=rejected)


def test_the_guard_follows_its_policy():
    with pytest.raises(UserError, match=r"step 7: loss nan.*not finite.*sample 70"):
        NonfiniteGuard("stop").post_step(fake_trainer(False), result(math.nan, True))
    with pytest.raises(UserError, match="gradient norm inf"):
        NonfiniteGuard("stop").post_step(fake_trainer(False), result(2.0, True))
    NonfiniteGuard("stop").post_step(fake_trainer(True), result(2.0, True))  # fp16 seeks its loss scale
    NonfiniteGuard("stop").post_step(fake_trainer(False), result(2.0, True, rejected=True))  # a spike
    patient = NonfiniteGuard("skip")
    for _ in range(MAX_SKIPS_IN_A_ROW - 1):
        patient.post_step(fake_trainer(False), result(math.nan, True))
    with pytest.raises(UserError, match=f"{MAX_SKIPS_IN_A_ROW} times in a row"):
        patient.post_step(fake_trainer(False), result(math.nan, True))


def test_a_run_goes_to_yaml_and_back():
    assert Run.from_yaml(run.to_yaml()) == run


def test_what_belongs_to_the_cluster_may_change():
    moved = override(run, {"micro_batch_size": 2, "parallel.expert_parallel": 4, "data.path": "x", "precision": "fp32"})
    assert list(differences(run, moved)) == []
    mended = override(run, {"on_nonfinite_loss": "skip", "spikes.action": "rewind", "spikes.limit": 20})
    assert list(differences(run, mended)) == []
    other = override(run, {"optimizer.learning_rate": 1.0, "model.layers[1].ffn.top_k": 1, "init_from": "m"})
    found = list(differences(run, other))
    assert "optimizer.learning_rate: 0.001 there, 1.0 here" in found
    assert "init_from: '' there, 'm' here" in found
    deeper = replace(run, model=replace(run.model, layers=2 * run.model.layers))
    assert "model.layers: '4 layers' there, '8 layers' here" in list(differences(run, deeper))


@pytest.mark.parametrize(
    ("changes", "path"),
    [
        ({"batch_tokens": 100}, "batch_tokens"),
        ({"data.seq_len": 1024}, "data.seq_len"),
        ({"steps": 100}, "schedule.warmup_steps"),
        ({"on_nonfinite_loss": "ignore"}, "on_nonfinite_loss"),
        ({"spikes.action": "stop"}, "spikes.action"),
        ({"spikes.window_steps": 3}, "spikes.window_steps"),
        ({"spikes.action": "skip", "spikes.window_steps": 50_000}, "spikes.window_steps"),
        ({"spikes.action": "rewind", "checkpoint.every_steps": 50_000}, "checkpoint.every_steps"),
        ({"exact_match_samples": 2, "validate_every_steps": 0}, "exact_match_samples"),
        ({"early_stopping_patience": 2, "validate_every_steps": 0}, "early_stopping_patience"),
        ({"checkpoint.keep_best": 2, "validate_every_steps": 0}, "checkpoint.keep_best"),
    ],
)
def test_runs_that_cannot_be(changes, path):
    with pytest.raises(SpecError) as caught:
        override(run, changes)
    assert caught.value.path == path


def test_batches_are_dealt_out_evenly_or_refused():
    assert run.accumulation(2) * 2 * run.micro_batch_size * run.seq_len == run.batch_tokens
    with pytest.raises(SpecError, match="3 ranks take micro-batches of 8"):
        run.accumulation(3)


def test_the_first_step_tells_what_it_took(capsys):
    hook, trainer = FirstStep(), SimpleNamespace(step_seconds=41.6)
    for _ in range(2):
        hook.post_step(trainer, None)
    assert capsys.readouterr().err == "blocks are compiled: the first step took 42 s\n"
