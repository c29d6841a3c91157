"""What a run tells of its experts, against counting by hand; its interval, its names for trackers, its picture."""

import json
import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from matplotlib import pyplot

from mosaic_dist.data import Data
from mosaic_dist.data.stream import Loader
from mosaic_dist.spec import override
from mosaic_dist.train.expert_plot import CURVE_POINTS, HEAT_RECORDS, PANELS, ExpertHistory, condense, plot_experts
from mosaic_dist.train.experts import loads_by_layer
from mosaic_dist.train.folder import RunFolder
from mosaic_dist.train.metrics import read_metrics
from mosaic_dist.train.reporting import Metrics, Plots, Speed
from mosaic_dist.train.trainer import Progress
from tests.end_to_end.conftest import python
from tests.launch import check, run_ranks
from tests.train.expert_run import RANKS, RATE, run

LAYERS = {"layers.1": 4, "layers.2": 8}


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> tuple[Path, Path]:
    """The dataset, and a run on two ranks that was stopped after step 2 and went on."""
    data, output = tmp_path_factory.mktemp("experts") / "data", tmp_path_factory.mktemp("experts") / "run"
    python("-m", "data_prep.arithmetic", "--output", data, "--samples", "60", "--high", "9", "--seq_len", "16",
           "--validation_fraction", "0.2")  # fmt: skip
    words = ("--data", str(data), "--output", str(output))
    check(run_ranks("tests.train.expert_run", RANKS, *words, "--stop_at_step", "2"))
    assert (output / "experts.png").read_bytes().startswith(b"\x89PNG")
    (output / "experts.png").unlink()
    check(run_ranks("tests.train.expert_run", RANKS, *words))
    return data, output


def by_hand(logits: list[list[float]], top_k: int, places: float) -> dict:
    """The figures of one rank's routing, token by token; sigmoid scores have the order of their logits."""
    experts = len(logits[0])
    figures = {"load": [0] * experts, "entropy": 0.0, "z": 0.0, "dropped": 0, "probs": [0.0] * experts}
    for row in logits:
        for e in sorted(range(experts), key=lambda e: -row[e])[:top_k]:
            figures["dropped"] += figures["load"][e] >= places
            figures["load"][e] += 1
        weights = [math.exp(x) if top_k == 1 else 1 / (1 + math.exp(-x)) for x in row]
        probs = [weight / sum(weights) for weight in weights]
        figures["probs"] = [total + p / len(logits) for total, p in zip(figures["probs"], probs, strict=True)]
        figures["entropy"] -= sum(p * math.log(p) for p in probs) / len(logits)
        figures["z"] += math.log(sum(math.exp(x) for x in row)) ** 2 / len(logits)
    shares = [load / len(logits) / top_k for load in figures["load"]]
    figures["balance"] = experts * sum(f * p for f, p in zip(shares, figures["probs"], strict=True))
    return figures


def test_the_first_step_is_what_one_counts_by_hand(folders):
    data, output = folders
    settings = Data(path=str(data), workers=1)
    loader = Loader(settings, settings.load(), seq_len=16, global_batch=8, rank=0, world_size=1, seed=run.seed)
    model, seen = run.model.build_initialized(run.seed), {name: [] for name in LAYERS}
    for name in LAYERS:
        router = model.get_submodule(f"{name}.ffn.router")
        router.register_forward_pre_hook(
            lambda module, inputs, name=name: seen[name].append((inputs[0] @ module.weight.T).tolist())
        )
    for inputs_BT in next(iter(loader)).inputs_BT.chunk(RANKS):
        with torch.no_grad():
            model(inputs_BT)
    told = read_metrics(output / "metrics.jsonl")[0]
    assert list(told["experts"]) == list(LAYERS)
    for (name, experts), top_k, places in zip(LAYERS.items(), (1, 2), (64 / 4, math.inf), strict=True):
        ranks, got = [by_hand(logits, top_k, places) for logits in seen[name]], told["experts"][name]
        assert [len(logits) for logits in seen[name]] == [64] * RANKS
        load = [sum(counts) for counts in zip(*(rank["load"] for rank in ranks), strict=True)]
        assert got["load"] == load
        assert len(load) == experts
        assert got["max_over_mean"] == pytest.approx(max(load) * experts / sum(load))
        assert got["dead"] == sum(count == 0 for count in load) / experts
        for measure in ("entropy", "z", "balance"):
            assert got[measure] == pytest.approx(sum(rank[measure] for rank in ranks) / RANKS, rel=1e-4), measure
        assert got["drop_rate"] == pytest.approx(sum(rank["dropped"] for rank in ranks) / (64 * top_k * RANKS))
    first, second = told["experts"].values()
    assert first["drop_rate"] > 0 == second["drop_rate"]
    even = sum(second["load"]) / 8
    moves = [RATE * ((count < even) - (count > even)) for count in second["load"]]
    assert second["expert_bias"] == pytest.approx([min(moves), max(moves)])
    assert "expert_bias" not in first
    assert told["expert_max_over_mean"] == max(first["max_over_mean"], second["max_over_mean"])


def test_a_run_that_goes_on_appends_and_draws_again(folders):
    records = read_metrics(folders[1] / "metrics.jsonl")
    assert [record["step"] for record in records if "experts" in record] == [1, 2, 3, 4, 5]
    corrections = [record["experts"]["layers.2"]["expert_bias"] for record in records]
    assert corrections[1][1] <= corrections[2][1] + RATE + 1e-7  # the buffer went on, too
    assert max(high for _, high in corrections) > 1.5 * RATE
    picture = (folders[1] / "experts.png").read_bytes()
    width, height = size_of(picture)
    assert picture.endswith(b"IEND\xaeB`\x82")
    assert 1000 < width < 2000
    assert 600 < height < 2000


def size_of(png: bytes) -> tuple[int, int]:
    """Width and height, from the header."""
    assert png.startswith(b"\x89PNG")
    return int.from_bytes(png[16:20], "big"), int.from_bytes(png[20:24], "big")


class Listener:
    """A tracker that remembers."""

    def __init__(self) -> None:
        self.told = {}

    def write(self, step, values, loads) -> None:
        self.told[step] = (values, loads)


ROUTER = torch.tensor([[1.5, 9.0, 0.5, 0.25], [1.0, 4.0, 2.0, 0.0]])
LOAD = torch.tensor([[9, 0, 3, 4, 0, 0, 0, 0], [4, 4, 4, 4, 4, 4, 8, 0]])


def take_steps(tmp_path: Path, steps: range, validated: int = 0, **logging: int) -> Listener:
    """Let the hooks see `steps`, as a start of a run; one of them is validated."""
    experiment = override(run, {f"logging.{name}": value for name, value in logging.items()})
    listener, model = Listener(), experiment.model.build()
    model.layers[2].ffn.router.expert_bias += torch.arange(8) / 8
    trainer = SimpleNamespace(
        run=experiment,
        engine=SimpleNamespace(mixtures=[model.layers[1].ffn, model.layers[2].ffn]),
        learning_rate=1e-2, step_seconds=1.0, data_seconds=0.0, validation_exact_match=None,
        validation_losses={}, save_told={}, loader=SimpleNamespace(epochs={"": 0.5}),
    )  # fmt: skip
    result = SimpleNamespace(
        loss=2.0, auxiliary_loss=0.0, grad_norm=1.0, skipped=False, rejected=False, tokens=128, expert_load=LOAD,
        router=ROUTER,
    )  # fmt: skip
    hooks = (
        Metrics(RunFolder(tmp_path), steps.start - 1, [listener], Speed(1.0, 1.0)),
        Plots(RunFolder(tmp_path)),
    )
    for step in steps:
        trainer.progress = Progress(step=step, tokens=128 * step)
        trainer.is_ending = step == steps[-1]
        trainer.is_due = lambda every, step=step: every > 0 and (step % every == 0 or step == steps[-1])
        trainer.validation_loss = 2.0 if step == validated else None
        for hook in hooks:
            hook.post_step(trainer, result)
    return listener


def steps_with_experts(folder: Path) -> list[int]:
    return [record["step"] for record in read_metrics(folder / "metrics.jsonl") if "experts" in record]


@pytest.mark.parametrize(
    ("every", "experts", "validated", "expected"),
    [
        (1, 10, 0, [10, 20, 25]),
        (3, 10, 0, [12, 21, 25]),
        (3, 10, 11, [11, 21, 25]),
        (10, 4, 0, [10, 20, 25]),
        (1, 0, 0, []),
    ],
)
def test_the_interval(tmp_path, every, experts, validated, expected):
    take_steps(tmp_path, range(1, 26), validated, every_steps=every, experts_every_steps=experts)
    assert steps_with_experts(tmp_path) == expected
    assert (tmp_path / "experts.png").exists() == bool(expected)
    assert (tmp_path / "loss.png").exists()


def test_the_interval_of_a_run_that_goes_on(tmp_path):
    take_steps(tmp_path, range(1, 15), experts_every_steps=10)
    take_steps(tmp_path, range(13, 22), experts_every_steps=10)  # from a checkpoint at 12
    assert steps_with_experts(tmp_path) == [10, 20, 21]
    assert [record["step"] for record in read_metrics(tmp_path / "metrics.jsonl")] == list(range(1, 22))


def test_trackers_get_flat_names_and_the_loads_apart(tmp_path):
    values, loads = take_steps(tmp_path, range(1, 2)).told[1]
    assert loads == {"experts/layers.1/load": [9, 0, 3, 4], "experts/layers.2/load": [4, 4, 4, 4, 4, 4, 8, 0]}
    assert {name: value for name, value in values.items() if name.startswith("experts/")} == {
        "experts/layers.1/max_over_mean": 9 / 4,
        "experts/layers.1/dead": 1 / 4,
        "experts/layers.1/balance": 1.5,
        "experts/layers.1/z": 9.0,
        "experts/layers.1/entropy": 0.5,
        "experts/layers.1/drop_rate": 0.25,
        "experts/layers.2/max_over_mean": 2.0,
        "experts/layers.2/dead": 1 / 8,
        "experts/layers.2/balance": 1.0,
        "experts/layers.2/z": 4.0,
        "experts/layers.2/entropy": 2.0,
        "experts/layers.2/drop_rate": 0.0,
        "experts/layers.2/expert_bias_min": 0.0,
        "experts/layers.2/expert_bias_max": 7 / 8,
    }
    assert values["expert_max_over_mean"] == 9 / 4
    assert values["loss"] == 2.0
    assert "step" not in values


def test_a_model_without_experts_tells_nothing_of_them(tmp_path):
    dense = replace(run.model, layers=run.model.layers[:1])
    assert loads_by_layer(dense, torch.zeros(0, 0, dtype=torch.int64)) == {}
    (tmp_path / "metrics.jsonl").write_text(json.dumps({"step": 1, "loss": 2.0}) + "\n")
    Plots(RunFolder(tmp_path)).post_step(SimpleNamespace(is_ending=True, run=run), None)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["loss.png", "metrics.jsonl"]


def drawn(monkeypatch, history: ExpertHistory):
    """The figure that would be written."""
    figures = []
    monkeypatch.setattr("mosaic_dist.train.expert_plot.publish", lambda figure, path: figures.append(figure))
    plot_experts(history, Path("unused"), "t")
    pyplot.close(figures[0])
    return figures[0]


def history_of(records: int, layers: int = 2) -> ExpertHistory:
    """The first layer has an expert that is dead at first, and the second has two experts fewer."""
    history = ExpertHistory()
    for i in range(records):
        figures = {"max_over_mean": 2.0, "dead": 0.25, "entropy": 1.0, "drop_rate": 0.0, "balance": 1.0, "z": i % 2}
        loads = [[5, 5, i, 10], *([[6, 2]] * (layers - 1))]
        history.add(10 * (i + 1), {f"layers.{n}": figures | {"load": load} for n, load in enumerate(loads)})
        history.add(10 * (i + 1) + 5, {})
    return history


@pytest.mark.parametrize(("records", "layers"), [(1, 1), (2 * HEAT_RECORDS + 1, 2), (3, 12)])
def test_the_picture_shows_the_figures(monkeypatch, records, layers):
    figure = drawn(monkeypatch, history_of(records, layers))
    axes = {axes.get_title(): axes for axes in figure.get_axes()}
    heat = next(axes[title] for title in axes if title.startswith("choices"))
    last = list(range(records))[-HEAT_RECORDS:]
    assert f"the last {len(last)} logged records" in heat.get_title()
    assert f"steps {10 * (last[0] + 1)} to {10 * records})" in heat.get_title()
    total = sum(last) + 20 * len(last)
    cells = heat.get_images()[0].get_array().filled(math.nan).tolist()
    expected = [20 * len(last) / total, 20 * len(last) / total, 4 * sum(last) / total, 40 * len(last) / total]
    assert cells[0] == pytest.approx(expected)
    assert cells[1:] == [pytest.approx([1.5, 0.5, math.nan, math.nan], nan_ok=True)] * (layers - 1)
    black = heat.get_images()[1].get_array().mask.tolist()
    assert [e for e, hidden in enumerate(black[0]) if not hidden] == ([2] if records == 1 else [])
    assert all(map(all, black[1:]))
    assert [label.get_text() for label in heat.get_yticklabels()] == [f"layers.{n}" for n in range(layers)]
    assert "expert bias, lowest and highest" not in axes  # none of the layers has one
    for panel in PANELS.keys() & axes.keys():
        assert len(axes[panel].lines) == layers, panel
    entropy = axes["router entropy / ln E"].lines
    assert entropy[0].get_ydata().tolist() == pytest.approx([1 / math.log(4)] * records)
    assert entropy[-1].get_ydata()[0] == pytest.approx(1 / math.log(4 if layers == 1 else 2))
    assert entropy[0].get_xdata().tolist() == [10 * (i + 1) for i in range(records)]


def test_a_long_history_is_drawn_as_means_of_neighbours(monkeypatch):
    assert condense([1.0, 3.0]).tolist() == [1.0, 3.0]
    assert condense([[0.0, 1.0]] * 3).tolist() == [[0.0, 1.0]] * 3
    figure = drawn(monkeypatch, history_of(2 * CURVE_POINTS))
    z_loss = next(axes for axes in figure.get_axes() if axes.get_title().startswith("z-loss")).lines[0]
    assert z_loss.get_ydata().tolist() == [0.5] * CURVE_POINTS
    assert z_loss.get_xdata().tolist() == [10 * (2 * i + 1.5) for i in range(CURVE_POINTS)]
