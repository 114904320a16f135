"""Option groups: built from objects and mappings, checked, stored, and built again."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import pytest

from rlhf_lightning import DPOModule, GRPOModule, PPOModule
from rlhf_lightning.rl import GAE, KLPenalty, PolicyLoss, PPOLoss, Sampling, ValueFunction
from rlhf_lightning.utils.option_groups import OptionGroup, build_group, plain_group

REWARDS: dict[str, Any] = {"rewards": ["builtins.len"]}


@dataclass(frozen=True)
class Scaled(PolicyLoss):
    scale: float = 2.0


class Undecorated(PolicyLoss):
    """Has no options of its own."""


class WithInit(PolicyLoss):
    def __init__(self, scale: float) -> None:
        super().__init__(epsilon=scale)


@dataclass(frozen=True, kw_only=True)
class Kinds(OptionGroup):
    group: ClassVar[str] = "kinds"

    whole: int = 1
    number: float | None = None
    flag: bool = False
    choice: Literal["a", "b"] | None = "a"
    texts: tuple[str, ...] = ()


@pytest.mark.parametrize("value", [{"epsilon": 0.3}, PolicyLoss(epsilon=0.3)], ids=["mapping", "object"])
def test_an_object_and_a_mapping_are_the_same(value: Any) -> None:
    module = GRPOModule("no model", loss=value, kl={"estimator": "k2"}, **REWARDS)  # type: ignore[arg-type]
    assert module.policy_loss == PolicyLoss(epsilon=0.3)
    assert module.kl == KLPenalty(estimator="k2")
    assert module.hparams["loss"] == {**plain_group(PolicyLoss(), PolicyLoss), "epsilon": 0.3}


def test_hyperparameters_are_plain_and_build_the_same_again() -> None:
    module = PPOModule(
        "no model",
        sampling=Sampling(stop=("a", "b")),
        gae=GAE(lam=0.5),
        value={"coef": 0.3},  # type: ignore[arg-type]
        loss=PPOLoss(epsilon=0.1),
        **REWARDS,
    )
    stored = dict(module.hparams)
    assert stored["sampling"]["stop"] == ["a", "b"]
    assert stored["value"] == {
        "model": None, "head": "linear", "lr_ratio": 1.0, "warmup_iterations": 0, "coef": 0.3, "cliprange": 0.2
    }  # fmt: skip
    again = PPOModule(**stored)
    assert (again.gae, again.value, again.policy_loss) == (
        GAE(lam=0.5),
        ValueFunction(coef=0.3),
        PPOLoss(epsilon=0.1),
    )
    assert again.sampling == module.sampling


def test_a_subclass_is_stored_by_its_path() -> None:
    for loss in (Scaled(scale=3.0, epsilon=0.3), Undecorated(delta=2.0)):
        plain = plain_group(loss, PolicyLoss)
        assert plain["class_path"] == f"{__name__}.{type(loss).__name__}"
        again = build_group(plain, PolicyLoss)
        assert again == loss
        assert type(again) is type(loss)


def test_a_loss_that_no_checkpoint_could_restore() -> None:
    with pytest.raises(TypeError, match="WithInit defines __init__, whose arguments a checkpoint cannot restore"):
        GRPOModule("no model", loss=WithInit(0.3), **REWARDS)


MISTAKES: list[tuple[dict[str, Any], str]] = [
    ({"loss": {"epsilonn": 0.3}}, "loss has no option 'epsilonn'; did you mean 'epsilon'?"),
    ({"loss": {"epsilon": "much"}}, "loss.epsilon is 'much'; it must be a number"),
    ({"loss": {"mask_truncated_completions": 1}}, "loss.mask_truncated_completions is 1; it must be true or false"),
    ({"loss": {"epsilon": 3.0}}, "loss.epsilon=3.0 is outside (0, 1)"),
    ({"loss": {"loss_type": "dappo"}}, "loss.loss_type is 'dappo'; it must be one of grpo,"),
    ({"loss": "text"}, "loss is 'text'; it must be a PolicyLoss or a mapping of its options, such as loss={'epsilon"),
    ({"loss": None}, "loss is None; it must be a PolicyLoss or a mapping"),
    ({"loss": {"class_path": "nowhere.MyLoss"}}, "cannot import 'nowhere.MyLoss': No module named 'nowhere'"),
    ({"loss": {"class_path": f"{__name__}.Nothing"}}, "has nothing called 'Nothing'"),
    ({"loss": {"class_path": f"{__name__}.Kinds"}}, "Kinds'; it must name a subclass of PolicyLoss"),
    ({"loss": {"class_path": f"{__name__}.Scaled", "init_args": {"scal": 1}}}, "did you mean 'scale'?"),
    ({"kl": {"estimator": "k4"}}, "kl.estimator is 'k4'; it must be one of k1, k2, k3"),
    ({"off_policy": {"min": 4.0}}, "off_policy.min=4.0 and off_policy.max=3.0 bound no weight"),
    ({"entropy": {"coef": float("nan")}}, "entropy.coef is nan; it must be finite"),
    ({"sampling": {"top_k": 1.5}}, "sampling.top_k is 1.5; it must be a whole number"),
    ({"sampling": {"stop": [3]}}, "sampling.stop is (3,); it must be a list, each a text"),
    ({"epsilon": 0.3}, "GRPOModule has no option 'epsilon'; did you mean 'loss.epsilon'?"),
    ({"top_p": 0.3}, "GRPOModule has no option 'top_p'; did you mean 'sampling.top_p'?"),
]


@pytest.mark.parametrize(("given", "message"), MISTAKES, ids=[str(given) for given, _ in MISTAKES])
def test_mistakes_are_one_line(given: dict[str, Any], message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=re.escape(message)) as error:
        GRPOModule("no model", **REWARDS, **given)
    assert "\n" not in str(error.value)


def test_flat_methods_have_no_groups() -> None:
    with pytest.raises(TypeError, match="DPOModule has no option 'betta'; did you mean 'beta'"):
        DPOModule("no model", betta=0.1)


@pytest.mark.parametrize(
    ("name", "value", "allowed"),
    [
        ("whole", 1.0, "a whole number"),
        ("whole", True, "a whole number"),
        ("number", "1", "a number or null"),
        ("number", False, "a number or null"),
        ("flag", None, "true or false"),
        ("choice", "c", "one of a, b, null"),
        ("texts", ["a"], "a list, each a text"),
        ("texts", ("a", None), "a list, each a text"),
    ],
)
def test_types_are_checked(name: str, value: Any, allowed: str) -> None:
    with pytest.raises((TypeError, ValueError), match=rf"^kinds\.{name} is .*; it must be {allowed}"):
        Kinds(**{name: value})


def test_values_of_the_right_type_pass() -> None:
    Kinds(whole=2, number=1, flag=True, choice=None, texts=("a", "b"))
    Kinds(number=2.5)
