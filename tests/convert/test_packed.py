"""Packed ternary matrices: bytes that a loop can read, the same logits, and no more than two bits per weight."""

import dataclasses
import json
import struct

import mosaic_ternary
import pytest
import torch
from safetensors.torch import load_file, save_file

from mosaic_dist.convert import load_exported, write_model
from mosaic_dist.errors import UserError
from mosaic_dist.files import checksum
from mosaic_dist.model import GQA, Block, RMSNorm, RoPE, SwiGLU, TernaryLinearKind, Tied, Transformer
from mosaic_dist.spec import override

SMALL = {
    "vocab_size": 61,
    "dim": 64,
    "max_seq_len": 32,
    "layers.attention.heads": 2,
    "layers.attention.kv_compression_dim": 16,
    "position.rope_head_dim": 8,
    "layers.ffn.expert.hidden_dim": 96,
    "layers.ffn.experts": 4,
}
MIXED = override(mosaic_ternary.run.model, SMALL)
MIXED = dataclasses.replace(
    MIXED,
    layers=(
        MIXED.layers[0],
        dataclasses.replace(MIXED.layers[1], ffn=SwiGLU(hidden_dim=96, linear=TernaryLinearKind())),
    ),
)
"""Stacks of experts, their shared one, and a dense network."""


@pytest.fixture(scope="module")
def model():
    model = MIXED.build_initialized(0).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model


@pytest.fixture(scope="module")
def folders(model, tmp_path_factory):
    """The model in both forms and two dtypes."""
    root = tmp_path_factory.mktemp("packed")
    return {
        (form, dtype): write(model, root / f"{form}-{dtype}", dtype, ternary=form)
        for form in ("float", "packed")
        for dtype in ("fp32", "bf16")
    }


def write(model, folder, dtype="fp32", **more):
    return write_model(folder, model.spec, model.named_parameters(), {}, None, dtype, **more)


def logits(model):
    torch.set_num_threads(1)
    with torch.no_grad():
        return model(torch.randint(0, 61, (2, 20), generator=torch.Generator().manual_seed(2)))


def is_ternary(name: str) -> bool:
    return ".ffn." in name and "router" not in name


def test_same_logits_as_the_float_form(model, folders):
    expected = logits(load_exported(folders["float", "fp32"]))
    assert torch.equal(expected, logits(model))
    assert torch.equal(logits(load_exported(folders["packed", "fp32"])), expected)


def test_bf16_is_the_packed_model_cast(folders):
    right = logits(load_exported(folders["packed", "fp32"]).bfloat16())
    assert right.dtype == torch.bfloat16
    assert torch.equal(logits(load_exported(folders["packed", "bf16"])), right)
    rounded_first = logits(load_exported(folders["float", "bf16"]))  # ternary of bfloat16 weights: other scales
    assert not torch.equal(rounded_first, right)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_three_values_per_matrix(model, folders, dtype):
    found = 0
    loaded = load_exported(folders["packed", dtype])
    for name, weight in loaded.named_parameters():
        if is_ternary(name):
            assert not weight.requires_grad
            master = dict(model.named_parameters())[name].detach()
            pairs = [(weight, master)] if weight.ndim == 2 else zip(weight, master, strict=True)
            for matrix, exact in pairs:
                scale = float(exact.abs().double().mean())
                values = matrix.unique().tolist()
                assert len(values) == 3
                assert values == pytest.approx([-scale, 0, scale], rel=1e-5 if dtype == "fp32" else 4e-3)
                found += 1
    assert found == 3 * (4 + 1) + 3


def raw_tensors(folder) -> dict[str, bytes]:
    """The bytes of each tensor, by the safetensors format: length of the header, header, data."""
    data = (folder / "model.safetensors").read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    header.pop("__metadata__")
    return {name: data[8 + length :][slice(*facts["data_offsets"])] for name, facts in header.items()}


def test_bytes_are_the_digits_of_the_values(model, folders):
    raw = raw_tensors(folders["packed", "fp32"])
    for name, weight in model.named_parameters():
        if not is_ternary(name):
            assert raw[name] == weight.detach().numpy().tobytes()
            continue
        size = weight.shape[-2] * weight.shape[-1]
        scales = struct.unpack(f"<{weight.numel() // size}f", raw[f"{name}.scale"])
        digits = [byte // 3**i % 3 - 1 for byte in raw[f"{name}.packed"] for i in range(5)]
        for i, flat in enumerate(weight.detach().reshape(-1, size).tolist()):
            half = scales[i] / 2
            assert digits[i * size : (i + 1) * size] == [(w > half) - (w < -half) for w in flat]


def test_two_bits_per_weight_at_most(model, folders):
    """In the whole file, all headers counted as the ternary tensors' own."""
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    weights = sum(size for name, size in sizes.items() if is_ternary(name))
    others_bytes = sum(4 * size for name, size in sizes.items() if not is_ternary(name))
    raw = raw_tensors(folders["packed", "fp32"])
    assert 1.6 <= 8 * sum(len(raw[name]) for name in raw if is_ternary(name)) / weights < 1.61
    assert 8 * ((folders["packed", "fp32"] / "model.safetensors").stat().st_size - others_bytes) / weights <= 2


def test_halves_in_different_files(model, folders, tmp_path):
    folder = write(model, tmp_path / "cut", ternary="packed", max_shard_bytes=1)
    index = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    name = next(name for name in index if name.endswith(".packed")).removesuffix(".packed")
    assert index[f"{name}.packed"] != index[f"{name}.scale"]
    assert torch.equal(logits(load_exported(folder)), logits(load_exported(folders["packed", "fp32"])))


def damage(folder, change):
    """Change the tensors of a folder, and its checksum with them."""
    weights = folder / "model.safetensors"
    tensors = load_file(weights)
    change(tensors)
    save_file(tensors, weights)
    sums = json.loads((folder / "checksums.json").read_text())
    sums[weights.name]["xxh3_128"] = checksum(weights)
    (folder / "checksums.json").write_text(json.dumps(sums))


NAME = "layers.1.ffn.network.down.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tensors: tensors[f"{NAME}.packed"][7:8].fill_(243), r"down.weight.packed: byte 243 is not a packing"),
        (lambda tensors: tensors.update({f"{NAME}.packed": tensors[f"{NAME}.packed"][1:].clone()}), "is not a packing"),
        (
            lambda tensors: tensors[f"{NAME}.scale"].fill_(torch.nan),
            r"down.weight.scale \[\] should be \[\] of positive",
        ),
        (lambda tensors: tensors.pop(f"{NAME}.scale"), r"missing \['layers.1.ffn.network.down.weight'\]"),
        (lambda tensors: tensors.update({NAME: torch.ones(64, 96)}), "is not packed, though config.json says so"),
    ],
)
def test_tensors_that_no_packing_gives_are_refused(model, tmp_path, change, message):
    folder = write(model, tmp_path / "model", ternary="packed")
    damage(folder, change)
    with pytest.raises(UserError, match=message):
        load_exported(folder)


def test_a_damaged_byte_is_refused(model, tmp_path):
    folder = write(model, tmp_path / "model", ternary="packed")
    weights = folder / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    with pytest.raises(UserError, match="safetensors is damaged"):
        load_exported(folder)


def test_a_model_without_ternary_matrices_is_refused(tmp_path):
    block = Block(attention=GQA(heads=4, kv_heads=2), ffn=SwiGLU(hidden_dim=32))
    spec = Transformer(
        vocab_size=61, dim=32, max_seq_len=32, position=RoPE(), layers=(block,), norm=RMSNorm(), head=Tied()
    )
    with pytest.raises(UserError, match="no ternary matrices to pack; leave --ternary out"):
        write(spec.build_initialized(0), tmp_path / "model", ternary="packed")
    assert list(tmp_path.iterdir()) == []
