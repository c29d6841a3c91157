"""Specs: round trips without loss, and every kind of mistake refused with its path."""

import dataclasses
from typing import Literal

import pytest

from mosaic_dist.model import MHA, Block, Factored, LayerNorm, MoE, RMSNorm, SwiGLU, Transformer
from mosaic_dist.spec import Positive, Spec, SpecError, UnitInterval, fields, kinds, leaves, override


class Colour(Spec):
    pass


class Red(Colour, type="red"):
    depth: Positive = 3


class Green(Colour, type="green"):
    depth: Positive = 5
    hue: UnitInterval = 0.5


class Palette(Spec):
    colour: Colour
    colours: tuple[Colour, ...] = ()
    size: Positive | Literal["auto"] = "auto"
    title: str | None = None
    weights: dict[str, float] = dataclasses.field(default_factory=dict)


DENSE = Block(attention=MHA(heads=2), ffn=SwiGLU(hidden_dim=16))
SPARSE = Block(attention=MHA(heads=2), ffn=MoE(expert=SwiGLU(hidden_dim=16), experts=4))
MODEL = Transformer(
    vocab_size=32, dim=8, max_seq_len=16, embedding=Factored(rank=4), layers=3 * (DENSE, SPARSE) + (DENSE,)
)


def test_round_trips_lose_nothing():
    palette = Palette(colour=Red(), colours=(Green(hue=1), Red(depth=1)), size=4, weights={"a": 1e-7, "b": 2.0})
    for spec in (palette, MODEL):
        assert type(spec).from_dict(spec.to_dict()) == spec
        assert type(spec).from_yaml(spec.to_yaml()) == spec


def test_yaml_folds_repeated_blocks():
    text = MODEL.to_yaml()
    assert text.count("type: moe") == 1
    assert "repeat: 3" in text
    assert len(Transformer.from_yaml(text).layers) == 7


def test_specs_are_frozen_and_keyword_only():
    with pytest.raises(dataclasses.FrozenInstanceError):
        MODEL.dim = 9  # type: ignore[misc]
    with pytest.raises(TypeError):
        Red(3)  # type: ignore[misc]


@pytest.mark.parametrize(
    ("data", "path", "says"),
    [
        ({"colour": "red", "sise": 3}, "sise", "did you mean 'size'"),
        ({"colour": {"type": "rad"}}, "colour.type", "did you mean 'red'"),
        ({"colour": {"depth": 3}}, "colour.type", "green, red"),
        ({"colour": {"type": "red", "depht": 3}}, "colour.depht", "did you mean 'depth'"),
        ({"colour": {"type": "red", "depth": 0}}, "colour.depth", "0 must be at least 1"),
        ({"colour": {"type": "red", "depth": 2.5}}, "colour.depth", "expected int, got 2.5"),
        ({"colour": {"type": "red", "depth": True}}, "colour.depth", "expected int, got True"),
        ({"colour": "red", "colours": ["red", {"type": "green", "hue": 2}]}, "colours[1].hue", "between 0 and 1"),
        ({"colour": "red", "colours": "red"}, "colours", "expected a list"),
        ({"colour": "red", "size": "big"}, "size", "'auto'"),
        ({"colour": "red", "title": 5}, "title", "expected str, got 5"),
        ({"colour": "red", "weights": {"a": "x"}}, "weights.a", "expected float"),
        ({"colour": "red", "colours": [{"repeat": 0, "of": ["red"]}]}, "colours[0].repeat", "at least 1"),
        ({}, "colour", "needs a value"),
        ([], "", "expected Palette"),
    ],
)
def test_mistakes_are_told_with_their_path(data, path, says):
    with pytest.raises(SpecError) as caught:
        Palette.from_dict(data)
    assert caught.value.path == path
    assert says in str(caught.value)


def test_rules_between_fields_have_a_path():
    data = MODEL.to_dict()
    data["layers"][1]["ffn"]["top_k"] = 9
    with pytest.raises(SpecError) as caught:
        Transformer.from_dict(data)
    assert caught.value.path == "layers[1].ffn.top_k"
    assert "9 experts per token, but there are 4" in caught.value.reason


def test_parts_that_do_not_fit_the_width_have_a_path():
    wrong = override(MODEL, {"layers.2.attention.heads": 3})
    with pytest.raises(SpecError) as caught:
        wrong.build()
    assert caught.value.path == "layers[2].attention.heads"


@pytest.mark.parametrize(("text", "value"), [("1e-3", 1e-3), ("2E6", 2e6), ("1.5", 1.5), ("3", 3.0)])
def test_yaml_reads_numbers_as_python_does(text, value):
    assert Palette.from_yaml(f"colour: red\nweights: {{a: {text}}}").weights["a"] == value


@pytest.mark.parametrize("text", ["colour: red\ncolour: green", "colour: [", "colour: red\n  x: 1"])
def test_bad_yaml_is_refused(text):
    with pytest.raises(SpecError, match="not valid YAML"):
        Palette.from_yaml(text)


def test_override_all_blocks_or_one():
    everywhere = override(MODEL, {"layers.ffn.experts": 8})
    assert [getattr(b.ffn, "experts", None) for b in everywhere.layers] == [None, 8, None, 8, None, 8, None]
    for path in ("layers[3].ffn.experts", "layers.3.ffn.experts", "layers.-4.ffn.experts"):
        one = override(MODEL, {path: 8})
        assert [getattr(b.ffn, "experts", None) for b in one.layers] == [None, 4, None, 8, None, 4, None]


def test_override_swaps_a_kind_and_keeps_what_both_have():
    assert override(MODEL, {"norm": "layernorm", "norm.eps": 1e-6}).norm == LayerNorm(eps=1e-6)
    palette = Palette(colour=Red(depth=7))
    assert override(palette, {"colour": "green"}).colour == Green(depth=7)
    assert override(palette, {"colour": {"type": "green"}}).colour == Green(depth=5)


def test_truth_is_taken_as_yaml_writes_it():
    for word, truth in (("true", True), ("false", False), (True, True)):
        assert override(MODEL, {"layers.attention.bias": word}).layers[0].attention.bias is truth
    with pytest.raises(SpecError, match="expected bool, got 'yes'"):
        override(MODEL, {"layers.attention.bias": "yes"})


def test_override_checks_after_all_changes():
    both = override(MODEL, {"layers.ffn.top_k": 6, "layers.ffn.experts": 8})
    assert both.layers[1].ffn == MoE(expert=SwiGLU(hidden_dim=16), experts=8, top_k=6)


@pytest.mark.parametrize(
    ("path", "value", "says"),
    [
        ("layers.ffn.topk", 1, "did you mean 'top_k'"),
        ("layers.9.ffn.hidden_dim", 1, "there are 7 items"),
        ("norm", "layernrm", "did you mean 'layernorm'"),
        ("dim.x", 1, "has no fields"),
        ("dims", 1, "did you mean 'dim'"),
        ("", 1, "empty path"),
    ],
)
def test_wrong_overrides_are_refused(path, value, says):
    with pytest.raises(SpecError) as caught:
        override(MODEL, {path: value})
    assert says in str(caught.value)


def test_leaves_name_paths_that_override_accepts():
    for path, value in leaves(MODEL):
        assert override(MODEL, {path: value}) == MODEL


def test_kinds_and_fields():
    assert kinds(Colour) == {"red": Red, "green": Green}
    assert list(fields(Green)) == ["depth", "hue"]
    assert MODEL.norm == RMSNorm()
