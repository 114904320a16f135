"""Policy-gradient losses, advantages and corrections against TRL 1.16's own methods, run on stand-ins for a trainer."""

from __future__ import annotations

import itertools
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from rlhf_lightning.losses.kl import kl_per_token
from rlhf_lightning.losses.off_policy import (
    engine_correction_weights,
    entropy_bonus_loss,
    off_policy_mask,
    top_entropy_mask,
    top_entropy_threshold,
)
from rlhf_lightning.losses.policy_gradient import (
    aggregation_weights,
    clip_statistics,
    importance_ratio,
    policy_gradient_loss,
)
from rlhf_lightning.rl.advantages import combine_rewards, gdpo_advantages, group_advantages

pytest.importorskip("trl")

from trl import GRPOTrainer, RLOOTrainer

NAN = float("nan")
LENGTHS = (4, 7, 1, 5)
WIDTH, MAX_COMPLETION_LENGTH = 7, 9
SHARED_TYPES = ("grpo", "dr_grpo", "dapo", "bnpo", "cispo", "sapo", "luspo")


class Accelerator:
    """One process."""

    device = torch.device("cpu")
    num_processes = 1
    process_index = 0
    sync_gradients = True

    def gather(self, tensor: Tensor) -> Tensor:
        return tensor

    def pad_across_processes(self, tensor: Tensor, dim: int, pad_index: float) -> Tensor:
        return tensor

    def reduce(self, tensor: Tensor, reduction: str) -> Tensor:
        return tensor


class Metrics(dict[str, Any]):
    def __missing__(self, key: str) -> Any:
        self[key] = value = [] if "/" in key or key in FLAT_METRICS else Metrics()
        return value


FLAT_METRICS = {"kl", "entropy", "cispo_clip_ratio", "policy_loss", "entropy_coef", "reward", "reward_std"} | {
    "frac_reward_zero_std"
}


def mask() -> Tensor:
    return torch.arange(WIDTH) < torch.tensor(LENGTHS)[:, None]


def draw(seed: int, spread: float = 0.4) -> dict[str, Tensor]:
    """Padded tensors, (4, 7), as TRL holds them."""
    generator = torch.Generator().manual_seed(seed)

    def normal() -> Tensor:
        return torch.randn(len(LENGTHS), WIDTH, generator=generator, dtype=torch.float64)

    old = -normal().abs() * 2
    return {
        "new": (old + spread * normal()).requires_grad_(),
        "old": old,
        "ref": old + spread * normal(),
        "engine": old + spread * normal(),
        "entropies": normal().abs().requires_grad_(),
        "advantages": torch.randn(len(LENGTHS), generator=generator, dtype=torch.float64),
    }


def trl_loss(data: dict[str, Tensor], settings: dict[str, Any], with_engine: bool) -> tuple[Tensor, dict[str, Any]]:
    arguments = {
        "delta": settings.get("delta"),
        "use_bias_correction_kl": settings.get("use_bias_correction_kl", False),
        "sapo_temperature_pos": 1.0,
        "sapo_temperature_neg": 1.05,
    }
    metrics: dict[str, Any] = Metrics()
    trainer = SimpleNamespace(
        args=SimpleNamespace(**arguments, steps_per_generation=1),
        accelerator=Accelerator(),
        model=SimpleNamespace(training=True),
        _get_per_token_logps_and_entropies=lambda *_, **__: (data["new"], data["entropies"], None),
        get_off_policy_mask=GRPOTrainer.get_off_policy_mask,
        aux_loss_enabled=False,
        beta=settings.get("beta", 0.0),
        top_entropy_quantile=settings.get("top_entropy_quantile", 1.0),
        off_policy_mask_threshold=settings.get("off_policy_mask_threshold"),
        importance_sampling_level=settings.get("level", "token"),
        loss_type=settings["loss_type"],
        epsilon_low=settings.get("epsilon", 0.2),
        epsilon_high=settings.get("epsilon_high", 0.2),
        use_vllm=with_engine,
        vllm_importance_sampling_correction=with_engine,
        current_gradient_accumulation_steps=1,
        max_completion_length=MAX_COMPLETION_LENGTH,
        _entropy_bonus_enabled="entropy_coef" in settings,
        use_adaptive_entropy=False,
        entropy_coef=settings.get("entropy_coef", 0.0),
        _metrics=metrics,
    )
    trainer.get_high_entropy_mask = lambda *a: GRPOTrainer.get_high_entropy_mask(trainer, *a)
    completion_mask = mask().double()
    inputs = {
        "prompt_ids": torch.zeros(4, 2, dtype=torch.long),
        "prompt_mask": torch.ones(4, 2, dtype=torch.long),
        "completion_ids": torch.zeros(4, WIDTH, dtype=torch.long),
        "completion_mask": completion_mask,
        "advantages": data["advantages"],
        "old_per_token_logps": data["old"],
        "ref_per_token_logps": data["ref"],
        "num_items_in_batch": completion_mask.sum(),
    }
    if with_engine:
        inputs["sampling_per_token_logps"] = data["engine"]
        inputs["importance_sampling_ratio"] = settings["engine_ratio"]
    return GRPOTrainer._compute_loss(trainer, None, inputs), metrics["train"]


class Ours:
    """The same batch in the flat layout, its tokens shuffled."""

    def __init__(self, data: dict[str, Tensor], settings: dict[str, Any]) -> None:
        self.settings = settings
        order = torch.randperm(sum(LENGTHS), generator=torch.Generator().manual_seed(9))
        self.index = torch.repeat_interleave(torch.arange(4), torch.tensor(LENGTHS))[order]
        self.tokens = {key: value[mask()][order] for key, value in data.items() if key != "advantages"}
        self.advantages = data["advantages"][self.index]
        self.where = {"sequence_index_N": self.index, "num_sequences": 4}
        self.options = {k: v for k, v in settings.items() if k in ("epsilon", "epsilon_high")}
        self.level = settings.get("level", "token")

    def ratio(self) -> Tensor:
        return importance_ratio(self.tokens["new"], old_logprobs_N=self.tokens["old"], level=self.level, **self.where)

    def weights(self) -> Tensor:
        weights = aggregation_weights(
            self.settings["loss_type"],
            torch.tensor(LENGTHS),
            total_sequences=4,
            total_tokens=sum(LENGTHS),
            max_completion_length=MAX_COMPLETION_LENGTH,
            dtype=torch.float64,
        )
        return weights[self.index]

    def kl(self) -> Tensor:
        corrected = self.settings.get("use_bias_correction_kl", False)
        return kl_per_token(
            self.tokens["new"],
            ref_logprobs_N=self.tokens["ref"],
            estimator="k3",
            importance_ratio_N=self.ratio() if corrected else None,
        )

    def loss(self, engine_mode: str | None = None) -> Tensor:
        settings, tokens = self.settings, self.tokens
        loss_N = policy_gradient_loss(
            tokens["new"],
            old_logprobs_N=tokens["old"],
            advantages_N=self.advantages,
            loss_type=settings["loss_type"],
            delta=settings.get("delta"),
            importance_sampling_level=self.level,
            **self.options,
            **self.where,
        )
        entropy_mask = None
        if "off_policy_mask_threshold" in settings:
            loss_N = loss_N * off_policy_mask(
                tokens["new"],
                sampling_logprobs_N=tokens["old" if engine_mode is None else "engine"],
                advantages_N=self.advantages,
                threshold=settings["off_policy_mask_threshold"],
                **self.where,
            )
        if "top_entropy_quantile" in settings:
            threshold = top_entropy_threshold(tokens["entropies"], top_fraction=settings["top_entropy_quantile"])
            entropy_mask = top_entropy_mask(tokens["entropies"], threshold=threshold)
            loss_N = loss_N * entropy_mask
        if engine_mode is not None:
            loss_N = loss_N * engine_correction_weights(
                tokens["old"],
                engine_logprobs_N=tokens["engine"],
                mode=engine_mode,
                minimum=0.7,
                maximum=1.4,
                **self.where,
            )
        if "beta" in settings:
            loss_N = loss_N + settings["beta"] * self.kl()
        loss = (loss_N * self.weights()).sum()
        if "entropy_coef" in settings:
            total = len(self.index) if entropy_mask is None else entropy_mask.sum()
            bonus_N = entropy_bonus_loss(tokens["entropies"], coef=settings["entropy_coef"], mask_N=entropy_mask)
            loss = loss + bonus_N.sum() / total
        return loss


def assert_same_loss_and_gradients(
    data: dict[str, Tensor], theirs: Tensor, ours: Tensor, entropies: bool = False
) -> None:
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)
    leaves = [data["new"], *([data["entropies"]] if entropies else [])]
    for got, want in zip(torch.autograd.grad(ours, leaves), torch.autograd.grad(theirs, leaves), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-12)
        assert want.abs().max() > 0


SETTINGS: list[dict[str, Any]] = [
    *({"loss_type": t, "level": level} for t, level in itertools.product(SHARED_TYPES, ("token", "sequence"))),
    *({"loss_type": t, "epsilon": 0.1, "epsilon_high": 0.3} for t in SHARED_TYPES if t != "cispo"),
    {"loss_type": "cispo", "epsilon_high": 5.0},
    {"loss_type": "cispo", "epsilon_high": 1.1},
    *({"loss_type": t, "delta": 1.3} for t in ("grpo", "dapo", "luspo")),
    *(
        {"loss_type": t, "beta": 0.2, "use_bias_correction_kl": corrected, "level": level}
        for t, corrected, level in itertools.product(("grpo", "dapo", "luspo"), (True, False), ("token", "sequence"))
    ),
    *({"loss_type": t, "top_entropy_quantile": 0.4, "beta": 0.1} for t in ("grpo", "dapo", "cispo")),
    *({"loss_type": t, "off_policy_mask_threshold": 0.05} for t in ("grpo", "dapo")),
]
# TRL reads epsilon_high as a bound of the ratio for cispo and defaults it to epsilon, below 1; ours must be at least 1.
for settings in SETTINGS:
    if settings["loss_type"] == "cispo":
        settings.setdefault("epsilon_high", 5.0)


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_loss_and_gradient(settings: dict[str, Any]) -> None:
    data = draw(0)
    theirs, metrics = trl_loss(data, settings, with_engine=False)
    ours = Ours(data, settings)
    assert_same_loss_and_gradients(data, theirs, ours.loss())
    if "beta" in settings:
        assert metrics["kl"] == [pytest.approx(ours.kl().mean().item())]


def test_gspo_is_their_grpo_with_ratios_of_sequences() -> None:
    data = draw(1)
    theirs, _ = trl_loss(data, {"loss_type": "grpo", "level": "sequence"}, with_engine=False)
    assert_same_loss_and_gradients(data, theirs, Ours(data, {"loss_type": "gspo", "level": "sequence"}).loss())


@pytest.mark.parametrize(
    "settings", [{"loss_type": "dapo"}, {"loss_type": "grpo", "top_entropy_quantile": 0.3}], ids=str
)
def test_entropy_bonus(settings: dict[str, Any]) -> None:
    data = draw(2)
    settings = {**settings, "entropy_coef": 0.05}
    theirs, _ = trl_loss(data, settings, with_engine=False)
    assert_same_loss_and_gradients(data, theirs, Ours(data, settings).loss(), entropies=True)


@pytest.mark.parametrize("level", ["token", "sequence"])
def test_clip_ratios(level: str) -> None:
    data = draw(3)
    epsilon, epsilon_high = (0.1, 0.2) if level == "token" else (0.01, 0.02)
    settings = {"loss_type": "dapo", "level": level, "epsilon": epsilon, "epsilon_high": epsilon_high}
    _, metrics = trl_loss(data, settings, with_engine=False)
    ours = Ours(data, settings)
    got = clip_statistics(
        ours.ratio(),
        advantages_N=ours.advantages,
        epsilon=epsilon,
        epsilon_high=epsilon_high,
        per_sequence=level == "sequence",
        **ours.where,
    )
    total = got.count_S.sum()
    assert metrics["clip_ratio/low_mean"] == [pytest.approx((got.low_S.sum() / total).item())]
    assert metrics["clip_ratio/high_mean"] == [pytest.approx((got.high_S.sum() / total).item())]
    assert metrics["clip_ratio/low_min"] == [pytest.approx((got.low_S / got.count_S).min().item())]
    assert metrics["clip_ratio/high_max"] == [pytest.approx((got.high_S / got.count_S).max().item())]
    assert (got.low_S + got.high_S).sum() > 0


class Generation:
    """Runs TRL's scoring of completions on given rewards and log-probabilities."""

    model = SimpleNamespace(training=True, is_gradient_checkpointing=False)

    def __init__(self, rewards: list[list[float]], num_generations: int, weights: list[float]) -> None:
        self.rewards = torch.tensor(rewards, dtype=torch.float64)
        self.num_generations = num_generations
        self.weights = torch.tensor(weights, dtype=torch.float64)

    def outputs(self, trainer_class: type, data: dict[str, Tensor] | None = None, **settings: Any) -> dict[str, Tensor]:
        num_samples = len(self.rewards)
        lengths = LENGTHS if data is not None else [2] * num_samples
        engine = None if data is None else [row[:n].tolist() for row, n in zip(data["engine"], lengths, strict=True)]
        old = torch.zeros(num_samples, max(lengths)) if data is None else data["old"]
        completions = [[5] * n for n in lengths]
        common = {
            "accelerator": Accelerator(),
            "model": self.model,
            "args": SimpleNamespace(
                per_device_train_batch_size=num_samples,
                gradient_accumulation_steps=1,
                steps_per_generation=1,
                gradient_checkpointing_kwargs=None,
            ),
            "_tokenizer": SimpleNamespace(pad_token_id=0),
            "pad_token_id": 0,
            "eos_token_id": 5,
            "num_iterations": 1,
            "beta": 0.0,
            "num_generations": self.num_generations,
            "reward_weights": self.weights,
            "reward_func_names": [f"f{k}" for k in range(len(self.weights))],
            "reward_funcs": [None] * len(self.weights),
            "_calculate_rewards": lambda *_: self.rewards.clone(),
            "_get_per_token_logps_and_entropies": lambda *_, **__: (old, None, None),
            "_metrics": {"train": Metrics()},
            "_logs": {name: [] for name in ("prompt", "completion", "advantages", "images")}
            | {"rewards": {f"f{k}": [] for k in range(len(self.weights))}, "extra": {}},
            "_pending_extra_logs": {},
            "_pending_metrics": {},
            "reward_clip_range": None,
            "use_vllm": data is not None,
            "vllm_importance_sampling_correction": data is not None,
            "log_multimodal": False,
        }
        for absent in ("environment_factories", "environments", "tools", "pad_to_multiple_of", "ref_model"):
            common[absent] = None
        for off in ("mask_truncated_completions", "_is_vlm", "normalize_advantages"):
            common[off] = False
        generated = ([[1]] * num_samples, completions, None, completions, engine, {}, None, None)
        if trainer_class is RLOOTrainer:
            generated = ([[1]] * num_samples, completions, completions)
        trainer = SimpleNamespace(**{**common, **settings}, _generate=lambda prompts: generated)
        method = trainer_class._generate_and_score_completions
        return method(trainer, [{"prompt": "p"} for _ in range(num_samples)])


REWARDS = [[1.0], [0.0], [0.5], [0.2], [NAN], [2.0], [1.0], [2.0], [3.0], [3.0], [3.0], [3.0]]


# Their sample standard deviation takes n / (n - 1) in fp32 whatever the rewards are.
CLOSE = {"rtol": 1e-7, "atol": 1e-12}


class TestAdvantages:
    index = torch.repeat_interleave(torch.arange(3), 4)

    @pytest.mark.parametrize("scale_rewards", ["group", "batch", "none"])
    def test_groups(self, scale_rewards: str) -> None:
        theirs = Generation(REWARDS, 4, [1.0]).outputs(
            GRPOTrainer, multi_objective_aggregation="sum_then_normalize", scale_rewards=scale_rewards
        )
        rewards = combine_rewards(torch.tensor(REWARDS, dtype=torch.float64), weights_K=torch.ones(1))
        got = group_advantages(rewards, group_index_S=self.index, num_groups=3, scale_rewards=scale_rewards)
        torch.testing.assert_close(got.advantages_S, theirs["advantages"], **CLOSE)

    def test_gdpo(self) -> None:
        rewards = [[a[0], b] for a, b in zip(REWARDS, [10.0, NAN, 30.0, -5.0] * 3, strict=True)]
        rewards[5] = [NAN, NAN]
        theirs = Generation(rewards, 4, [1.0, 0.3]).outputs(
            GRPOTrainer, multi_objective_aggregation="normalize_then_sum", scale_rewards="group"
        )
        got = gdpo_advantages(
            torch.tensor(rewards, dtype=torch.float64),
            weights_K=torch.tensor([1.0, 0.3], dtype=torch.float64),
            group_index_S=self.index,
            num_groups=3,
        )
        torch.testing.assert_close(got.advantages_S, theirs["advantages"], **CLOSE)

    def test_leave_one_out(self) -> None:
        theirs = Generation(REWARDS, 4, [1.0]).outputs(RLOOTrainer)
        got = group_advantages(
            torch.tensor(REWARDS, dtype=torch.float64)[:, 0],
            group_index_S=self.index,
            num_groups=3,
            scale_rewards="none",
            baseline="leave_one_out",
        )
        torch.testing.assert_close(got.advantages_S, theirs["advantages"], **CLOSE)


@pytest.mark.parametrize("mode", ["token_truncate", "token_mask", "sequence_truncate", "sequence_mask"])
def test_engine_correction(mode: str) -> None:
    data = draw(4)
    data["engine"] = (0.5 * data["engine"] + 0.5 * data["old"]).float().double()
    theirs = Generation([[0.0]] * 4, 4, [1.0]).outputs(
        GRPOTrainer,
        data,
        multi_objective_aggregation="sum_then_normalize",
        scale_rewards="none",
        vllm_importance_sampling_mode=mode,
        vllm_importance_sampling_clip_min=0.7,
        vllm_importance_sampling_clip_max=1.4,
    )["importance_sampling_ratio"]
    settings = {"loss_type": "dapo", "engine_ratio": theirs.double(), "off_policy_mask_threshold": 0.05}
    ours = Ours(data, settings)
    loss, _ = trl_loss(data, settings, with_engine=True)
    assert_same_loss_and_gradients(data, loss, ours.loss(engine_mode=mode))
