"""Merging methods against naive computations, in fp64."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from peft.utils import merge_utils

from rlhf_lightning.merging.methods import (
    METHODS,
    Breadcrumbs,
    Dare,
    DareTies,
    Della,
    Fisher,
    GeometricMedian,
    Karcher,
    Linear,
    ModelStock,
    RegMean,
    SignConsensus,
    Slerp,
    TaskArithmetic,
    Ties,
    base,
    magnitude,
    merge_tensors,
)
from rlhf_lightning.merging.methods.base import Activations
from rlhf_lightning.merging.methods.magnitude import kth_largest

SHAPES = {"w": (6, 9), "b": (7,), "s": (), "conv": (3, 4, 2)}


def tensors(seed: int, scale: float = 1.0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        name: scale * torch.randn(shape, generator=generator, dtype=torch.float64) for name, shape in SHAPES.items()
    }


def models(count: int = 3) -> tuple[dict[str, torch.Tensor], list[dict[str, torch.Tensor]]]:
    start = tensors(0)
    return start, [{name: start[name] + 0.1 * t for name, t in tensors(1 + n).items()} for n in range(count)]


def merged(method, these, start=None, **extra):
    return merge_tensors(method, these, start, dtype=torch.float64, **extra)


def same(found, expected, tolerance=1e-12):
    assert found.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=tolerance, atol=tolerance, msg=name)


WEIGHTS = (0.2, 0.8, 0.5)


def test_linear_is_the_weighted_mean():
    _, these = models()
    expected = {n: sum(w * m[n] for w, m in zip(WEIGHTS, these, strict=True)) / sum(WEIGHTS) for n in SHAPES}
    same(merged(Linear(weights=WEIGHTS), these), expected)
    plain = {n: expected[n] * sum(WEIGHTS) for n in SHAPES}
    same(merged(Linear(weights=WEIGHTS, normalize=False), these), plain)


def test_task_arithmetic_adds_differences():
    start, these = models()
    expected = {
        n: start[n] + 0.7 * sum(w * (m[n] - start[n]) for w, m in zip(WEIGHTS, these, strict=True)) for n in SHAPES
    }
    same(merged(TaskArithmetic(weights=WEIGHTS, scale=0.7), these, start), expected)


def flat(state):
    return torch.cat([state[name].flatten() for name in SHAPES])


def naive_paper_ties(start, these, weights, density, scale):
    """Sorts, elects and averages entry by entry over the flattened model."""
    base_d = flat(start)
    deltas = [flat(m) - base_d for m in these]
    d = len(base_d)
    trimmed = []
    for delta in deltas:
        threshold = delta.abs().sort().values[d - int(density * d) - 1]  # kthvalue counts from 1
        trimmed.append([float(x) if abs(float(x)) >= float(threshold) else 0.0 for x in delta])
    signs = [math.copysign(1, s) if (s := sum(t[j] for t in trimmed)) != 0 else 0.0 for j in range(d)]
    majority = (sum(signs) > 0) - (sum(signs) < 0)
    out = []
    for j in range(d):
        sign = signs[j] or majority
        agreeing = [(w, t[j]) for w, t in zip(weights, trimmed, strict=True) if t[j] * sign > 0]
        mean = sum(w * x for w, x in agreeing) / sum(w for w, _ in agreeing) if agreeing else 0.0
        out.append(float(base_d[j]) + scale * mean)
    return torch.tensor(out, dtype=torch.float64)


@pytest.mark.parametrize("density", [0.2, 0.5, 1.0])
@pytest.mark.parametrize("weights", [(1.0, 1.0, 1.0), WEIGHTS])
def test_ties_of_the_paper(density, weights):
    start, these = models()
    method = Ties(density=density, weights=weights, scale=1.3)
    density = min(density, 1 - 1e-9)  # the naive threshold of density 1 keeps all
    expected = naive_paper_ties(start, these, weights, density, 1.3)
    torch.testing.assert_close(flat(merged(method, these, start)), expected, rtol=1e-12, atol=1e-12)


def deltas_of(start, these, name):
    return [m[name] - start[name] for m in these]


@pytest.mark.parametrize("weights", [(1.0, 1.0, 1.0), WEIGHTS])
def test_ties_of_peft(weights):
    start, these = models()
    found = merged(Ties(density=0.5, weights=weights, preset="peft"), these, start)
    weights_M = torch.tensor(weights, dtype=torch.float64)
    expected = {n: start[n] + merge_utils.ties(deltas_of(start, these, n), weights_M, 0.5) for n in SHAPES}
    same(found, expected)


@pytest.mark.parametrize("weights", [(1.0, 1.0, 1.0), (0.2, 0.8, -0.5)])
def test_ties_of_mergekit(weights):
    # By hand from its description: trim each tensor, elect on weighted sums with 0 as positive, divide by the agreeing
    # weights. tests/parity compares with the package itself.
    start, these = models()
    found = merged(Ties(density=0.4, weights=weights, preset="mergekit"), these, start)
    for name in SHAPES:
        trimmed = []
        for delta in deltas_of(start, these, name):
            values = delta.flatten()
            keep = values.abs().argsort(descending=True)[: max(1, int(0.4 * values.numel()))]
            trimmed.append(torch.zeros_like(values).index_copy(0, keep, values[keep]).reshape(delta.shape))
        weighted = torch.stack([w * t for w, t in zip(weights, trimmed, strict=True)])
        sign = torch.where(weighted.sum(0) >= 0, 1.0, -1.0)
        agrees = weighted.sign() == sign
        divisor = (agrees * torch.tensor(weights, dtype=torch.float64).view(-1, *[1] * sign.ndim)).sum(0)
        mean = (weighted * agrees).sum(0) / torch.where(divisor == 0, 1.0, divisor)
        torch.testing.assert_close(found[name], start[name] + mean, rtol=1e-12, atol=1e-12)


def test_the_conventions_of_ties_differ():
    start, these = models()
    found = [
        flat(merged(Ties(density=0.3, weights=WEIGHTS, preset=p), these, start)) for p in ("paper", "peft", "mergekit")
    ]
    assert all(not torch.allclose(a, b, rtol=1e-3) for a, b in itertools.combinations(found, 2))


def test_dare_keeps_the_expectation_and_the_masks_of_models_differ():
    start = {"w": torch.zeros(400, 50, dtype=torch.float64)}
    these = [{"w": torch.ones(400, 50, dtype=torch.float64)} for _ in range(2)]
    one = merged(Dare(density=0.3, seed=1), these[:1], start)["w"]
    assert set(one.unique().tolist()) == {0.0, 1 / 0.3}
    assert abs(float(one.mean()) - 1) < 4 * math.sqrt((1 / 0.3 - 1) / one.numel())  # four standard errors
    both = merged(Dare(density=0.3, seed=1), these, start)["w"]
    shares = [float((both == value / 0.3).double().mean()) for value in (0, 1, 2)]
    expected = [0.49, 0.42, 0.09]  # of two independent masks
    assert max(abs(a - b) for a, b in zip(shares, expected, strict=True)) < 0.015
    assert not torch.equal(one, merged(Dare(density=0.3, seed=2), these[:1], start)["w"])


def test_dare_of_mergekit_keeps_the_norm():
    start, these = models(1)
    found = merged(Dare(density=0.5, preset="mergekit"), these, start)
    for name in ("w", "conv"):
        before, after = (state[name] - start[name] for state in (these[0], found))
        assert float(after.abs().sum()) == pytest.approx(float(before.abs().sum()), rel=1e-12)
        kept = after != 0
        ratio = after[kept] / before[kept]
        assert 0 < int(kept.sum()) < kept.numel()
        torch.testing.assert_close(ratio, ratio[0].expand_as(ratio))


def test_dare_ties_is_ties_of_the_same_masks():
    start, these = models()
    sparse = []
    for number in range(3):
        alone = merged(Dare(density=0.5, seed=3), [start] * number + [these[number]], start)  # its own mask by number
        sparse.append({n: alone[n] - start[n] for n in SHAPES})
    found = merged(DareTies(density=0.5, seed=3, preset="peft"), these, start)
    for name in SHAPES:
        stacked = torch.stack([s[name] for s in sparse])
        mask = merge_utils.calculate_majority_sign_mask(stacked)
        expected = start[name] + merge_utils.disjoint_merge(stacked, mask)
        torch.testing.assert_close(found[name], expected, rtol=1e-9, atol=1e-12)


def test_della_drops_small_differences_more_often_and_keeps_the_expectation():
    start = {"w": torch.zeros(20_000, 5, dtype=torch.float64)}
    row = torch.tensor([0.3, -0.1, 0.5, -0.2, 0.4], dtype=torch.float64)
    these = [{"w": row.repeat(20_000, 1)}]
    found = merged(Della(density=0.5, epsilon=0.2, seed=4), these, start)["w"]
    # By hand: the ranks are 2, 0, 4, 1, 3, so the probabilities are .5, .3, .7, .4, .6.
    probabilities = torch.tensor([0.5, 0.3, 0.7, 0.4, 0.6], dtype=torch.float64)
    kept = found != 0
    errors = (kept.double().mean(0) - probabilities).abs()
    assert bool((errors < 4 * (probabilities * (1 - probabilities) / 20_000).sqrt()).all())
    torch.testing.assert_close(found[kept], (row / probabilities).expand_as(found)[kept])


def test_breadcrumbs_drops_both_ends():
    values = torch.tensor([5.0, -1.0, 3.0, -4.0, 2.0, 0.5, -6.0, 0.1, 0.2, 0.3], dtype=torch.float64)
    start = {"w": torch.zeros(2, 5, dtype=torch.float64)}
    found = merged(Breadcrumbs(density=0.4, gamma=0.2), [{"w": values.view(2, 5)}], start)["w"].flatten()
    # The two largest are dropped, the next four kept.
    assert found.tolist() == [0.0, -1.0, 3.0, -4.0, 2.0, 0.0, 0.0, 0.0, 0.0, 0.0]


def test_sign_consensus_keeps_entries_that_agree():
    start = {"w": torch.ones(4, dtype=torch.float64)}
    deltas = [[1.0, 1.0, -1.0, 0.0], [2.0, -2.0, -3.0, 0.0], [3.0, 4.0, 1.0, 6.0]]
    these = [{"w": 1 + torch.tensor(d, dtype=torch.float64)} for d in deltas]
    # Agreements by hand: 1, 1/3, 1/3, 1/3.
    assert merged(SignConsensus(confidence_threshold=1.0), these, start)["w"].tolist() == [3.0, 1.0, 1.0, 1.0]
    assert merged(SignConsensus(confidence_threshold=1 / 3), these, start)["w"].tolist() == [3.0, 2.0, 0.0, 3.0]


def naive_slerp(a, b, t):
    omega = math.acos(float((a.flatten() @ b.flatten()) / a.norm() / b.norm()))
    return (math.sin((1 - t) * omega) * a + math.sin(t * omega) * b) / math.sin(omega)


def test_slerp_follows_the_arc():
    a, b = {"w": tensors(1)["w"]}, {"w": tensors(2)["w"]}
    for t in (0.0, 0.3, 1.0):
        same(merged(Slerp(t=t), [a, b]), {"w": naive_slerp(a["w"], b["w"], t)})
    unit = [{"w": s["w"] / s["w"].norm()} for s in (a, b)]
    assert float(merged(Slerp(t=0.3), unit)["w"].norm()) == pytest.approx(1, abs=1e-12)


def test_slerp_of_degenerate_tensors():
    a = {"w": torch.tensor([1.0, 2.0]), "s": torch.tensor(2.0), "z": torch.zeros(2), "p": torch.tensor([1.0, 1.0])}
    b = {"w": torch.tensor([3.0, 1.0]), "s": torch.tensor(-4.0), "z": torch.ones(2), "p": torch.tensor([2.0, 2.0])}
    found = merged(Slerp(t=0.25), [a, b])
    assert float(found["s"]) == 0.5
    assert found["z"].tolist() == [0.25, 0.25]
    torch.testing.assert_close(found["p"], torch.tensor([1.25, 1.25], dtype=torch.float64))
    opposite = {"w": torch.tensor([-2.0, -4.0])}
    with pytest.raises(ValueError, match=r"'w' has opposite directions .* antiparallel='linear'"):
        merged(Slerp(t=0.5), [{"w": a["w"]}, opposite])
    linear = merged(Slerp(t=0.5, antiparallel="linear"), [{"w": a["w"]}, opposite])
    assert linear["w"].tolist() == [-0.5, -1.0]


def log_map(at, point):
    cosine = float(at @ point)
    across = point - cosine * at
    return across / across.norm() * math.acos(cosine)


def test_karcher_meets_its_condition_and_is_slerp_for_two():
    vectors = [tensors(n)["w"] for n in range(1, 5)]
    weights = (0.1, 0.2, 0.3, 0.4)
    found = merged(Karcher(weights=weights), [{"w": v} for v in vectors])["w"].flatten()
    direction = found / found.norm()
    gradient = sum(w * log_map(direction, v.flatten() / v.norm()) for w, v in zip(weights, vectors, strict=True))
    assert float(gradient.norm()) < 1e-9
    norms = sum(w * float(v.norm()) for w, v in zip(weights, vectors, strict=True))
    assert float(found.norm()) == pytest.approx(norms, rel=1e-12)

    units = [{"w": v / v.norm()} for v in vectors[:2]]
    same(merged(Karcher(), units), merged(Slerp(t=0.5), units), 1e-9)


def test_karcher_refuses_directions_that_cancel():
    a = torch.tensor([1.0, 2.0])
    with pytest.raises(ValueError, match="the directions of the tensor 'w' cancel"):
        merged(Karcher(), [{"w": a}, {"w": -a}])


def test_geometric_median_minimises_distances():
    points = [tensors(n)["w"] for n in range(4)] + [50 + tensors(9)["w"]]
    found = merged(GeometricMedian(), [{"w": p} for p in points])["w"]
    variable = found.clone().requires_grad_()
    sum((variable - p).norm() for p in points).backward()
    assert float(variable.grad.norm()) < 1e-6
    assert float((found - points[0]).norm()) < 12  # the outlier hardly counts: its distance is 367

    # By hand: the median of three points on a line is the middle one, and of two equal and one other, the equal ones.
    line = [{"w": torch.tensor([x])} for x in (0.0, 1.0, 10.0)]
    assert float(merged(GeometricMedian(), line)["w"]) == pytest.approx(1.0, abs=1e-6)
    equal = [{"w": torch.tensor([1.0, 1.0])}] * 3
    assert merged(GeometricMedian(), equal)["w"].tolist() == [1.0, 1.0]


def test_model_stock_of_two_and_three():
    start, these = models()
    for count in (2, 3):
        found = merged(ModelStock(), these[:count], start)
        for name in ("w", "conv"):
            deltas = [d.flatten() for d in deltas_of(start, these[:count], name)]
            pairs = [float(a @ b / a.norm() / b.norm()) for a, b in itertools.combinations(deltas, 2)]
            cosine = sum(pairs) / len(pairs)
            t = max(0.0, count * cosine / (1 + (count - 1) * cosine))
            mean = sum(m[name] for m in these[:count]) / count
            torch.testing.assert_close(found[name], t * mean + (1 - t) * start[name], rtol=1e-12, atol=1e-12)


def test_fisher_weighs_entries():
    _, these = models(2)
    information = [{n: t.abs() for n, t in tensors(20 + k).items()} for k in range(2)]
    found = merged(Fisher(weights=(1.0, 2.0), floor=1e-12), these, fisher=information)
    expected = {
        n: (information[0][n] * these[0][n] + 2 * information[1][n] * these[1][n])
        / (information[0][n] + 2 * information[1][n])
        for n in SHAPES
    }
    same(found, expected, 1e-6)
    equal = [{n: torch.ones(shape) for n, shape in SHAPES.items()}] * 2
    same(merged(Fisher(), these, fisher=equal), merged(Linear(), these))
    nothing = [{n: torch.zeros(shape) for n, shape in SHAPES.items()}] * 2
    same(merged(Fisher(), these, fisher=nothing), merged(Linear(), these))


@pytest.mark.parametrize("transposed", [False, True])
def test_regmean_is_least_squares(transposed):
    generator = torch.Generator().manual_seed(5)
    inputs = [torch.randn(40, 9, generator=generator, dtype=torch.float64) for _ in range(3)]
    weights = [torch.randn(6, 9, generator=generator, dtype=torch.float64) for _ in range(3)]
    # The solution by lstsq on the stacked inputs and outputs of all models.
    solution = torch.linalg.lstsq(
        torch.cat(inputs), torch.cat([x @ w.T for x, w in zip(inputs, weights, strict=True)])
    ).solution.T
    stored = [{"w": w.T.contiguous() if transposed else w} for w in weights]
    activations = {"w": Activations([x.T @ x / len(x) for x in inputs], transposed)}
    found = merged(RegMean(shrinkage=1.0, ridge=0.0), stored, activations=activations)["w"]
    torch.testing.assert_close(found, solution.T if transposed else solution, rtol=1e-10, atol=1e-10)

    # Without off-diagonal entries every column is a weighted mean.
    squares = [(x * x).mean(0) for x in inputs]
    diagonal = sum(w * s for w, s in zip(weights, squares, strict=True)) / sum(squares)
    found = merged(RegMean(shrinkage=0.0, ridge=0.0), stored, activations=activations)["w"]
    torch.testing.assert_close(found, diagonal.T if transposed else diagonal, rtol=1e-10, atol=1e-10)


def test_regmean_names_a_layer_with_dependent_inputs():
    x = torch.ones(5, 2, dtype=torch.float64)
    activations = {"w": Activations([x.T @ x] * 2)}
    stored = [{"w": torch.ones(3, 2, dtype=torch.float64)}, {"w": torch.zeros(3, 2, dtype=torch.float64)}]
    with pytest.raises(ValueError, match="layer 'w' are linearly dependent"):
        merged(RegMean(shrinkage=1.0, ridge=0.0), stored, activations=activations)
    assert torch.isfinite(merged(RegMean(), stored, activations=activations)["w"]).all()


# Of all methods.

DEFAULTS = {
    "slerp": Slerp(t=0.4),
    "dare": Dare(density=0.6),
    "dare_ties": DareTies(density=0.6),
    "della": Della(density=0.6),
    "breadcrumbs": Breadcrumbs(density=0.6, gamma=0.1),
    **{f"ties-{p}": Ties(density=0.3, preset=p) for p in ("paper", "peft", "mergekit")},
    "dare-mergekit": Dare(density=0.6, preset="mergekit"),
}


def all_methods():
    return {**{name: METHODS[name]() for name in METHODS if name not in DEFAULTS and name != "ties"}, **DEFAULTS}


def extras(method, count):
    if isinstance(method, Fisher):
        return {"fisher": [{n: t.abs() for n, t in tensors(20 + k).items()} for k in range(count)]}
    if isinstance(method, RegMean):
        x = torch.randn(30, 9, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        return {"activations": {"w": Activations([x.T @ x / 30 * (k + 1) for k in range(count)])}}
    return {}


@pytest.mark.parametrize("name", sorted(all_methods()))
def test_blocks_change_nothing(name, monkeypatch):
    method = all_methods()[name]
    start, these = models(2)
    given = {} if not method.needs_base else {"start": start}
    extra = extras(method, 2)
    whole = merged(method, these, **given, **extra)
    monkeypatch.setattr(base, "BLOCK_ELEMENTS", 18)  # two rows of "w"
    pieces = merged(method, these, **given, **extra)
    if name in ("dare", "dare_ties", "della", "dare-mergekit"):  # masks are drawn block by block
        assert pieces.keys() == whole.keys()
        same({n: pieces[n] for n in ("b", "s")}, {n: whole[n] for n in ("b", "s")}, 0)
    else:
        same(pieces, whole, 1e-13)


@pytest.mark.parametrize("name", sorted(set(all_methods()) - {"slerp", "dare", "dare_ties", "della", "dare-mergekit"}))
def test_the_order_of_models_does_not_matter(name):
    method = all_methods()[name]
    start, these = models(3)
    given = {"start": start} if method.needs_base else {}
    extra = extras(method, 3)
    turned = {
        "fisher": lambda v: [v[2], v[0], v[1]],
        "activations": lambda v: {n: Activations([a.products[2], a.products[0], a.products[1]]) for n, a in v.items()},
    }
    other = merged(method, [these[2], these[0], these[1]], **given, **{k: turned[k](v) for k, v in extra.items()})
    same(other, merged(method, these, **given, **extra), 1e-9)


@pytest.mark.parametrize(
    "method",
    [
        TaskArithmetic(),
        *[Ties(density=1.0, preset=p) for p in ("paper", "peft", "mergekit")],
        Dare(density=1.0),
        DareTies(density=1.0),
        Breadcrumbs(density=1.0, gamma=0.0),
        SignConsensus(),
        Linear(),
        Karcher(),
        GeometricMedian(),
    ],
    ids=str,
)
def test_one_model_is_itself(method):
    start, these = models(1)
    same(merged(method, these, start), these[0], 1e-9)


@pytest.mark.parametrize(
    "name", ["task_arithmetic", "ties", "dare", "dare_ties", "della", "breadcrumbs", "sign_consensus"]
)
def test_scale_0_is_the_base(name):
    start, these = models()
    same(merged(METHODS[name](scale=0.0), these, start), start, 0)


@pytest.fixture
def small_selection(monkeypatch):
    """Settings under which tensors of a few thousand elements are selected from as large ones are."""
    monkeypatch.setattr(magnitude, "_WHOLE", 100)
    monkeypatch.setattr(magnitude, "_SAMPLE", 200)
    monkeypatch.setattr(base, "BLOCK_ELEMENTS", 999)


def check_kth_largest(views, values, k):
    for found, model in zip(kth_largest(views, k, len(values)), values, strict=True):
        ordered = model.abs().flatten().sort(descending=True).values
        assert found.value == float(ordered[k - 1])
        assert found.above == int((model.abs() > ordered[k - 1]).sum())
        assert found.equal == int((model.abs() == ordered[k - 1]).sum())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_kth_largest_is_exact_on_large_tensors(dtype, small_selection):
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(3, 500, 40, generator=generator, dtype=dtype)
    values[0].view(-1)[::7] = 0.5  # many equal ones
    values[1] = values[1].flatten().sort().values.view(500, 40)  # an even sample of sorted rows tells little
    values[2, :450] = 0.0  # as of a model whose rows were mostly not trained
    view = base.view_of(list(values), torch.zeros(500, 40), dtype=dtype)
    for k in (1, 2, 17, 1000, 4321, 10_000, 19_999, 20_000):
        check_kth_largest([view], values, k)
    rows = [
        base.view_of([v[n : n + 100] for v in values], torch.zeros(100, 40), dtype=dtype) for n in range(0, 500, 100)
    ]
    assert kth_largest(rows, 4321, 3) == kth_largest([view], 4321, 3)


@pytest.mark.parametrize("bracket", [(0.0, 0.1), (0.1, 0.1), (2.0, 2.5), (0.0, 9.0), (0.5, 0.5)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_sample_that_misses_costs_a_pass_and_no_exactness(bracket, dtype, small_selection, monkeypatch):
    values = torch.randn(1, 50, 40, generator=torch.Generator().manual_seed(1), dtype=dtype)
    values.view(-1)[::5] = -0.5
    view = base.view_of(list(values), torch.zeros(50, 40), dtype=dtype)
    number = np.float32 if dtype == torch.float32 else np.float64
    wrong = magnitude._Bracket(*map(number, bracket))
    monkeypatch.setattr(magnitude, "_sampled_brackets", lambda *rest: [wrong])
    monkeypatch.setattr(magnitude, "_BINS", 8)
    for k in (1, 3, 700, 1500, 2000):
        check_kth_largest([view], values, k)


@pytest.mark.parametrize("preset", ["peft", "mergekit"])
def test_of_equal_differences_the_first_are_kept(preset, small_selection):
    # As of bf16 weights: few distinct differences, so that the threshold is one of many.
    delta = torch.randint(-3, 4, (2, 90, 50), generator=torch.Generator().manual_seed(2)).float()
    found = merge_tensors(Ties(density=0.4, preset=preset), [{"w": delta[0]}], {"w": torch.zeros(90, 50)})["w"]
    order = delta[0].flatten().abs().argsort(descending=True, stable=True)[: int(0.4 * 4500)]
    expected = torch.zeros(4500).index_copy(0, order, delta[0].flatten()[order]).view(90, 50)
    assert torch.equal(found, expected)


def test_differences_that_cancel_take_the_sign_of_the_majority():
    start = {"w": torch.zeros(6, dtype=torch.float64)}
    one = torch.tensor([1.0, -1.0, -2.0, -3.0, 0.0, 0.0], dtype=torch.float64)
    other = torch.tensor([-1.0, -1.0, -2.0, -3.0, 0.0, 4.0], dtype=torch.float64)
    # Three entries elect minus and one plus, so the first, which cancels, becomes -1 under the paper's convention.
    these = [{"w": one}, {"w": other}]
    found = {p: merged(Ties(density=1.0, preset=p), these, start)["w"].tolist() for p in ("paper", "peft", "mergekit")}
    assert found["paper"] == [-1.0, -1.0, -2.0, -3.0, 0.0, 4.0]
    assert found["peft"] == found["mergekit"] == [1.0, -1.0, -2.0, -3.0, 0.0, 4.0]
    third = merged(Ties(density=1.0), [{"w": torch.zeros(6)}, *these], start)["w"].tolist()
    assert third == found["paper"]


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: Ties(density=0.0), r"density is 0.0; it must be in \(0, 1\]"),
        (lambda: Ties(preset="papr"), "did you mean 'paper'"),
        (lambda: Slerp(t=1.5), r"t is 1.5; it must be in \[0, 1\]"),
        (lambda: Linear(weights=(1.0, -1.0)), "whose sum is 0"),
        (lambda: Linear(weights=(1.0, math.nan)), "finite"),
        (lambda: Della(density=0.1), "epsilon is 0.15 with density=0.1"),
        (lambda: Breadcrumbs(density=0.9, gamma=0.2), "gamma is 0.2 with density=0.9"),
        (lambda: Karcher(weights=(1.0, -1.0)), "positive"),
        (lambda: merge_tensors(Linear(weights=(1.0,)), [{}, {}]), "weights has 1 numbers for 2 models"),
        (lambda: merge_tensors(Slerp(), [{}] * 3), "between 2 models, and was given 3"),
        (lambda: merge_tensors(Ties(), [{}]), "give base="),
    ],
)
def test_bad_options_are_errors(build, message):
    with pytest.raises(ValueError, match=message):
        build()
