"""What a mixture can do beside choosing: capacity, noise, losses, balancing without a loss, chunks, recomputation."""

import math
import weakref
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from mosaic_dist.model import (
    GELU,
    MHA,
    ActivationCheckpointing,
    Block,
    ClampedSwiGLU,
    Experts,
    LocalDispatcher,
    MixtureOfExperts,
    MoE,
    MoESwiGLU,
    Rows,
    SigmoidTopK,
    SoftmaxTopK,
    SwiGLU,
    Transformer,
    apply_activation_checkpointing,
)
from mosaic_dist.model.activation_checkpointing import recomputed, remembered
from mosaic_dist.model.ffn import kernel
from mosaic_dist.model.ffn.kernel import Layer, run_grouped, run_in_turn
from mosaic_dist.model.moe.assignment import assign
from mosaic_dist.spec import SpecError
from tests.model.test_ffn import randomize

DIM, EXPERTS, K = 6, 4, 2
MIXTURE = MoE(expert=SwiGLU(hidden_dim=8), experts=EXPERTS, top_k=K, aux_loss_coef=0.0)


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


def make(**changes) -> MixtureOfExperts:
    return randomize(replace(MIXTURE, **changes).build(DIM))


def single(layer: MixtureOfExperts, token: Tensor, e: int) -> Tensor:
    """One expert on one token."""
    weights = {name: getattr(layer.experts, name).weight[e] for name in ("gate", "up", "down")}
    return (nn.functional.silu(token @ weights["gate"]) * (token @ weights["up"])) @ weights["down"]


# --- capacity -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("drop", ["position", "probs"])
@pytest.mark.parametrize("factor", [0.5, 1.0, 1.3])
def test_choices_beyond_the_capacity_are_dropped(drop, factor):
    layer, x = (
        make(capacity_factor=factor, drop_policy=drop, router=SoftmaxTopK(normalize=False)),
        torch.randn(2, 9, DIM),
    )
    out, extras = layer(x)
    routing = layer.router(x.flatten(0, 1))
    places = math.ceil(factor * 18 * K / EXPERTS)
    asked: list[list[tuple[int, float]]] = [[] for _ in range(EXPERTS)]
    for s in range(18):
        for e, weight in zip(routing.experts_SK[s].tolist(), routing.weights_SK[s].tolist(), strict=True):
            asked[e].append((s, weight))
    expected, dropped = torch.zeros(18, DIM), 0
    for e, wishes in enumerate(asked):
        wishes = sorted(wishes, key=lambda wish: -wish[1]) if drop == "probs" else wishes
        dropped += len(wishes[places:])
        for s, weight in wishes[:places]:
            expected[s] += weight * single(layer, x.flatten(0, 1)[s], e)
    torch.testing.assert_close(out.flatten(0, 1), expected, rtol=1e-4, atol=1e-4)
    assert extras["drop_rate"].item() == pytest.approx(dropped / (18 * K))
    assert (dropped > 0) == (factor < 1.3 or max(map(len, asked)) > places)
    assert extras["expert_load"].tolist() == [len(wishes) for wishes in asked]  # what they wanted, not what they got


def test_nothing_is_dropped_when_not_training_or_with_room_for_all():
    free, tight = make(), make(capacity_factor=0.1)
    x = torch.randn(2, 9, DIM)
    assert not torch.equal(tight(x)[0], free(x)[0])
    torch.testing.assert_close(tight.eval()(x)[0], free(x)[0])
    torch.testing.assert_close(make(capacity_factor=4.0)(x)[0], free(x)[0])


def test_a_dropped_choice_has_no_gradient():
    layer = make(capacity_factor=0.1, top_k=1, router=SoftmaxTopK(normalize=False))  # one place per expert
    x = torch.randn(1, 12, DIM, requires_grad=True)
    out, extras = layer(x)
    out.sum().backward()
    served = int((out[0].abs().sum(-1) > 0).sum())
    assert served == int((extras["expert_load"] > 0).sum())
    assert torch.equal(x.grad[0].abs().sum(-1) > 0, out[0].abs().sum(-1) > 0)


def test_a_drop_policy_without_a_capacity_is_refused():
    with pytest.raises(SpecError, match=r"drop_policy: 'probs' without a capacity_factor"):
        MoESwiGLU(experts=4, hidden_dim=8, drop_policy="probs")


# --- losses -------------------------------------------------------------------------------------------------------


def test_the_z_loss_is_the_mean_square_of_logsumexp():
    layer, x = make(z_loss_coef=0.25), torch.randn(2, 3, DIM)
    _, extras = layer(x)
    logits = (x.flatten(0, 1) @ layer.router.weight.T).tolist()
    expected = sum(math.log(sum(math.exp(v) for v in row)) ** 2 for row in logits) / len(logits)
    assert extras["z_loss"].item() == pytest.approx(0.25 * expected, rel=1e-5)
    assert extras["z"].item() == pytest.approx(expected, rel=1e-5)


def shares(layer: MixtureOfExperts, x_SD: Tensor) -> tuple[list[float], list[float]]:
    """Share of choices and mean probability of each expert, by counting."""
    routing = layer.router(x_SD)
    chosen = routing.experts_SK.flatten().tolist()
    return [chosen.count(e) / len(chosen) for e in range(EXPERTS)], routing.probs_SE.mean(0).tolist()


@pytest.mark.parametrize("router", [SoftmaxTopK(), SigmoidTopK()], ids=str)
def test_the_balance_loss_of_sequences_is_the_mean_of_each(router):
    layer, x = make(aux_loss_coef=0.5, aux_loss_scope="sequence", router=router), torch.randn(3, 5, DIM)
    expected = 0.0
    for sequence in x:
        counted, likely = shares(layer, sequence)
        expected += EXPERTS * sum(f * p for f, p in zip(counted, likely, strict=True)) / 3
    assert layer(x)[1]["balance_loss"].item() == pytest.approx(0.5 * expected, rel=1e-5)


class TwoRanks(LocalDispatcher):
    """As if another process had the same choices and 10 more for expert 0."""

    def total_counts(self, counts_E: Tensor) -> Tensor:
        return 2 * counts_E + torch.tensor([10, 0, 0, 0])


def test_the_balance_loss_of_the_global_batch_counts_all_ranks_and_micro_batches_of_the_step():
    layer, micro_batches = make(aux_loss_coef=1.0, aux_loss_scope="global_batch"), torch.randn(2, 2, 5, DIM)
    layer.dispatcher = TwoRanks()
    for _ in range(2):  # two steps: the second starts to count anew
        total = [0.0] * EXPERTS
        for x in micro_batches:
            counted, likely = shares(layer, x.flatten(0, 1))
            total = [t + 2 * 10 * K * f for t, f in zip(total, counted, strict=True)]
            total[0] += 10
            share = [t / sum(total) for t in total]
            expected = EXPERTS * sum(f * p for f, p in zip(share, likely, strict=True))
            assert layer(x)[1]["balance_loss"].item() == pytest.approx(expected, rel=1e-5)
        layer.end_step(torch.zeros(EXPERTS, dtype=torch.int64))


@pytest.mark.parametrize("over", ["micro_batch", "sequence", "global_batch"])
@pytest.mark.parametrize("router", [SoftmaxTopK(), SigmoidTopK()], ids=str)
def test_every_configured_loss_has_a_gradient(over, router):
    layer = make(aux_loss_coef=0.1, aux_loss_scope=over, z_loss_coef=0.1, router=router)
    extras = layer(torch.randn(2, 5, DIM))[1]
    for name in ("balance_loss", "z_loss"):
        (gradient,) = torch.autograd.grad(extras[name], layer.router.weight, retain_graph=True)
        assert gradient.abs().sum() > 0, name


def test_losses_without_a_weight_are_measured_only():
    _, extras = make()(torch.randn(2, 5, DIM))
    assert not any(name.endswith("_loss") for name in extras)
    assert not any(extras[name].requires_grad for name in ("balance", "z", "entropy"))
    assert 0 < extras["entropy"].item() < math.log(EXPERTS)


def test_jitter_is_noise_on_the_routers_input_while_training():
    layer, x = make(jitter=0.5), torch.randn(1, 500, DIM)
    quiet = make()
    torch.manual_seed(1)
    noisy = layer(x)
    torch.manual_seed(1)
    again = layer(x)
    assert torch.equal(noisy[0], again[0])
    assert not torch.equal(noisy[1]["expert_load"], quiet(x)[1]["expert_load"])
    assert torch.equal(layer.eval()(x)[0], quiet(x)[0])
    ratio = layer.train()._jittered(x) / x
    assert 0.5 <= ratio.min() < 0.55
    assert 1.45 < ratio.max() <= 1.5
    assert ratio.mean().item() == pytest.approx(1.0, abs=0.02)


def test_the_correction_balances_the_load_without_a_loss():
    layer = make(router=SigmoidTopK(expert_bias_update_rate=0.02), top_k=1)
    x = torch.randn(1, 400, DIM) + 0.7
    first = layer(x)[1]["expert_load"]
    for _ in range(200):
        layer.end_step(layer(x)[1]["expert_load"])
    last = layer(x)[1]["expert_load"]
    assert first.max() > 2 * first.float().mean()
    assert last.max() < 1.2 * last.float().mean()
    before = layer.router.expert_bias.clone()
    layer.end_step(torch.tensor([9, 1, 5, 5]))
    moved = layer.router.expert_bias - before
    torch.testing.assert_close(moved, torch.tensor([-0.02, 0.02, 0.0, 0.0]))
    layer.end_step(None)  # an update that was left out moves nothing
    torch.testing.assert_close(layer.router.expert_bias, before + moved)


# --- the experts' products ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dropping", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("kind", [GELU, ClampedSwiGLU])
def test_the_grouped_product_equals_one_expert_after_the_other(kind, bias, dropping, dtype):
    """In values and all gradients; expert 1 gets nothing. Tolerances are a few roundings of the dtype."""
    spec = kind(hidden_dim=8, bias=bias)
    experts = randomize(spec.build_experts(8, 8, EXPERTS), std=0.5).to(dtype)
    choices = torch.tensor([0, 2, 3])[torch.stack([torch.randperm(3)[:K] for _ in range(20)])]
    kept = torch.rand(20, K) < 0.7 if dropping else None
    direction, results = torch.randn(20, 8).to(dtype), []
    x = torch.randn(20, 8).to(dtype).requires_grad_()
    weights = torch.rand(20, K).requires_grad_()
    for run in (run_in_turn, run_grouped):
        rows = assign(weights, choices, kept, EXPERTS)
        layers = [Layer(getattr(experts, name).weight, getattr(experts, name).bias) for name in spec.readers()]
        out = run(x, rows, spec.activate, layers, Layer(experts.down.weight, experts.down.bias))
        leaves = [x, weights, *experts.parameters()]
        results.append([out, *torch.autograd.grad((out * direction).sum(), leaves)])
    tolerance = 1e-5 if dtype == torch.float32 else 0.06
    for one, other in zip(*results, strict=True):
        assert one.dtype == other.dtype
        torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance * one.abs().max().item())
    assert results[0][0].abs().sum() > 0


def results_of(run, dim: int, width: int, dtype: torch.dtype = torch.bfloat16, shift: int = 0) -> list[Tensor]:
    """Output and all gradients of four experts, of which expert 1 gets no rows; weights begin `shift` into a tensor."""
    torch.manual_seed(0)
    spec = ClampedSwiGLU(hidden_dim=width, bias=True)
    experts = randomize(spec.build_experts(dim, width, EXPERTS), std=0.5).to(dtype)
    for stack in experts.children():
        shared = torch.zeros(shift + stack.weight.numel(), dtype=dtype)
        stack.weight.data = shared[shift:].copy_(stack.weight.flatten()).view_as(stack.weight)
    rows = assign(torch.rand(20, K), torch.tensor([0, 2, 3])[torch.randint(3, (20, 1)).expand(-1, K)], None, EXPERTS)
    x = torch.randn(20, dim).to(dtype).requires_grad_()
    layers = [Layer(getattr(experts, name).weight, getattr(experts, name).bias) for name in spec.readers()]
    out = run(x, rows, spec.activate, layers, Layer(experts.down.weight, experts.down.bias))
    leaves = [x, *experts.parameters()]
    return [out, *torch.autograd.grad((out * torch.randn(20, dim).to(dtype)).sum(), leaves)]


@pytest.mark.parametrize(("dim", "width", "shift"), [(12, 20, 0), (8, 20, 0), (13, 8, 0), (8, 8, 4)])
def test_the_grouped_product_takes_any_width(dim, width, shift, monkeypatch):
    """Its kernels want rows and tensors that begin at multiples of 16 bytes; here that of CPUs asks for the rows."""
    seen: list[int] = []

    def recorded(x: Tensor, weight: Tensor, *, offs: Tensor) -> Tensor:
        seen.extend(tensor.data_ptr() % 16 for tensor in (x, weight))
        return grouped_mm(x, weight, offs=offs)

    grouped_mm = functional.grouped_mm
    monkeypatch.setattr(functional, "grouped_mm", recorded)
    for one, other in zip(
        *(results_of(run, dim, width, shift=shift) for run in (run_in_turn, run_grouped)), strict=True
    ):
        assert one.shape == other.shape
        torch.testing.assert_close(one, other, rtol=0.06, atol=0.06 * one.abs().max().item())
    assert set(seen) == {0}


class Careless(torch.autograd.Function):
    """A grouped product in float32 that leaves the gradients of groups without rows as they come."""

    @staticmethod
    def forward(ctx, x_RI: Tensor, weight_eIO: Tensor, ends_e: Tensor) -> Tensor:
        ctx.save_for_backward(x_RI, weight_eIO, ends_e)
        return functional.grouped_mm(x_RI, weight_eIO, offs=ends_e)

    @staticmethod
    def backward(ctx, grad_RO: Tensor) -> tuple[Tensor, Tensor, None]:
        x_RI, weight_eIO, ends_e = ctx.saved_tensors
        grad_x = functional.grouped_mm(grad_RO, weight_eIO.mT, offs=ends_e)
        grad_weight = functional.grouped_mm(x_RI.mT, grad_RO, offs=ends_e)
        grad_weight[ends_e.diff(prepend=ends_e.new_zeros(1)) == 0] = torch.nan
        return grad_x, grad_weight, None


def test_gradients_of_experts_without_rows_are_zero_where_the_product_leaves_them_unwritten(monkeypatch):
    monkeypatch.setattr(kernel, "_leaves_gradients_unwritten", lambda device: True)
    careless = SimpleNamespace(grouped_mm=lambda x, weight, offs: Careless.apply(x, weight, offs), pad=functional.pad)
    monkeypatch.setattr(kernel, "functional", careless)
    for one, other in zip(*(results_of(run, 8, 8, torch.float32) for run in (run_in_turn, run_grouped)), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("capability", "is_grouped"), [((8, 0), False), ((8, 9), False), ((9, 0), True), ((10, 0), True), ((12, 0), False)]
)
def test_only_some_gpus_have_the_grouped_product(capability, is_grouped, monkeypatch):
    """Elsewhere torch's own loop would let the host wait in every product."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert kernel.has_grouped_product(torch.device("cuda", 0)) == is_grouped
    assert not kernel.has_grouped_product(torch.device("cpu"))


def test_the_grouped_product_lets_go_of_the_tokens_it_was_given():
    """Behind an exchange they are the arriving rows: one more set of them in each layer."""
    experts = randomize(SwiGLU(hidden_dim=8).build_experts(8, 8, EXPERTS))
    rows = assign(torch.rand(20, K), torch.stack([torch.randperm(EXPERTS)[:K] for _ in range(20)]), None, EXPERTS)
    given = torch.randn(20, 8, requires_grad=True)
    arriving = given.clone()
    kept = weakref.ref(arriving)
    readers = [Layer(stack.weight, None) for stack in (experts.gate, experts.up)]
    out = run_grouped(arriving, rows, SwiGLU(hidden_dim=8).activate, readers, Layer(experts.down.weight, None))
    del arriving
    assert kept() is None
    out.sum().backward()
    assert given.grad.abs().sum() > 0


def saved_bytes(run) -> int:
    """Bytes of activations that a forward pass keeps, parameters left out."""
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        if (not isinstance(tensor, nn.Parameter) and not tensor.is_leaf) or not tensor.requires_grad:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = run()
    assert out.requires_grad
    return sum(kept.values())


def test_kept_for_the_backward_pass_are_the_tokens_and_what_the_readers_give():
    S, D, F = 512, 64, 32
    experts = randomize(SwiGLU(hidden_dim=F).build_experts(D, F, EXPERTS), std=0.1)
    x = torch.randn(S, D, requires_grad=True)
    choices = torch.stack([torch.randperm(EXPERTS)[:K] for _ in range(S)])
    rows = assign(torch.rand(S, K, requires_grad=True), choices, None, EXPERTS)
    hidden, indices, weights = S * K * 2 * F * 4, S * K * 8, S * K * 4
    assert saved_bytes(lambda: experts(x, rows)) <= hidden + S * D * 4 + indices + weights


# --- chunks and recomputation -------------------------------------------------------------------------------------


class Watched(LocalDispatcher):
    """Notes how many rows there are at a time."""

    def __init__(self):
        super().__init__()
        self.rows: list[int] = []

    def forward(self, x_SD: Tensor, rows: Rows, experts: Experts, overlap_fn) -> Tensor:
        self.rows.append(len(rows.tokens_R))
        return super().forward(x_SD, rows, experts, overlap_fn)


@pytest.mark.parametrize("tokens", [1, 10, 11])
@pytest.mark.parametrize("factor", [None, 0.6])
def test_chunks_change_nothing_but_the_memory(factor, tokens):
    results = []
    for chunks in (1, 4):
        layer = make(capacity_factor=factor, shared_experts=1, z_loss_coef=0.1)
        layer.dispatcher, layer.chunks = Watched(), chunks
        x = torch.randn(1, tokens, DIM, generator=torch.Generator().manual_seed(3)).requires_grad_()
        out, extras = layer(x)
        leaves = [x, *layer.parameters()]
        results.append([out, *torch.autograd.grad(out.square().sum() + extras["z_loss"], leaves)])
        assert max(layer.dispatcher.rows) <= math.ceil(tokens / chunks) * K
        assert len(layer.dispatcher.rows) == (1 if chunks == 1 else 2 * chunks)  # forward and again
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-5)


MODEL = Transformer(
    vocab_size=19,
    dim=16,
    max_seq_len=8,
    layers=3
    * (
        Block(
            attention=MHA(heads=2, dropout=0.2),
            ffn=MoE(expert=SwiGLU(hidden_dim=16), experts=4, top_k=2, jitter=0.3, aux_loss_scope="global_batch"),
            dropout=0.1,
        ),
    ),
)
TOKENS = torch.randint(0, 19, (2, 9), generator=torch.Generator().manual_seed(5))


def step(recompute: ActivationCheckpointing) -> tuple[list[Tensor], int]:
    """Losses, loads and gradients of two micro-batches, and the bytes kept for the backward pass of one."""
    model = MODEL.build_initialized(0)
    apply_activation_checkpointing(model, recompute)
    torch.manual_seed(7)
    results: list[Tensor] = []
    for _ in range(2):
        parts = model(TOKENS[:, :-1], TOKENS[:, 1:])
        (parts.cross_entropy_sum + parts.auxiliary).backward()
        results += [value.detach() for value in parts]
    gradients = [parameter.grad for parameter in model.parameters()]
    return results + gradients, saved_bytes(lambda: model(TOKENS[:, :-1], TOKENS[:, 1:]).cross_entropy_sum)


def test_recomputation_repeats_noise_and_choices_and_keeps_less():
    expected, plain = step(ActivationCheckpointing())
    kept = {}
    for parts in ("attention", "ffn", "moe", "full"):
        for every in (1, 2):
            found, kept[parts, every] = step(ActivationCheckpointing(parts=parts, every=every))
            torch.testing.assert_close(found, expected, rtol=0, atol=0)
    assert kept["full", 1] < kept["full", 2] < plain
    assert kept["full", 1] < kept["ffn", 1] < plain
    assert kept["attention", 1] < plain
    assert kept["moe", 1] == kept["ffn", 1]


def test_a_decision_is_made_once():
    """Even where the second run would decide otherwise."""
    answers = iter([2.0, 3.0])

    def part(x: Tensor) -> Tensor:
        return x.exp() * remembered(lambda: next(answers))

    x = torch.zeros(1, requires_grad=True)
    recomputed(part, x).sum().backward()
    assert x.grad.item() == 2.0
    assert remembered(lambda: 5.0) == 5.0  # outside of any part
