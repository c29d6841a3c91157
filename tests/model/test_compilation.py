"""Compiled blocks: the same numbers and names, one compilation for equal blocks, and none after the first steps."""

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters

from mosaic_dist.errors import UserError
from mosaic_dist.model import (
    GELU,
    GQA,
    MHA,
    MLA,
    ActivationCheckpointing,
    ALiBi,
    Block,
    DecoupledRoPE,
    Init,
    LinearAttention,
    MoE,
    NormalizedBlock,
    RoPE,
    SigmoidTopK,
    SwiGLU,
    TernaryLinearKind,
    Transformer,
    UnitLinearKind,
    apply_activation_checkpointing,
    check_compiler,
    compile_layers,
)
from mosaic_dist.model.attention import blocks, kernel

B, T, D = 2, 12, 16
GATED = SwiGLU(hidden_dim=24)
EQUAL = Block(attention=GQA(heads=4, kv_heads=2, qk_norm=True), ffn=GATED, dropout=0.1)
MIXTURE = MoE(expert=SwiGLU(hidden_dim=16), experts=4, top_k=2, shared_experts=1, z_loss_coef=0.1, jitter=0.1)
SPARSE = (
    Block(attention=MHA(heads=2), ffn=MIXTURE, dropout=0.1),
    Block(
        attention=MHA(heads=2),
        ffn=replace(MIXTURE, router=SigmoidTopK(), aux_loss_scope="sequence", capacity_factor=1.25),
    ),
    Block(attention=MHA(heads=2), ffn=replace(MIXTURE, shared_experts=0, aux_loss_scope="global_batch")),
)


def model_of(*blocks: Block | NormalizedBlock, position=RoPE()) -> Transformer:  # noqa: B008 - a frozen value
    return Transformer(vocab_size=64, dim=D, max_seq_len=T, position=position, layers=blocks, init=Init(std=0.2))


DENSE = {
    "gqa": (model_of(EQUAL, EQUAL, EQUAL), 1),
    "mla": (
        model_of(
            Block(attention=MLA(heads=2, kv_compression_dim=8), ffn=GELU(hidden_dim=24, bias=True)),
            position=DecoupledRoPE(rope_head_dim=4),
        ),
        1,
    ),
    "masks": (
        model_of(
            Block(attention=MHA(heads=2, sliding_window=4, attention_sinks=True), ffn=GATED),
            Block(attention=MHA(heads=2, kernel="explicit", logit_softcap=20.0), ffn=GATED),
            position=ALiBi(),
        ),
        2,
    ),
    "other matrices": (
        model_of(
            Block(
                attention=LinearAttention(heads=2, chunk=4, linear=TernaryLinearKind()),
                ffn=SwiGLU(hidden_dim=24, linear=TernaryLinearKind()),
            ),
            NormalizedBlock(
                attention=MHA(heads=2, linear=UnitLinearKind()),
                ffn=SwiGLU(hidden_dim=24, linear=UnitLinearKind()),
                dropout=0.1,
            ),
        ),
        2,
    ),
}
SPARSE_MODEL = model_of(*SPARSE)


@pytest.fixture(autouse=True)
def fresh(monkeypatch, tmp_path) -> Iterator[None]:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "inductor"))
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def make(spec: Transformer, backend: str | None, parts: str = "none") -> nn.Module:
    model, recompute = spec.build_initialized(0), ActivationCheckpointing(parts=parts)
    if backend is not None:
        compile_layers(model, recompute, "cpu", backend)
    apply_activation_checkpointing(model, recompute)
    return model


def batch(step: int) -> tuple[Tensor, Tensor, Tensor]:
    """Inputs, targets and documents; the tokens, and so what each expert gets, differ from step to step."""
    tokens_BT = torch.randint(0, 64, (B, T + 1), generator=torch.Generator().manual_seed(step))
    documents_BT = (torch.arange(T) > 3 + step).long().expand(B, -1)
    return tokens_BT[:, :-1], tokens_BT[:, 1:], documents_BT


def train(model: nn.Module, steps: range, packed: bool = False, evaluates: bool = True) -> list[Tensor]:
    """Losses of some steps, each with its evaluation afterwards, if wanted; the weights move between."""
    told = []
    for step in steps:
        torch.manual_seed(step)
        inputs_BT, targets_BT, documents_BT = batch(step)
        words = (inputs_BT, targets_BT, documents_BT if packed else None)
        parts = model(*words)
        (parts.cross_entropy_sum / (B * T) + parts.auxiliary).backward()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter -= 0.05 * parameter.grad
                parameter.grad = None
        told += [parts.cross_entropy_sum.detach(), parts.auxiliary.detach(), parts.router.sum()]
        if not evaluates:
            continue
        model.eval()
        with torch.no_grad():
            told.append(model(*words).cross_entropy_sum)
        model.train()
    return told


def assert_same(got: nn.Module, expected: nn.Module, steps: range = range(3), evaluates: bool = True) -> None:
    """Losses of all steps, and the weights that the gradients have led to, by name."""
    told = [train(model, steps, evaluates=evaluates) for model in (got, expected)]
    torch.testing.assert_close(*told, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(got.state_dict(), expected.state_dict(), rtol=1e-4, atol=1e-5)
    assert list(got.state_dict()) == list(expected.state_dict())


@pytest.mark.parametrize(("spec", "kinds"), DENSE.values(), ids=DENSE)
def test_a_dense_block_is_one_graph_that_equal_blocks_share(spec, kinds):
    compiled = make(spec, "aot_eager")
    assert_same(compiled, make(spec, None))
    assert counters["stats"]["unique_graphs"] == 2 * kinds  # training and evaluation
    assert not counters["graph_break"]


def test_nothing_is_compiled_again():
    """With documents and without, trained and evaluated, whatever the experts get: of all these nothing new."""
    compiled = make(model_of(*SPARSE, EQUAL), "aot_eager")
    for packed in (False, True):
        train(compiled, range(1), packed)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for step in range(1, 3):
            for packed in (False, True):
                train(compiled, range(step, step + 1), packed)
    assert not counters["graph_break"]


def test_long_documents_stay_outside(monkeypatch):
    """Attention to them is the only thing left out, and each batch may have others."""
    monkeypatch.setattr(blocks, "MASKED_TOKENS", T - 1)
    spec = model_of(EQUAL, Block(attention=MHA(heads=2, sliding_window=3, attention_sinks=True), ffn=GATED))
    compiled, expected = make(spec, "aot_eager"), make(spec, None)
    for model in (compiled, expected):
        model.eval()  # dropout draws other numbers in compiled code
    with torch.no_grad():
        compiled(*batch(0))
    compiled_graphs = counters["stats"]["unique_graphs"]
    assert compiled_graphs >= 2
    assert {reason for reason in counters["graph_break"] if "_attend_documents" not in reason} == set()
    for step in range(1, 4):
        with torch.no_grad():
            told = [model(*batch(step)).cross_entropy_sum for model in (compiled, expected)]
        torch.testing.assert_close(*told)
    assert counters["stats"]["unique_graphs"] == compiled_graphs
    gradients = []
    for model in (compiled, expected):
        model(*batch(1)).cross_entropy_sum.backward()
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
    torch.testing.assert_close(*gradients)


def test_the_way_to_the_experts_stays_outside():
    """All else of a mixture's block is compiled: attention, weights of the choices, measures, shared experts."""
    compiled, expected = make(SPARSE_MODEL, "aot_eager"), make(SPARSE_MODEL, None)
    seen: list[bool] = []
    for block in compiled.layers:
        for outside in (block.ffn.dispatcher, block.ffn.experts):
            outside.register_forward_pre_hook(lambda *_: seen.append(torch.compiler.is_compiling()))
    assert_same(compiled, expected)
    assert len(seen) == 3 * 2 * 2 * len(SPARSE)  # really called, in each step and evaluation
    assert not any(seen)
    assert not counters["graph_break"]
    torch._dynamo.reset()
    counters.clear()
    train(make(model_of(SPARSE[0], SPARSE[0]), "aot_eager"), range(1))
    assert counters["stats"]["unique_graphs"] == 2 * 5  # before and after the network, weights, measures, shared


def test_a_gpus_question_for_shared_heads_breaks_no_graph(monkeypatch):
    """Asked here of the CPU, whose answer is no; the flash kernel of a GPU may answer yes."""

    def takes_groups(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, dropout: float) -> bool:
        return kernel.flash_shares_heads(q.device, q.dtype, q.shape[-1], dropout, q.requires_grad)

    monkeypatch.setattr(kernel, "takes_groups", takes_groups)
    assert_same(make(model_of(EQUAL), "aot_eager"), make(model_of(EQUAL), None), range(1), evaluates=False)
    assert counters["stats"]["unique_graphs"] == 1
    assert not counters["graph_break"]


@pytest.mark.gpu
def test_a_gpus_question_for_shared_heads_breaks_no_graph_there():
    model = model_of(EQUAL).build_initialized(0, "cuda").bfloat16()
    compile_layers(model, ActivationCheckpointing(), "cuda", "aot_eager")
    inputs_BT, targets_BT, _ = batch(0)
    model(inputs_BT.cuda(), targets_BT.cuda()).cross_entropy_sum.backward()
    assert counters["stats"]["unique_graphs"] == 1
    assert not counters["graph_break"]


@pytest.mark.parametrize("parts", ["full", "attention", "ffn", "moe"])
def test_parts_run_again_around_what_is_compiled(parts):
    spec = model_of(SPARSE[0], EQUAL)
    assert_same(make(spec, "aot_eager", parts), make(spec, None), range(2))
    assert not counters["graph_break"]


@torch._dynamo.config.patch(recompile_limit=1)
def test_more_kinds_than_torch_allows_by_itself():
    """Its limit counts all blocks together."""
    kinds = [Block(attention=MHA(heads=2, sliding_window=window), ffn=GELU(hidden_dim=8)) for window in (1, 2, 3)]
    train(make(model_of(*kinds), "eager"), range(1))
    assert counters["stats"]["unique_graphs"] == 2 * len(kinds)


def test_nothing_holds_the_weights_that_zero_3_frees():
    """What a forward pass keeps for the backward pass are parameters themselves, not views of their storage."""
    model = make(model_of(EQUAL), "aot_eager_decomp_partition")  # which keeps what inductor would keep
    storages = {parameter.untyped_storage().data_ptr() for parameter in model.layers.parameters()}
    kept: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model(*batch(0)[:2])
    of_weights = [tensor for tensor in kept if tensor.untyped_storage().data_ptr() in storages]
    assert len(of_weights) == len(list(model.layers.parameters()))
    assert all(isinstance(tensor, nn.Parameter) for tensor in of_weights)


@pytest.mark.slow
def test_real_code_gives_the_numbers():
    """What inductor makes of a dense and a sparse block; without dropout, for which it draws numbers of its own."""
    mixture = replace(MIXTURE, jitter=0.0, shared_experts=0)
    spec = model_of(replace(EQUAL, dropout=0.0), Block(attention=MHA(heads=2), ffn=mixture))
    with torch._inductor.config.patch(compile_threads=1):
        assert_same(make(spec, "inductor"), make(spec, None), evaluates=False)
    assert counters["inductor"]


@pytest.mark.parametrize(("on_gpu", "variable", "language"), [(False, "CXX", r"C\+\+"), (True, "CC", "C")])
def test_a_missing_compiler_is_told_before_the_start(monkeypatch, tmp_path, on_gpu, variable, language):
    check_compiler(on_gpu)
    monkeypatch.setenv(variable, "no-such-compiler -O1")
    with pytest.raises(UserError, match=f"needs a {language} compiler, and there is no no-such-compiler on the PATH"):
        check_compiler(on_gpu)
    monkeypatch.delenv(variable)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match=f"name one in {variable}, or use --parallel.compile false"):
        check_compiler(on_gpu)


def test_missing_headers_are_told(monkeypatch, tmp_path):
    monkeypatch.setattr("sysconfig.get_path", lambda name: str(tmp_path))
    with pytest.raises(UserError, match="needs the headers of Python"):
        check_compiler(on_gpu=False)
