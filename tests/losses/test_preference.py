"""The DPO family against scalar formulas in plain Python, hand-derived numbers and numerical derivatives."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import get_args

import pytest
import torch
from torch import Tensor

from rlhf_lightning.losses.preference import (
    F_DIVERGENCE_LOSSES,
    F_DIVERGENCE_TYPES,
    LOSS_TYPES,
    LOSSES,
    SMOOTHED,
    PreferenceLossType,
    f_divergence_score,
    ld_alpha_logps,
    preference_loss,
    validate_preference_loss,
    wpo_weights,
)

BETA, EPSILON, TAU = 0.3, 0.2, 0.05


# Every loss with every divergence that has a meaning for it.
COMBINATIONS = [
    (loss_type, f_divergence_type)
    for loss_type in LOSS_TYPES
    for f_divergence_type in (F_DIVERGENCE_TYPES if loss_type in F_DIVERGENCE_LOSSES else ("reverse_kl",))
]


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def log_loss(x: float, epsilon: float = 0.0) -> float:
    return -(1 - epsilon) * math.log(sigmoid(x)) - epsilon * math.log(sigmoid(-x))


# A pair's loss from its rewards (c, r), log-ratios (hc, hr) and lengths (lc, lr), where it depends on no other pair.
SCALAR: dict[str, Callable[..., float]] = {
    "sigmoid": lambda c, r, e, **_: log_loss(c - r, e),
    "sigmoid_norm": lambda c, r, e, lc, lr, **_: log_loss(c / lc - r / lr, e),
    "hinge": lambda c, r, **_: max(0.0, 1 - (c - r)),
    "ipo": lambda hc, hr, lc, lr, **_: (hc / lc - hr / lr - 1 / (2 * BETA)) ** 2,
    "exo_pair": lambda c, r, e, **_: (
        sigmoid(c - r) * math.log(sigmoid(c - r) / (1 - e)) + sigmoid(r - c) * math.log(sigmoid(r - c) / e)
    ),
    "nca_pair": lambda c, r, **_: log_loss(c) + log_loss(-c) / 2 + log_loss(-r) / 2,
    "robust": lambda c, r, e, **_: ((1 - e) * log_loss(c - r) - e * log_loss(r - c)) / (1 - 2 * e),
    "sppo_hard": lambda hc, hr, **_: (hc - 1 / (2 * BETA)) ** 2 + (hr + 1 / (2 * BETA)) ** 2,
    "apo_zero": lambda c, r, **_: 1 - sigmoid(c) + sigmoid(r),
    "apo_down": lambda c, r, **_: sigmoid(c) + 1 - sigmoid(c - r),
    "discopop": lambda c, r, **_: (
        (1 - sigmoid((c - r) / TAU)) * log_loss(c - r) + sigmoid((c - r) / TAU) * math.exp(r - c)
    ),
    "sft": lambda pc, **_: -pc,
}


def make_pairs(num_pairs: int = 6, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(7)
    logps = -10 + 3 * torch.randn(4, num_pairs, generator=generator, dtype=torch.float64)
    names = ("chosen_logps", "rejected_logps", "ref_chosen_logps", "ref_rejected_logps")
    pairs = {name: row.to(dtype) for name, row in zip(names, logps, strict=True)}
    pairs["chosen_lengths"] = torch.randint(1, 9, (num_pairs,), generator=generator)
    pairs["rejected_lengths"] = torch.randint(1, 9, (num_pairs,), generator=generator)
    return pairs


def loss_of(pairs: dict[str, Tensor], loss_type: str, **options: object) -> Tensor:
    smoothing = EPSILON if loss_type in SMOOTHED else 0.0
    defaults = {"beta": BETA, "label_smoothing": smoothing, "discopop_tau": TAU}
    return preference_loss(**pairs, loss_type=loss_type, **(defaults | options))


@pytest.mark.parametrize("loss_type", sorted(SCALAR))
def test_value_is_that_of_the_scalar_formula(loss_type: str) -> None:
    pairs = make_pairs()
    expected = []
    for pc, pr, qc, qr, lc, lr in zip(*(tensor.tolist() for tensor in pairs.values()), strict=True):
        hc, hr = pc - qc, pr - qr
        terms = {"c": BETA * hc, "r": BETA * hr, "hc": hc, "hr": hr, "lc": lc, "lr": lr, "pc": pc, "e": EPSILON}
        expected.append(SCALAR[loss_type](**terms))
    torch.testing.assert_close(loss_of(pairs, loss_type), torch.tensor(expected, dtype=torch.float64))


WHERE_POLICY_IS_REFERENCE = {
    "sigmoid": math.log(2),
    "sigmoid_norm": math.log(2),
    "hinge": 1.0,
    "ipo": 25.0,
    "exo_pair": -0.5 * math.log(4 * 0.2 * 0.8),
    "nca_pair": 2 * math.log(2),
    "robust": math.log(2),
    "bco_pair": 2 * math.log(2),
    "sppo_hard": 50.0,
    "aot": math.log(2),
    "aot_unpaired": math.log(2),
    "apo_zero": 1.0,
    "apo_down": 1.0,
    "discopop": 0.5 * math.log(2) + 0.5,
    "sft": 3.0,
}


@pytest.mark.parametrize(("loss_type", "f_divergence_type"), COMBINATIONS)
def test_value_where_policy_is_reference(loss_type: str, f_divergence_type: str) -> None:
    logps = torch.tensor([-3.0], dtype=torch.float64)
    pairs = make_pairs(1) | {name: logps for name in make_pairs(1) if name.endswith("logps")}
    loss = loss_of(pairs, loss_type, beta=0.1, f_divergence_type=f_divergence_type)
    assert loss.item() == pytest.approx(WHERE_POLICY_IS_REFERENCE[loss_type], rel=1e-12)


def test_hand_derived_gradient_of_dpo() -> None:
    # d/dm of -log S(m) at m = 0.1 * 2 is -S(-0.2).
    pairs = {name: torch.zeros(1, dtype=torch.float64) for name in list(make_pairs())[:4]}
    pairs["chosen_logps"] = torch.tensor([2.0], dtype=torch.float64, requires_grad=True)
    pairs["rejected_logps"].requires_grad_()
    ones = torch.ones(1)
    preference_loss(**pairs, chosen_lengths=ones, rejected_lengths=ones, beta=0.1).sum().backward()
    assert pairs["chosen_logps"].grad.item() == pytest.approx(-0.1 * 0.45016600268752216)
    assert pairs["rejected_logps"].grad.item() == pytest.approx(0.1 * 0.45016600268752216)


# BCO holds a mean constant, which a numerical derivative does not: its gradient has a test of its own.
@pytest.mark.parametrize(("loss_type", "f_divergence_type"), [pair for pair in COMBINATIONS if pair[0] != "bco_pair"])
def test_gradient_is_the_numerical_derivative(loss_type: str, f_divergence_type: str) -> None:
    pairs = make_pairs(4)

    def loss(chosen_logps: Tensor, rejected_logps: Tensor) -> Tensor:
        changed = pairs | {"chosen_logps": chosen_logps, "rejected_logps": rejected_logps}
        return loss_of(changed, loss_type, f_divergence_type=f_divergence_type, f_alpha_divergence_coef=0.3)

    leaves = [pairs[name].clone().requires_grad_() for name in ("chosen_logps", "rejected_logps")]
    assert torch.autograd.gradcheck(loss, leaves)


def test_bco_shifts_rewards_by_their_batch_mean_and_holds_it_constant() -> None:
    pairs = make_pairs(3)
    chosen = pairs["chosen_logps"].requires_grad_()
    rewards = [
        [BETA * (p - q) for p, q in zip(pairs[name].tolist(), pairs[f"ref_{name}"].tolist(), strict=True)]
        for name in ("chosen_logps", "rejected_logps")
    ]
    delta = (sum(rewards[0]) + sum(rewards[1])) / 6
    expected = [log_loss(c - delta) + log_loss(delta - r) for c, r in zip(*rewards, strict=True)]
    loss = loss_of(pairs, "bco_pair")
    torch.testing.assert_close(loss, torch.tensor(expected, dtype=torch.float64))
    loss.sum().backward()
    # Were the mean differentiated, each entry would hold a share of every pair's derivative.
    slope = torch.tensor([-BETA * sigmoid(delta - c) for c in rewards[0]], dtype=torch.float64)
    torch.testing.assert_close(chosen.grad, slope)


def test_aot_matches_sorted_batches_and_answers_in_the_order_of_the_policy() -> None:
    pairs = make_pairs(5)
    policy = [c - r for c, r in zip(pairs["chosen_logps"].tolist(), pairs["rejected_logps"].tolist(), strict=True)]
    reference = sorted((pairs["ref_chosen_logps"] - pairs["ref_rejected_logps"]).tolist())
    expected = [log_loss(BETA * (value - reference[sorted(policy).index(value)]), EPSILON) for value in policy]
    torch.testing.assert_close(loss_of(pairs, "aot"), torch.tensor(expected, dtype=torch.float64))


def test_unpaired_aot_matches_sorted_batches() -> None:
    pairs = make_pairs(5)
    chosen = (pairs["chosen_logps"] - pairs["ref_chosen_logps"]).tolist()
    rejected = sorted((pairs["rejected_logps"] - pairs["ref_rejected_logps"]).tolist())
    expected = [log_loss(BETA * (value - rejected[sorted(chosen).index(value)]), EPSILON) for value in chosen]
    torch.testing.assert_close(loss_of(pairs, "aot_unpaired"), torch.tensor(expected, dtype=torch.float64))


def test_ties_in_a_sort_break_by_position() -> None:
    zeros = torch.zeros(3, dtype=torch.float64)
    reference = torch.tensor([3.0, 1.0, 2.0], dtype=torch.float64)
    loss = preference_loss(
        zeros, zeros, reference, zeros, chosen_lengths=zeros + 1, rejected_lengths=zeros + 1, loss_type="aot", beta=1.0
    )
    expected = torch.tensor([log_loss(-1.0), log_loss(-2.0), log_loss(-3.0)], dtype=torch.float64)
    torch.testing.assert_close(loss, expected)
    rejected = zeros.clone().requires_grad_()
    chosen = torch.tensor([5.0, 1.0, 3.0], dtype=torch.float64)
    loss = preference_loss(
        chosen, rejected, zeros, zeros, chosen_lengths=zeros + 1, rejected_lengths=zeros + 1, loss_type="aot_unpaired"
    )
    loss.sum().backward()
    # Equal rejected ratios rank 0, 1, 2; the chosen of rank 0 is 1.0, of rank 1 is 3.0.
    expected = torch.tensor([0.1 * sigmoid(-0.1 * chosen) for chosen in (1.0, 3.0, 5.0)], dtype=torch.float64)
    torch.testing.assert_close(rejected.grad, expected)


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_only_coupled_losses_depend_on_the_other_pairs(loss_type: str) -> None:
    pairs = make_pairs(4)
    together = loss_of(pairs, loss_type)
    alone = torch.cat([loss_of({k: v[i : i + 1] for k, v in pairs.items()}, loss_type) for i in range(4)])
    assert torch.allclose(together, alone, rtol=1e-12) == (not LOSSES[loss_type].couples_pairs)


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_values_follow_the_order_of_the_pairs(loss_type: str) -> None:
    pairs, order = make_pairs(5), torch.tensor([3, 0, 4, 1, 2])
    permuted = loss_of({name: tensor[order] for name, tensor in pairs.items()}, loss_type)
    torch.testing.assert_close(permuted, loss_of(pairs, loss_type)[order])


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_an_empty_share_gives_an_empty_loss(loss_type: str) -> None:
    empty = {name: tensor[:0] for name, tensor in make_pairs(2).items()}
    assert loss_of(empty, loss_type).shape == (0,)


@pytest.mark.parametrize("loss_type", sorted(set(LOSS_TYPES) - {"exo_pair"}))
def test_smoothing_changes_the_losses_said_to_read_it(loss_type: str) -> None:
    pairs = make_pairs()
    plain, smoothed = (loss_of(pairs, loss_type, label_smoothing=epsilon) for epsilon in (0.0, 0.1))
    assert torch.equal(plain, smoothed) == (loss_type not in SMOOTHED)


def test_only_sft_is_divided_by_tokens() -> None:
    assert {name for name, spec in LOSSES.items() if spec.divided_by == "chosen_tokens"} == {"sft"}
    assert set(SCALAR) | {name for name, spec in LOSSES.items() if spec.couples_pairs} == set(LOSS_TYPES)


def test_every_name_is_in_the_table_and_in_the_docstring() -> None:
    assert get_args(PreferenceLossType) == tuple(LOSSES) == LOSS_TYPES
    formulas = re.findall(r"^ {8}(\w+)  +\S", preference_loss.__doc__ or "", flags=re.MULTILINE)
    assert sorted(formulas) == sorted(LOSSES)


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_other_divergences_have_a_meaning_where_losses_read_differences_of_scores_alone(loss_type: str) -> None:
    """Log-ratios that all move by the same amount change no such loss, and neither do losses that couple pairs.

    Of the latter, ``bco_pair`` takes off a mean and the sorted ones match pairs apart, without f-divergences.
    """
    pairs = make_pairs()
    pairs["rejected_lengths"] = pairs["chosen_lengths"]
    moved = pairs | {name: pairs[name] - 3.0 for name in ("ref_chosen_logps", "ref_rejected_logps")}
    unchanged = torch.allclose(loss_of(moved, loss_type), loss_of(pairs, loss_type), rtol=1e-9)
    assert unchanged == (LOSSES[loss_type].f_divergence or LOSSES[loss_type].couples_pairs)


def test_sft_takes_plain_sums_where_they_are_given() -> None:
    pairs = make_pairs(2)
    plain = torch.tensor([-1.5, -2.5], dtype=torch.float64)
    assert loss_of(pairs, "sft", sft_logps=plain).tolist() == [1.5, 2.5]


@pytest.mark.parametrize(("loss_type", "f_divergence_type"), COMBINATIONS)
@pytest.mark.parametrize("tau", [0.05, 5.0])
def test_extreme_margins_stay_finite_in_fp32(loss_type: str, f_divergence_type: str, tau: float) -> None:
    sizes = torch.tensor([1e4, 100.0, 1.0, 0.0])
    ratios = torch.cartesian_prod(torch.cat([sizes, -sizes]), torch.cat([sizes, -sizes]))
    chosen, rejected = (column.clone().requires_grad_() for column in ratios.T)
    zeros, ones = torch.zeros(len(ratios)), torch.ones(len(ratios))
    loss = preference_loss(
        chosen,
        rejected,
        zeros,
        zeros,
        chosen_lengths=ones,
        rejected_lengths=ones,
        loss_type=loss_type,
        beta=1.0,
        label_smoothing=1e-3,
        f_divergence_type=f_divergence_type,
        discopop_tau=tau,
    )
    loss.sum().backward()
    for tensor in (loss, chosen.grad, rejected.grad):
        if tensor is not None:
            assert tensor.isfinite().all()


def test_extreme_margins_keep_their_asymptotes() -> None:
    chosen = torch.tensor([-1e4, 1e4], requires_grad=True)
    zeros, ones = torch.zeros(2), torch.ones(2)
    options = {"chosen_lengths": ones, "rejected_lengths": ones, "beta": 1.0}
    loss = preference_loss(chosen, zeros, zeros, zeros, **options)
    assert loss.tolist() == [1e4, 0.0]
    (gradient,) = torch.autograd.grad(loss.sum(), chosen)
    assert gradient.tolist() == [-1.0, 0.0]
    # DiscoPOP leaves the exponential for the logistic where the margin is negative.
    assert preference_loss(chosen, zeros, zeros, zeros, loss_type="discopop", **options).tolist() == [1e4, 0.0]


@pytest.mark.parametrize(
    ("f_divergence_type", "alpha", "derivative"),
    [
        ("reverse_kl", 0.5, lambda u: math.log(u)),
        ("forward_kl", 0.5, lambda u: 1 - 1 / u),
        ("js_divergence", 0.5, lambda u: math.log(2 * u / (1 + u))),
        ("alpha_divergence", 0.3, lambda u: (1 - u**-0.3) / 0.3),
        ("alpha_divergence", 0.0, lambda u: math.log(u)),
        ("alpha_divergence", 1.0, lambda u: 1 - 1 / u),
    ],
)
def test_f_divergence_scores(f_divergence_type: str, alpha: float, derivative: Callable[[float], float]) -> None:
    ratios = torch.tensor([1e-6, 0.2, 1.0, 3.0, 1e3], dtype=torch.float64)
    expected = torch.tensor([derivative(u) for u in ratios.tolist()], dtype=torch.float64)
    torch.testing.assert_close(f_divergence_score(ratios.log(), f_divergence_type, alpha), expected)


def test_alpha_divergence_approaches_the_reverse_kl() -> None:
    logratios = torch.linspace(-5, 5, 11)
    torch.testing.assert_close(f_divergence_score(logratios, "alpha_divergence", 1e-6), logratios, rtol=1e-5, atol=0)


def test_a_score_beyond_the_largest_exponent_continues_along_its_tangent() -> None:
    # Value and slope at log u = -30 are -(e^30 - 1) and e^30; ten further along, the tangent is at -(11 e^30 - 1).
    logratio = torch.tensor([-40.0], dtype=torch.float64, requires_grad=True)
    score = f_divergence_score(logratio, "forward_kl")
    (slope,) = torch.autograd.grad(score, logratio)
    assert score.item() == pytest.approx(-(11 * math.exp(30) - 1), rel=1e-12)
    assert slope.item() == pytest.approx(math.exp(30), rel=1e-12)


def test_ld_alpha_weights_what_exceeds_the_shorter_completion() -> None:
    rows = [[-1.0, -2.0, -3.0, -4.0], [-0.5, -0.25]]
    public, alpha = min(len(row) for row in rows), 0.3
    expected = [sum(rows[0][:public]) + alpha * sum(rows[0][public:]), sum(rows[1])]
    # Tokens come in any order; what counts is where each stands in its completion.
    order = [5, 0, 3, 1, 4, 2]
    flat = [(value, s, t) for s, row in enumerate(rows) for t, value in enumerate(row)]
    values, index, position = (torch.tensor(column) for column in zip(*(flat[i] for i in order), strict=True))
    values.requires_grad_()
    logps = ld_alpha_logps(values, index, position, public_lengths_S=torch.tensor([public, public]), ld_alpha=alpha)
    assert logps.tolist() == pytest.approx(expected)
    logps.sum().backward()
    assert values.grad.tolist() == pytest.approx([1.0 if flat[i][2] < public else alpha for i in order])


def test_wpo_weights_are_those_of_the_full_distributions() -> None:
    logits = torch.randn(5, 7, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    probabilities, targets, index = logits.softmax(-1), [3, 0, 6, 2, 2], [0, 1, 0, 1, 1]
    logprobs = torch.stack([probabilities[n, target] for n, target in enumerate(targets)]).log().requires_grad_()
    weights = wpo_weights(logprobs, probabilities.square().sum(-1).log(), torch.tensor(index), num_sequences=3)
    expected = []
    for sequence in (0, 1):
        rows = [n for n in range(5) if index[n] == sequence]
        product = 1.0
        for n in rows:
            product *= probabilities[n, targets[n]].item() / sum(p**2 for p in probabilities[n].tolist())
        expected.append(product ** (1 / len(rows)))
    assert weights.tolist() == pytest.approx([*expected, 1.0])
    assert not weights.requires_grad


MESSAGES = [
    (
        {"loss_type": "sigmiod"},
        "loss_type is 'sigmiod'; it must be one of sigmoid, hinge, ipo, exo_pair, nca_pair, "
        "robust, bco_pair, sppo_hard, aot, aot_unpaired, apo_zero, apo_down, discopop, sft, sigmoid_norm; did you mean "
        "'sigmoid'?",
    ),
    ({"loss_type": []}, "loss_type is an empty list: name at least one loss, such as 'sigmoid'"),
    (
        {"f_divergence_type": "forward"},
        "f_divergence_type is 'forward'; it must be one of reverse_kl, forward_kl, js_divergence, alpha_divergence; "
        "did you mean 'forward_kl'?",
    ),
    (
        {"loss_type": "nca_pair", "f_divergence_type": "forward_kl"},
        "f_divergence_type 'forward_kl' is not defined for loss_type 'nca_pair': use 'reverse_kl', or one of discopop, "
        "exo_pair, hinge, ipo, robust, sft, sigmoid, sigmoid_norm",
    ),
    ({"beta": -0.1}, "beta is -0.1; it must be above 0 (0.1 is usual)"),
    ({"beta": float("nan")}, "beta is nan; it must be above 0 and finite (0.1 is usual)"),
    ({"discopop_tau": 0.0}, "discopop_tau is 0.0; it must be above 0 (0.05 is usual)"),
    (
        {"label_smoothing": 0.5},
        "label_smoothing is 0.5; it must be in [0, 0.5) (0 is off; else the rate of wrong labels)",
    ),
    (
        {"loss_type": "exo_pair"},
        "loss_type 'exo_pair' needs label_smoothing above 0, got 0: use 0.001, as its paper does",
    ),
    (
        {"loss_type": ["hinge", "sft"], "label_smoothing": 0.1},
        "label_smoothing=0.1 changes nothing in loss_type hinge, sft: set it to 0, or use one of aot, aot_unpaired, "
        "exo_pair, robust, sigmoid, sigmoid_norm",
    ),
    (
        {"f_alpha_divergence_coef": 2.0},
        "f_alpha_divergence_coef=2.0 is outside [0, 1]: 0 is the reverse KL, 1 the forward KL; 0.5 is usual",
    ),
    (
        {"loss_type": ["sigmoid", "sft"], "weights": [1.0]},
        "1 loss_weights for 2 loss types: give one weight for each",
    ),
    ({"weights": [-1.0]}, "loss_weights=[-1.0]: give finite numbers of at least 0, one of them above 0"),
    ({"weights": [0.0]}, "loss_weights=[0.0]: give finite numbers of at least 0, one of them above 0"),
    ({"ld_alpha": 1.5}, "ld_alpha=1.5 is outside [0, 1]: null or 1 keeps every token, 0 drops the longer tail"),
    (
        {"loss_type": "aot", "use_weighting": True},
        "use_weighting=True weights pairs, which loss_type 'aot' takes apart: set it to false, or use another loss",
    ),
]


@pytest.mark.parametrize(("options", "message"), MESSAGES)
def test_refusals(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        validate_preference_loss(**({"loss_type": "sigmoid"} | options))


def test_the_loss_itself_refuses_what_it_cannot_compute() -> None:
    pairs = make_pairs(2)
    with pytest.raises(ValueError, match=r"^beta is 0; it must be above 0 \(0\.1 is usual\)$"):
        loss_of(pairs, "sigmoid", beta=0)
    message = (
        "chosen_logps has shape (2,) and rejected_logps (2, 1): give all of chosen_logps, rejected_logps, "
        "ref_chosen_logps, ref_rejected_logps, chosen_lengths, rejected_lengths the shape (P,)"
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        loss_of(pairs | {"rejected_logps": pairs["rejected_logps"][:, None]}, "sigmoid")
    with pytest.raises(ValueError, match=r"^ld_alpha=-1 is outside \[0, 1\]: 1 keeps every token"):
        ld_alpha_logps(
            torch.zeros(1),
            torch.tensor([0]),
            torch.tensor([0]),
            public_lengths_S=torch.tensor([1]),
            ld_alpha=-1,
        )
