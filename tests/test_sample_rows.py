"""The rewrite on joint graphs: what it matches, what it leaves alone, that it is unbiased. No compilation."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from conftest import RowsOnly, Transformer, centring_errors, gradients, is_unbiased
from torch import Tensor, fx, nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

import wtacrs_fx
from wtacrs_fx import Policy, Rule
from wtacrs_passes.graph.names import parameter_gradients
from wtacrs_passes.graph.operations import NOISE_OF
from wtacrs_passes.maths import ops
from wtacrs_passes.maths.ops import choose_rows

SMALL = RowsOnly(min_rows=4)


def draws(gm: fx.GraphModule) -> int:
    return len(gm.graph.find_nodes(op="call_function", target=choose_rows))


def sampled(gm: fx.GraphModule) -> set[str]:
    return {site.parameter for site in gm.report.sampled}


def reasons(gm: fx.GraphModule) -> dict[str, str]:
    return {site.parameter: site.reason for site in gm.report.sites if site.reason}


class Function(nn.Module):
    """A module with parameters and a function of them."""

    def __init__(self, function: Callable[..., Tensor], **shapes: tuple[int, ...]) -> None:
        super().__init__()
        self.function = function
        for name, shape in shapes.items():
            self.register_parameter(name, nn.Parameter(torch.randn(shape)))

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.function(self, *inputs)


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(20, 8), nn.Linear(8, 20, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(torch.tanh(self.embed(tokens))).square().mean()


class Twice(nn.Module):
    """One weight in two products: the gradient is a sum of two."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(torch.tanh(self.linear(x))).square().mean()


X = torch.randn(4, 16, 8, generator=torch.Generator().manual_seed(0))
CASES: dict[str, tuple[Callable[[], nn.Module], Tensor, int]] = {
    "linear": (lambda: Function(lambda m, x: F.linear(x, m.w).square().mean(), w=(6, 8)), X, 1),
    "conv1d": (lambda: nn.Sequential(Conv1D(6, 8), nn.Tanh()), X, 1),
    "einsum": (lambda: Function(lambda m, x: torch.einsum("bsd,do->bso", x, m.w).tanh(), w=(8, 6)), X, 1),
    "einsum heads": (
        lambda: Function(lambda m, x: torch.einsum("bsd,hdo->bhso", x, m.w).tanh(), w=(2, 8, 3)),
        X,
        1,
    ),
    "bmm experts": (lambda: Function(lambda m, x: torch.bmm(x, m.w).tanh(), w=(4, 8, 6)), X, 1),
    "tied": (Tied, torch.randint(20, (4, 16), generator=torch.Generator().manual_seed(0)), 1),
    "twice": (Twice, X, 2),
    "scaled weight": (
        lambda: Function(lambda m, x: F.linear(x, m.w * m.g).tanh(), w=(6, 8), g=(6, 1)),
        X,
        1,
    ),
}


def run_joint(gm: fx.GraphModule, model: nn.Module, x: Tensor, runs: int) -> dict[str, Tensor]:
    """Run a joint graph on unit tangents: gradients by parameter, [runs, n]."""
    parameters = dict(model.named_parameters())
    table = {static.index: static for static in gm.meta["wtacrs_static_inputs"]}
    placeholders = gm.graph.find_nodes(op="placeholder")
    primals = [n for n in placeholders if "tangents" not in n.name]
    values = [parameters[table[i].name].detach() if i in table else x for i in range(len(primals))]
    fakes = [n.meta["val"] for n in placeholders if "tangents" in n.name]
    tangents = [torch.empty_strided(fake.shape, fake.stride(), dtype=fake.dtype).fill_(1) for fake in fakes]
    output = next(iter(reversed(gm.graph.nodes)))
    names = parameter_gradients(gm.graph, table)
    positions = [(i, names[n]) for i, n in enumerate(output.args[0]) if n in names]
    samples: dict[str, list[Tensor]] = {}
    for _ in range(runs):
        flat = torch.utils._pytree.tree_leaves(gm(values, tangents))
        for i, name in positions:
            samples.setdefault(name, []).append(flat[i].flatten())
    return {name: torch.stack(found) for name, found in samples.items()}


def estimate(case: str, policy: Policy) -> tuple[fx.GraphModule, dict[str, Tensor], dict[str, Tensor]]:
    """Return the rewritten graph of a case, its exact gradients, and 400 samples of each."""
    make, x, _ = CASES[case]
    torch.manual_seed(0)
    model = make()
    joint = wtacrs_fx.capture(model, x)
    exact = {name: found[0] for name, found in run_joint(joint, model, x, 1).items()}
    rewritten = wtacrs_fx.transform(joint, policy)
    torch.manual_seed(1)
    return rewritten, exact, run_joint(rewritten, model, x, 400)


@pytest.mark.parametrize("placement", ["forward", "backward"])
@pytest.mark.parametrize("case", CASES)
def test_products_are_found_and_estimated_without_bias(case: str, placement: str) -> None:
    policy = RowsOnly(ratio=0.25, min_rows=4, placement=placement)
    rewritten, exact, estimates = estimate(case, policy)
    assert draws(rewritten) == CASES[case][2]
    assert any(s.std(0).max() > 0 for s in estimates.values())
    for name, samples in estimates.items():
        assert is_unbiased(samples, exact[name]), name


@pytest.mark.parametrize("estimator", ["wta-crs", "crs"])
@pytest.mark.parametrize("center", [False, True])
def test_every_estimator_with_and_without_centering(estimator: str, center: bool) -> None:
    make, x, _ = CASES["linear"]
    model, x = make(), x + 2
    joint = wtacrs_fx.capture(model, x)
    exact = run_joint(joint, model, x, 1)["w"][0]
    policy = RowsOnly(ratio=0.25, min_rows=4, estimator=estimator, center=center)
    assert is_unbiased(run_joint(wtacrs_fx.transform(joint, policy), model, x, 600)["w"], exact)


def test_centering_reduces_the_variance_of_rows_with_a_common_mean() -> None:
    make, x, _ = CASES["linear"]
    model, x = make(), x + 5
    joint = wtacrs_fx.capture(model, x)
    plain, centered = (
        run_joint(wtacrs_fx.transform(joint, RowsOnly(min_rows=4, center=c)), model, x, 200)["w"].var(0).sum()
        for c in (False, True)
    )
    assert centered < 0.5 * plain


def test_topk_is_biased_and_not_random() -> None:
    make, x, _ = CASES["linear"]
    model = make()
    joint = wtacrs_fx.capture(model, x)
    samples = run_joint(wtacrs_fx.transform(joint, RowsOnly(min_rows=4, estimator="topk")), model, x, 3)["w"]
    assert torch.equal(samples[0], samples[1])
    assert not torch.allclose(samples[0], run_joint(joint, model, x, 1)["w"][0], rtol=0.05)


def test_linears_on_one_residual_share_a_draw_and_a_subset() -> None:
    joint = wtacrs_fx.capture(Transformer(), torch.randint(50, (4, 32)))
    rewritten = wtacrs_fx.transform(joint, SMALL)
    assert len(rewritten.report.sampled) == 7  # q, k, v, out, up, down, head
    assert draws(rewritten) == 5  # q, k and v share one


def test_sites_do_not_share_random_numbers() -> None:
    rewritten = wtacrs_fx.transform(
        wtacrs_fx.capture(Transformer(layers=2), torch.randint(50, (4, 32))), SMALL
    )
    noises = [n for n in rewritten.graph.nodes if n.meta.get(NOISE_OF)]
    assert len(noises) == draws(rewritten) == 9
    assert len({n.args[1] for n in rewritten.graph.find_nodes(op="call_function", target=choose_rows)}) == 9


def test_gradients_of_inputs_and_attention_products_stay() -> None:
    model = Function(lambda m, x: F.linear(x, m.w).tanh() @ x.mT, w=(8, 8))
    x = X.clone().requires_grad_()
    rewritten = wtacrs_fx.transform(wtacrs_fx.capture(model, x), SMALL)
    assert sampled(rewritten) == {"w"}
    assert draws(rewritten) == 1


def test_a_product_that_also_reaches_an_input_stays() -> None:
    """The gradient of `x + p` goes to both: its error would reach whatever made x."""
    model = Function(lambda m, x: torch.bmm(x + m.p, x.detach().mT).tanh(), p=(1, 8))
    assert sampled(wtacrs_fx.transform(wtacrs_fx.capture(model, X.clone().requires_grad_()), SMALL)) == set()
    assert sampled(wtacrs_fx.transform(wtacrs_fx.capture(model, X), SMALL)) == {"p"}


def test_frozen_weights_have_no_site() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8))
    model[0].requires_grad_(False)
    assert sampled(wtacrs_fx.transform(wtacrs_fx.capture(model, X), SMALL)) == {"2.weight"}


def test_products_of_parameters_alone_stay() -> None:
    """A learned query has no rows of a batch: neither its gradient nor its weight's is a sum over tokens."""
    model = Function(lambda m, x: F.linear(m.q, m.w) * x, q=(16, 64), w=(8, 64))
    assert sampled(wtacrs_fx.transform(wtacrs_fx.capture(model, X), SMALL)) == set()


def test_near_misses_are_left_alone_with_a_reason() -> None:
    conv = nn.Sequential(nn.Conv2d(3, 8, 2), nn.Flatten(), nn.Linear(8 * 49, 4))
    rewritten = wtacrs_fx.transform(wtacrs_fx.capture(conv, torch.randn(64, 3, 8, 8)), SMALL)
    assert sampled(rewritten) == {"2.weight"}
    assert "convolution_backward" in reasons(rewritten)["0.weight"]
    embedding = wtacrs_fx.transform(wtacrs_fx.capture(Transformer(), torch.randint(50, (4, 32))), SMALL)
    assert "not by a matrix product" in reasons(embedding)["embed.weight"]


@pytest.mark.parametrize(
    ("policy", "reason"),
    [
        (RowsOnly(min_rows=64), "64 rows, no more than min_rows"),
        (RowsOnly(min_rows=4, exclude=("*",)), "excluded by the policy"),
        (RowsOnly(min_rows=4, ratio=1.0), "ratio 1.0"),
    ],
)
def test_what_the_policy_leaves_exact_is_not_touched(policy: Policy, reason: str) -> None:
    joint = wtacrs_fx.capture(nn.Linear(8, 6), X)
    rewritten = wtacrs_fx.transform(joint, policy)
    assert reason in reasons(rewritten)["weight"]
    assert [n.format_node() for n in rewritten.graph.nodes] == [n.format_node() for n in joint.graph.nodes]


def test_the_input_graph_is_not_changed_and_a_second_rewrite_changes_nothing() -> None:
    joint = wtacrs_fx.capture(nn.Linear(8, 6), X)
    before = str(joint.graph)
    once = wtacrs_fx.transform(joint, SMALL)
    assert str(joint.graph) == before
    again = wtacrs_fx.transform(once, SMALL)
    assert str(again.graph) == str(once.graph)
    assert "choose_rows" in once.print_readable(print_output=False)


def test_values_of_new_nodes_are_those_of_the_operations() -> None:
    rewritten = wtacrs_fx.transform(wtacrs_fx.capture(Transformer(), torch.randint(50, (4, 32))), SMALL)
    rewritten.graph.lint()
    for node in rewritten.graph.nodes:
        assert node.op == "output" or "val" in node.meta, node


@pytest.mark.parametrize("placement", ["forward", "backward"])
@pytest.mark.parametrize("where", ["x", "dy"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_is_not_hidden(placement: str, where: str, bad: float) -> None:
    class Weighted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(8, 6, bias=False)

        def forward(self, x: Tensor, factor: Tensor) -> Tensor:
            return self.linear(x) * factor

    x, factor = X.clone(), torch.ones(4, 16, 6)
    (x if where == "x" else factor)[2, 3, 1] = bad
    model = Weighted()
    joint = wtacrs_fx.capture(model, x, factor)
    rewritten = wtacrs_fx.transform(joint, RowsOnly(ratio=0.1, min_rows=4, placement=placement))
    ones = torch.ones(4, 16, 6)
    placeholders = [n for n in joint.graph.find_nodes(op="placeholder") if "tangents" not in n.name]
    by_shape = {tuple(v.shape): v for v in (model.linear.weight.detach(), x, factor)}
    values = [by_shape[tuple(n.meta["val"].shape)] for n in placeholders]
    for _ in range(5):
        exact, estimate = (
            next(g for g in torch.utils._pytree.tree_leaves(gm(values, [ones]))[1:] if g is not None)
            for gm in (joint, rewritten)
        )
        assert torch.equal(exact.isfinite(), estimate.isfinite())
        assert not exact.isfinite().all()


def test_tiny_gradients_do_not_vanish() -> None:
    """Squares of the rows underflow in float32; the weights must not."""
    model = Function(lambda m, x: F.linear(x, m.w) * 1e-30, w=(6, 8))
    joint = wtacrs_fx.capture(model, X)
    rewritten = wtacrs_fx.transform(joint, RowsOnly(min_rows=4, placement="backward"))
    exact = run_joint(joint, model, X, 1)["w"][0]
    assert is_unbiased(run_joint(rewritten, model, X, 300)["w"] * 1e30, exact * 1e30)


def test_eager_gradients_are_those_of_the_joint_graph() -> None:
    make, x, _ = CASES["linear"]
    model = make()
    model(x).backward()
    captured = run_joint(wtacrs_fx.capture(model, x), model, x, 1)["w"][0]
    torch.testing.assert_close(captured, gradients(model)["w"].flatten())


def test_centring_in_bfloat16_compiled() -> None:
    """Around a large mean an eighth of the squared error is left."""
    plain, centred = centring_errors("cpu")
    assert centred < 0.3 * plain


@pytest.mark.parametrize("size", [1e-30, 1.0, 1e30])
def test_norms_hold_where_squares_leave_float32(size: float) -> None:
    x = size * torch.tensor([[3.0, 4.0], [0.0, 0.0]])
    one, two = ops.row_norms([x]), ops.row_norms([x, x])
    assert one.dtype == torch.float32
    torch.testing.assert_close(one[0] / size, torch.tensor(5.0 if size == 1 else 4.0))
    torch.testing.assert_close(two[0] / size, torch.tensor(50**0.5 if size == 1 else 4.0))
    assert one[1] == two[1] == 0
    assert ops.row_norms([x.double()]).dtype == torch.float64
    assert ops.row_norms([torch.tensor([[torch.nan, 1.0], [torch.inf, 1.0]])]).isfinite().any() == 0
    assert ops.row_norms([x[:0]]).shape == (0,)


@pytest.mark.parametrize("size", [1e-30, 1.0, 1e30])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_norms_in_loops_are_those_of_the_operation(size: float, dtype: torch.dtype) -> None:
    x, y = (size * torch.randn(50, 8) for _ in range(2))
    x[0], x[1, 0] = 0, torch.nan
    operands = [x.to(dtype), y.to(dtype)]
    for center in (None, operands[1][2:3]):
        found = ops.norms_as_sums(operands, center, torch.float32)
        torch.testing.assert_close(found, ops.row_norms(operands, center), rtol=0.02, atol=0, equal_nan=True)


@pytest.mark.parametrize("largest", [1e-20, 1e-11, 1e-9, 1.0, 1e18])
def test_norms_hold_for_every_row_that_counts_beside_the_largest(largest: float) -> None:
    """Neither the one pass over ordinary rows nor the two over others lose 1e-9 of the largest."""
    x = torch.tensor([[largest, 0.0], [0.0, 1e-9 * largest], [0.0, 0.0]])
    torch.testing.assert_close(ops.row_norms([x]), x.amax(1), rtol=1e-4, atol=0)
    torch.testing.assert_close(ops.row_norms([x, x]), 2**0.5 * x.amax(1), rtol=0.3, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("features", [256, 100])
def test_norms_in_16_bits_are_right_and_take_no_copy_of_the_operand(
    dtype: torch.dtype, features: int
) -> None:
    sizes = torch.logspace(-4, 3, 4096).unsqueeze(-1)
    x = (torch.randn(4096, features) * sizes).to(dtype)
    x[7] = 0
    with torch.profiler.profile(profile_memory=True) as profile:
        norms = ops.row_norms([x])
    exact = torch.linalg.vector_norm(x.double(), dim=-1)
    assert norms.dtype == torch.float32
    assert ((norms - exact).abs() <= 2**-8 * exact).all()
    largest = max(event.cpu_memory_usage for event in profile.events())
    assert largest < x.nbytes  # in blocks or in chunks
    ends = torch.full((2, features), 60000.0, dtype=torch.float16)
    assert ops.row_norms([ends]).isfinite().all()


@pytest.mark.parametrize("placement", ["forward", "backward"])
@pytest.mark.parametrize("center", [False, True])
@pytest.mark.parametrize("estimator", ["rmm-rademacher", "rmm-gaussian"])
def test_random_combinations_in_the_graph(estimator: str, center: bool, placement: str) -> None:
    torch.manual_seed(0)
    model = Function(lambda m, x: F.linear(x, m.w).tanh(), w=(6, 8))
    joint = wtacrs_fx.capture(model, X)
    policy = RowsOnly(min_rows=4, placement=placement, center=center, estimator=estimator)
    rewritten = wtacrs_fx.transform(joint, policy)
    exact = run_joint(joint, model, X, 1)["w"][0]
    samples = run_joint(rewritten, model, X, 400)["w"]
    assert samples.std(0).min() > 0
    assert is_unbiased(samples, exact)


def test_combined_rows_are_stored_instead_of_all() -> None:
    model = nn.Sequential(nn.Linear(8, 16), nn.Linear(16, 4))
    policy = RowsOnly(min_rows=4, placement="forward", estimator="rmm-rademacher", include=("1",))
    site = next(s for s in wtacrs_fx.explain(model, X, policy=policy).sites if s.module == "1")
    assert site.estimator == "rmm-rademacher" and site.kept == 20
    assert (site.encoding, site.bytes_after) == ("rows", 20 * 16 * 4 + 2 * 8)  # combinations and the seed


class Attention(nn.Module):
    """One head, scores and probabilities written out."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(8, 8, bias=False) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        scores = self.q(x) @ self.k(x).mT
        return (scores.softmax(-1) @ self.v(x)).sin()


def test_attention_products_are_sampled_on_request() -> None:
    torch.manual_seed(0)
    model = Attention()
    joint = wtacrs_fx.capture(model, X)
    linears = Rule("?", ratio=1.0)
    plain = wtacrs_fx.transform(joint, RowsOnly(min_rows=4, rules=(linears,)))
    assert draws(plain) == 0 and len(plain.report.sites) == 3
    policy = RowsOnly(min_rows=4, ratio=0.5, attention=True, rules=(linears,))
    rewritten = wtacrs_fx.transform(joint, policy)
    products = [site for site in rewritten.report.sites if not site.parameter]
    assert len(products) == 4  # dQ, dK, dV over tokens, dP over features
    assert sorted(site.rows for site in products) == [8, 16, 16, 16]
    assert draws(rewritten) == 4
    exact = run_joint(joint, model, X, 1)
    for name, samples in run_joint(rewritten, model, X, 600).items():
        assert samples.std(0).max() > 0
        assert is_unbiased(samples, exact[name][0]), name


def test_attention_products_of_a_real_model() -> None:
    from transformers import T5Config, T5EncoderModel

    config = T5Config(vocab_size=50, d_model=64, d_kv=32, d_ff=128, num_layers=1, num_heads=2)
    model = T5EncoderModel(config)
    ids = torch.randint(50, (2, 64))
    policy = RowsOnly(attention=True)
    names = [
        site.module for site in wtacrs_fx.explain(model, ids, policy=policy).sampled if not site.parameter
    ]
    assert len(names) == 3 and all(name.endswith("SelfAttention") for name in names)  # 32 features are kept
