"""The coordinate check: slopes that are known, and a tiny model whose logits grow with the width unless it has muP."""

import math

import pytest

from mosaic_dist.cli import parse_words
from mosaic_dist.compare.coordinate_check import PARTS, Measured, at_width, coordinate_check, measure, verdict
from mosaic_dist.errors import UserError
from mosaic_dist.model import GQA, Block, MoE, MuP, RoPE, SwiGLU, Table, Transformer
from mosaic_dist.optim import AdamW
from mosaic_dist.plan.command import load_recipe
from mosaic_dist.run_spec import Run
from mosaic_dist.spec import override

WIDTHS = (32, 64, 128)
RUN = Run(
    name="tiny",
    model=Transformer(
        vocab_size=32,
        dim=32,
        max_seq_len=16,
        embedding=Table(multiplier=8.0),
        position=RoPE(),
        layers=(
            Block(attention=GQA(heads=4, kv_heads=2), ffn=SwiGLU(hidden_dim=64)),
            Block(attention=GQA(heads=4, kv_heads=2), ffn=MoE(expert=SwiGLU(hidden_dim=32), experts=4, top_k=2)),
        ),
        init=MuP(base={"dim": 32, "layers[0].ffn.hidden_dim": 64, "layers[1].ffn.expert.hidden_dim": 32}),
    ),
    data=load_recipe("recipes/sweeps/small.py").data,
    optimizer=AdamW(learning_rate=5e-3),
    steps=10,
    batch_tokens=64,
    micro_batch_size=4,
)


def grown(powers: dict[str, float]) -> Measured:
    """Sizes that go exactly with these powers of the width, from 1 on, at the start and after a step."""
    return Measured(WIDTHS, [{part: 2 * [(width / 32) ** powers[part]] for part in PARTS} for width in WIDTHS])


def test_slopes_are_powers_of_the_width():
    measured = grown({"embedding": 0.0, "attention": 0.5, "ffn": -1.0, "logits": 0.24})
    assert [measured.slope(part, 1) for part in PARTS] == pytest.approx([0.0, 0.5, -1.0, 0.24])
    told = verdict(measured, 1)
    assert "not flat: the change of attention goes with width^0.50, attention starts with width^0.50, " in told
    assert "the change of ffn goes with width^-1.00" in told
    assert "ffn starts" not in told  # what is smaller at the start may be so
    assert "logits" not in told
    assert "all changes are flat" in verdict(grown(dict.fromkeys(PARTS, 0.1)), 1)


def test_what_diverged_has_no_slope_and_is_not_flat():
    sizes = [{part: [1.0, size] for part in PARTS} for size in (1.0, math.inf, 1.0)]
    assert math.isnan(Measured(WIDTHS, sizes).slope("ffn", 1))
    assert "the change of ffn goes with width^nan" in verdict(Measured(WIDTHS, sizes), 1)


def test_the_base_is_widened_as_a_whole():
    narrow, wide = (at_width(RUN, width, "mup").model for width in (16, 128))
    assert (narrow.dim, narrow.layers[0].ffn.hidden_dim, narrow.layers[1].ffn.expert.hidden_dim) == (16, 32, 16)
    assert (wide.dim, wide.layers[0].ffn.hidden_dim, wide.layers[1].ffn.expert.hidden_dim) == (128, 256, 128)
    assert wide.init == RUN.model.init
    assert at_width(RUN, 128, "gpt2").model.init.type_name == "gpt2"


def test_changes_keep_their_size_with_mup_and_grow_without():
    """Dense and with experts; the parts of both blocks count as much."""
    mup, standard = (
        Measured(WIDTHS, [measure(at_width(RUN, width, init), 0, 4) for width in WIDTHS]) for init in ("mup", "gpt2")
    )
    assert "all changes are flat" in verdict(mup, 4)
    assert standard.slope("logits", 4) > 0.4
    assert standard.slope("ffn", 4) > 1.0
    assert mup.sizes[0] == standard.sizes[0]  # at the base's own width
    assert all(size > 0 for part in PARTS for size in mup.line(part, 4))


def test_the_command_draws_and_tells(tmp_path, capsys):
    picture = tmp_path / "check.png"
    small = {"vocab_size": 32, "dim": 32, "max_seq_len": 16, "layers.ffn.hidden_dim": 32}
    flags = {f"model.{name}": value for name, value in small.items()} | {"batch_tokens": 64, "micro_batch_size": 4}
    base = {"type": "mup", "base": {"dim": 16, "layers.ffn.hidden_dim": 16}}
    coordinate_check(
        "recipes/sweeps/small.py", widths=(16, 32), output=str(picture), steps=2, **flags, **{"model.init": base}
    )
    assert picture.read_bytes().startswith(b"\x89PNG")
    told = capsys.readouterr().out
    assert [line.split()[0] for line in told.splitlines()] == ["~", *PARTS, "muP:", str(picture)]


@pytest.mark.parametrize(
    ("widths", "flags", "message"),
    [
        ((64,), {}, "give two at least"),
        ((64, 128), {}, "does not say what widens .* --model.init"),
        ((64, 128), {"model.init": {"type": "mup", "base": {"layers.ffn.hidden_dim": 8}}}, "does not name dim"),
        (
            (64, 100),
            {"model.init": {"type": "mup", "base": {"dim": 64, "layers.ffn.hidden_dim": 8}}},
            r"--widths 100: layers\.ffn\.hidden_dim is 8 at a width of 64, which cannot be scaled",
        ),
        (
            (64, 66),
            {"model.init": {"type": "mup", "base": {"dim": 64}}},
            r"run of width 66: .*4 heads must divide the model's width \(66\)",
        ),
    ],
)
def test_words_that_do_not_fit(widths, flags, message):
    with pytest.raises(UserError, match=message):
        coordinate_check("recipes/sweeps/small.py", widths=widths, **flags)


def test_a_recipe_is_needed():
    with pytest.raises(UserError, match="give one recipe"):
        coordinate_check(widths=(64, 128))


def test_flags_of_the_command_line_name_the_base():
    """As the README writes them: paths with dots in quotes."""
    word = "{type: mup, base: {dim: 64, 'layers.ffn.hidden_dim': 192}}"
    _, flags = parse_words([f"--model.init={word}"])
    assert override(RUN, {"model.init": flags["model.init"]}).model.init == MuP(
        base={"dim": 64, "layers.ffn.hidden_dim": 192}
    )
