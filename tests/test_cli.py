"""Command lines: words are checked before anything runs."""

from typing import Any, Literal

import pytest

from mosaic_dist.cli import run_command, run_subcommand
from mosaic_dist.errors import UserError
from mosaic_dist.model import SwiGLU
from mosaic_dist.spec import Positive, override
from recipes.t4_moe import run

calls: list[Any] = []


def tool(path: str, count: Positive = 3, mode: Literal["a", "b"] = "a", flag: bool = False) -> str:
    """Do something.

    More text.
    """
    calls.append((path, count, mode, flag))
    if path == "bad":
        raise UserError("the path is bad")
    if path == "endless":
        raise KeyboardInterrupt
    return path


def optional(name: str | None = "x") -> str | None:
    """Take a name or none."""
    return name


def gather(*more: str, **rest: Any) -> tuple[Any, ...]:
    """Take everything."""
    return more, rest


@pytest.fixture(autouse=True)
def _fresh():
    calls.clear()


def test_words_become_typed_arguments():
    assert run_command(tool, "tool", ["--path", "x", "--count=4", "--flag"]) == "x"
    assert calls == [("x", 4, "a", True)]
    assert run_command(gather, "gather", ["a", "b", "--model.layers.ffn.top_k", "1", "--model.norm=layernorm"]) == (
        ("a", "b"),
        {"model.layers.ffn.top_k": "1", "model.norm": "layernorm"},
    )


WORDS = ["e #3", "hello # world", "123", "2026", "1e-3", "True", "a,b", "[a, b]", "{x: 1}", "'quoted'", "-", "", "a=b"]


@pytest.mark.parametrize("word", WORDS)
@pytest.mark.parametrize("form", ["apart", "joined"])
def test_text_is_taken_as_it_stands(word, form):
    words = ["--path", word] if form == "apart" else [f"--path={word}"]
    assert run_command(tool, "tool", words) == word
    assert run_command(gather, "gather", [word, "b"]) == ((word, "b"), {})
    _, changes = run_command(gather, "gather", [f"--logging.project={word}", "--steps", "30000", "--name", word])
    changed = override(run, changes)
    assert (changed.logging.project, changed.name, changed.steps) == (word, word, 30_000)


def test_other_fields_are_read_by_their_types():
    words = "--optimizer.learning_rate 1e-3 --data.shuffle=False --logging.trackers [wandb] --batch_ramp None".split()
    _, changes = run_command(gather, "gather", [*words, "--model.layers.ffn", "{type: swiglu, hidden_dim: 64}"])
    changed = override(run, changes)
    assert (changed.optimizer.learning_rate, changed.data.shuffle, changed.logging.trackers) == (
        1e-3,
        False,
        ("wandb",),
    )
    assert (changed.batch_ramp, changed.model.layers[0].ffn) == (None, SwiGLU(hidden_dim=64))
    assert run_command(optional, "optional", ["--name", "None"]) is None


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--path", "x", "--cuont", "4"], "unknown flag --cuont; did you mean 'count'"),
        (["--path", "x", "--count", "0"], "--count: 0 must be at least 1"),
        (["--path", "x", "--count", "many"], "--count: expected int, got 'many'"),
        (["--path", "x", "--mode", "c"], "--mode: 'c' is not one of 'a', 'b'"),
        (["--count", "4"], "--path is needed"),
        (["x"], "unexpected word 'x'"),
        (["--path", "--count", "4"], "--path: expected str, got True (bool)"),
    ],
)
def test_wrong_words_are_one_message_and_nothing_runs(words, says, capsys):
    with pytest.raises(SystemExit) as ended:
        run_command(tool, "tool", words)
    assert ended.value.code == 2
    printed = capsys.readouterr()
    assert says in printed.err
    assert printed.err.count("error:") == 1
    assert calls == []


def test_user_errors_end_with_their_message_only(capsys):
    with pytest.raises(SystemExit) as ended:
        run_command(tool, "tool", ["--path", "bad"])
    assert ended.value.code == 2
    assert capsys.readouterr().err == "error: the path is bad\n"


def test_ctrl_c_is_one_line(capsys):
    with pytest.raises(SystemExit) as ended:
        run_command(tool, "tool", ["--path", "endless"])
    assert ended.value.code == 130
    assert capsys.readouterr().err == "interrupted\n"


def test_help_names_every_flag(capsys):
    with pytest.raises(SystemExit) as ended:
        run_command(tool, "tool", ["--help"])
    assert ended.value.code == 0
    text = capsys.readouterr().out
    assert all(word in text for word in ("--path", "--count", "--mode", "--flag", "Do something."))
    assert calls == []


def test_subcommands(capsys):
    commands = {"tool": "tests.test_cli:tool", "absent": "tests.absent:nothing"}  # which only calling it would tell
    assert run_subcommand(commands, "program", ["tool", "--path", "y"]) == "y"
    with pytest.raises(SystemExit) as ended:
        run_subcommand(commands, "program", ["tol"])
    assert ended.value.code == 2
    assert "did you mean 'tool'" in capsys.readouterr().err
    with pytest.raises(SystemExit) as ended:
        run_subcommand({"tool": "tests.test_cli:tool"}, "program", ["--help"])
    assert ended.value.code == 0
    assert "Do something." in capsys.readouterr().out
