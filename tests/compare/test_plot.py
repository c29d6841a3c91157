"""The picture of curves: which panels there are, what their lines say, and where it is written."""

import pytest

from mosaic_dist.__main__ import main as run_main
from mosaic_dist.compare import curves
from mosaic_dist.compare.plot import plot
from mosaic_dist.errors import UserError
from mosaic_dist.train.plot import smooth
from tests.compare.folders import experts, record, write_run

LOSSES = [6.0 - 0.2 * i + (i % 2) for i in range(12)]


@pytest.fixture
def figures(monkeypatch):
    """The figures that are drawn; they are written, too."""
    found, publish = [], curves.publish
    monkeypatch.setattr(curves, "publish", lambda figure, path: (found.append(figure), publish(figure, path)))
    return found


def panels(figure):
    return {axes.get_title(): axes for axes in figure.axes if axes.get_title()}


def line(axes, label):
    (found,) = [line for line in axes.get_lines() if line.get_label() == label]
    return list(found.get_xdata()), list(found.get_ydata())


def test_one_run(tmp_path, figures, capsys):
    records = [record(i, loss, expert_max_over_mean=1.5) for i, loss in enumerate(LOSSES, 1)]
    records[5] |= {"validation_loss": 4.5, "experts": experts(2, 3)}
    run = write_run(tmp_path / "run", records)
    plot(str(run))
    assert (run / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert f"{run / 'curves.png'}: run to step 12" in capsys.readouterr().out
    found = panels(figures[0])
    assert set(found) == {"loss", *(panel.title for panel in curves.FIGURES)}
    steps = list(range(1, 13))
    assert line(found["loss"], "loss") == (steps, LOSSES)
    assert line(found["loss"], "loss, EMA") == (steps, smooth(LOSSES, 2.0))
    assert line(found["loss"], "validation") == ([6], [4.5])
    (rate,) = found["learning rate"].get_lines()
    assert list(rate.get_ydata()) == [1e-3 / i for i in steps]


def test_many_runs_along_time(tmp_path, figures):
    """Colours and names; a run that is half as fast has its points twice as far out."""
    for name, seconds in (("fast", 60.0), ("slow", 120.0)):
        write_run(tmp_path / name, [record(i, loss, seconds) for i, loss in enumerate(LOSSES, 1)])
    plot(str(tmp_path), output=str(tmp_path / "new" / "both.png"), x="time")
    assert (tmp_path / "new" / "both.png").exists()
    (figure,) = figures
    loss = panels(figure)["loss"]
    assert loss.get_xlabel() == "minutes of training steps"
    ends = {
        tuple(line.get_color()): line.get_xdata()[-1] for line in loss.get_lines() if line.get_label() == "loss, EMA"
    }
    assert sorted(ends.values()) == [12.0, 24.0]
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == ["fast", "slow"]
    assert {tuple(handle.get_color()) for handle in legend.legend_handles} == set(ends)


def test_a_mixture_has_panels_of_its_streams(tmp_path, figures):
    shares = {"epoch/web": 0.5, "epoch/code": 0.25}
    records = [record(i, loss, **{key: i * share for key, share in shares.items()}) for i, loss in enumerate(LOSSES, 1)]
    records[3] |= {"validation_loss": 3.0, "validation_loss/web": 2.5, "validation_loss/code": 3.5}
    records[3] |= {"validation_exact_match": 0.5}
    plot(str(write_run(tmp_path / "run", records)))
    found = panels(figures[0])
    assert {"epochs of each stream", "validation loss of each stream"} < set(found)
    texts = [text.get_text() for text in found["epochs of each stream"].get_legend().get_texts()]
    assert texts == ["code", "web"]
    ends = [line.get_ydata()[-1] for line in found["epochs of each stream"].get_lines() if len(line.get_xdata())]
    assert ends == [12 * 0.25, 12 * 0.5]
    assert any("to the letter" in title for title in found)


def test_many_more_runs_than_colours(tmp_path, figures):
    paths = [str(write_run(tmp_path / f"run{i}", [record(1, 2.0), record(2, 1.5)])) for i in range(12)]
    plot(*paths, output=str(tmp_path / "all.png"))
    colours = {tuple(handle.get_color()) for handle in figures[0].legends[0].legend_handles}
    assert len(colours) == 12


def test_losses_that_are_not_finite_are_drawn_around(tmp_path):
    records = [record(1, 2.0), record(2, float("nan"), grad_norm=float("inf")), record(3, 1.5)]
    plot(str(write_run(tmp_path / "run", records)))


def test_what_is_refused(tmp_path, monkeypatch, capsys):
    with pytest.raises(UserError, match="give a run folder"):
        plot()
    run = write_run(tmp_path / "run", [record(1, 2.0)])
    with pytest.raises(UserError, match="is a folder; name a file"):
        plot(str(run), output=str(tmp_path))
    monkeypatch.setattr("sys.argv", ["mosaic_dist", "plot", str(run), "--x", "days"])
    with pytest.raises(SystemExit) as ended:
        run_main()
    assert ended.value.code == 2
    assert "'days' is not one of 'step', 'tokens', 'time', 'flops'" in capsys.readouterr().err
