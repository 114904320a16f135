"""The methods of the matrix: how each is built, and on which rows. A new method is one more entry here."""

from __future__ import annotations

import fcntl
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from rlhf_lightning import (
    ContextCompressionModule,
    DPOModule,
    KTOModule,
    ProcessRewardModule,
    RewardModule,
    SFTModule,
    SimPOModule,
)
from rlhf_lightning.core import PostTrainingModule
from rlhf_lightning.datamodules.unpaired import mismatch
from rlhf_lightning.distributed.collectives import gather_objects
from rlhf_lightning.models import ContextCompressor
from rlhf_lightning.sequences import Example, Segment, grow_tree
from rlhf_lightning.sequences.branching import WeightedPath

from ..rl.fixed_rollouts import FixedGRPO, FixedPPO, by_step, picky, prompts, remainder
from ..rl.fixed_trees import FixedReplayGRPO, FixedSearchGRPO, FixedSearchPPO, FixedTreeGRPO, FixedTreePPO

VOCAB = 60
# Updates are seen as differences of weights: where gradients are small, small steps would drown in their rounding.
LARGE_STEPS = partial(torch.optim.SGD, lr=20.0)


@dataclass(frozen=True)
class Method:
    """A method with options.

    Args:
        module: its class.
        rows: makes ``n`` examples of its contract.
        options: of the module.
    """

    module: type[PostTrainingModule]
    rows: Callable[[int], list[Example]]
    options: dict[str, Any] = field(default_factory=dict)


def _tokens(rng: np.random.Generator, low: int, high: int) -> np.ndarray:
    return rng.integers(3, VOCAB, size=int(rng.integers(low, high)))


def _completion(rng: np.random.Generator, low: int = 1, high: int = 12) -> Segment:
    tokens = _tokens(rng, low, high)
    return Segment(tokens, np.ones(len(tokens)))


def demonstrations(count: int) -> list[Example]:
    """Prompts with one completion; some rows weight only some of their tokens."""
    rng = np.random.default_rng(1)
    rows = []
    for n in range(count):
        completion = _completion(rng, 2, 14)
        if n % 3 == 2:
            completion = Segment(completion.tokens, rng.integers(0, 2, len(completion.tokens)))
        rows.append(Example(f"rows:{n}", Segment(_tokens(rng, 1, 9), children=(completion,))))
    return rows


def pairs(count: int) -> list[Example]:
    """Prompts with a chosen and a rejected completion."""
    rng = np.random.default_rng(2)
    return [
        Example(f"rows:{n}", Segment(_tokens(rng, 1, 9), children=(_completion(rng), _completion(rng))))
        for n in range(count)
    ]


def labelled(count: int) -> list[Example]:
    """Prompts with a completion, a label, and the completion of another prompt where there is one."""
    rows = [
        Example(e.row_id, Segment(e.root.tokens, children=e.root.children[:1]), {"label": n % 3 != 0})
        for n, e in enumerate(pairs(count))
    ]
    return mismatch(rows)


def solutions(count: int) -> list[Example]:
    """Prompts with a solution of one to four labelled steps."""
    rng, rows = np.random.default_rng(3), []
    for n in range(count):
        lengths = rng.integers(1, 5, size=int(rng.integers(1, 5)))
        weights = np.zeros(int(lengths.sum()))
        weights[lengths.cumsum() - 1] = 1
        completion = Segment(rng.integers(3, VOCAB, size=len(weights)), weights)
        fields = {"labels": rng.random(len(lengths)).round(2).tolist()}
        rows.append(Example(f"rows:{n}", Segment(_tokens(rng, 1, 9), children=(completion,)), fields))
    return rows


def step_pairs(count: int) -> list[Example]:
    """Prompts with two solutions of one to four steps."""
    first, second = solutions(2 * count)[::2], solutions(2 * count)[1::2]
    return [
        Example(a.row_id, Segment(a.root.tokens, children=(*a.root.children, *b.root.children)))
        for a, b in zip(first, second, strict=True)
    ]


def rated(count: int) -> list[Example]:
    """Demonstrations with two ratings, some of them missing."""
    rows = demonstrations(count)
    return [Example(e.row_id, e.root, {"good": n / 3, "long": None if n % 2 else 2.0}) for n, e in enumerate(rows)]


def _turns(rng: np.random.Generator, prompt: np.ndarray) -> list[WeightedPath]:
    """The paths of a conversation: after every other turn what was said is shown otherwise than it was generated."""
    paths, context = [], prompt
    for number in range(int(rng.integers(1, 4))):
        answer = _tokens(rng, 1, 7)
        tokens = np.concatenate([context, answer])
        paths.append((tokens, (np.arange(len(tokens)) >= len(context)).astype(np.float32)))
        shown = answer[1:] if number % 2 == 0 else answer
        context = np.concatenate([context, shown, _tokens(rng, 1, 5)])
    return paths


def conversations(count: int) -> list[Example]:
    """Chats whose turns have contexts that do not extend one another."""
    rng = np.random.default_rng(4)
    return [Example(f"rows:{n}", grow_tree([_turns(rng, _tokens(rng, 2, 6))])) for n in range(count)]


def chat_pairs(count: int) -> list[Example]:
    """Prompts with a chosen and a rejected completion of one to three turns."""
    rng, rows = np.random.default_rng(5), []
    for n in range(count):
        prompt = _tokens(rng, 2, 6)
        rows.append(Example(f"rows:{n}", grow_tree([_turns(rng, prompt), _turns(rng, prompt)], prompt)))
    return rows


def labelled_chats(count: int) -> list[Example]:
    """Completions of one to three turns, each with a label and another row's answer."""
    rng, rows = np.random.default_rng(6), []
    for n in range(count):
        prompt = _tokens(rng, 2, 6)
        rows.append(Example(f"rows:{n}", grow_tree([_turns(rng, prompt)], prompt), {"label": n % 3 != 0}))
    return mismatch(rows)


def contexts(count: int) -> list[Example]:
    """Contexts of one to four segments, each with one or two demonstrations; some rows have the same context."""
    rng, rows = np.random.default_rng(7), []
    shared = rng.integers(3, VOCAB, size=13)
    for n, row in enumerate(demonstrations(count)):
        context = shared if n % 3 == 1 else _tokens(rng, 4, 24)
        other = Segment(_tokens(rng, 1, 6), children=(_completion(rng),))
        prompts = [row.root, other] if n % 2 else [row.root]
        rows.append(Example(row.row_id, Segment(context, children=prompts), {"context": ""}))
    return rows


def asked_contexts(count: int) -> list[Example]:
    """Contexts that are read together with their only prompt."""
    rows = contexts(count)
    return [Example(row.row_id, Segment(row.root.tokens, children=row.root.children[:1]), row.fields) for row in rows]


class MovedKTO(KTOModule):
    """A policy that is less sure of itself than its reference: a KL estimate of 0 would couple nothing."""

    def configure_model(self) -> None:
        if self.model is not None:
            return
        super().configure_model()
        with torch.no_grad():
            self.model.get_output_embeddings().weight.mul_(0.8)


def rollouts(**options: Any) -> dict[str, Any]:
    """Options of a method that samples; what it samples is fixed, so that the rest can be compared."""
    rewards = {"rewards": [remainder, picky], "reward_weights": [1.0, 0.5]}
    return {**rewards, "num_generations": 4, "max_completion_length": 10, **options}


STEPS = {"init_args": {"step_separator": None, "max_step_tokens": 3, "budget": {"expansions": 4}}}

METHODS: dict[str, Method] = {
    "sft": Method(SFTModule, demonstrations),
    "sft-smooth": Method(SFTModule, demonstrations, {"label_smoothing": 0.1}),
    "sft-dft": Method(SFTModule, demonstrations, {"loss_type": "dft"}),
    "dpo": Method(DPOModule, pairs),
    "dpo-rpo": Method(DPOModule, pairs, {"loss_type": ["ipo", "sft"], "loss_weights": [1.0, 0.5]}),
    "dpo-coupled": Method(DPOModule, pairs, {"loss_type": ["aot", "aot_unpaired", "bco_pair"]}),
    "dpo-ld-wpo": Method(DPOModule, pairs, {"ld_alpha": 0.3, "use_weighting": True, "label_smoothing": 0.1}),
    "simpo": Method(SimPOModule, pairs, {"beta": 10.0}),
    "simpo-alphapo": Method(SimPOModule, pairs, {"loss_type": "alphapo", "label_smoothing": 0.1}),
    "simpo-orpo": Method(SimPOModule, pairs, {"loss_type": "orpo", "beta": 0.3}),
    "kto": Method(MovedKTO, labelled, {"desirable_weight": 1.3}),
    "kto-apo": Method(MovedKTO, labelled, {"loss_type": "apo_zero_unpaired"}),
    "reward": Method(RewardModule, pairs, {"margin": 0.2, "center_rewards_coefficient": 0.05}),
    "reward-ensemble": Method(RewardModule, pairs, {"num_models": 3, "head": "mlp", "pooling": "mean"}),
    "reward-adapters": Method(
        RewardModule, pairs, {"num_models": 2, "ensemble": "adapters", "lora": {"r": 2, "lora_dropout": 0.0}}
    ),
    "reward-ratings": Method(RewardModule, rated, {"loss_type": "huber", "attributes": ["good", "long"]}),
    "process": Method(ProcessRewardModule, solutions, {"labels": "soft", "outcome_head": True}),
    "process-tokens": Method(
        ProcessRewardModule, solutions, {"labels": "soft", "head": "tokens", "boundaries": "learned"}
    ),
    "process-pairs": Method(
        ProcessRewardModule,
        step_pairs,
        {"learn_from": "pairs", "outcome_head": True, "step_weight": 0.5, "aggregation": "product"},
    ),
    "sft-turns": Method(SFTModule, conversations),
    "dpo-turns": Method(DPOModule, chat_pairs, {"loss_type": ["ipo", "sft"], "loss_weights": [1.0, 0.5]}),
    "simpo-turns": Method(SimPOModule, chat_pairs, {"beta": 10.0}),
    "kto-turns": Method(MovedKTO, labelled_chats),
    "reward-turns": Method(RewardModule, chat_pairs, {"margin": 0.2, "num_models": 2}),
    "grpo": Method(FixedGRPO, prompts, rollouts(beta=0.1, entropy={"coef": 0.05}, optimizer=LARGE_STEPS)),
    "grpo-coupled": Method(
        FixedGRPO,
        prompts,
        rollouts(
            loss={"loss_type": "grpo", "mask_truncated_completions": True},
            advantages={"scale_rewards": "batch"},
            entropy={"top_quantile": 0.4},
            off_policy={"correction": "token_truncate"},
        ),
    ),
    "grpo-gdpo": Method(
        FixedGRPO,
        prompts,
        rollouts(
            loss={"loss_type": "gspo"},
            advantages={"multi_objective_aggregation": "normalize_then_sum"},
            num_updates=2,
        ),
    ),
    "grpo-steps": Method(FixedGRPO, prompts, rollouts(process_reward=by_step, optimizer=LARGE_STEPS)),
    "grpo-tree": Method(
        FixedTreeGRPO,
        prompts,
        rollouts(
            beta=0.1,
            entropy={"coef": 0.05},
            tree={"comparison": "subtree", "depth_discount": 0.9, "visit_weights": "log", "preference": 0.3},
            optimizer=LARGE_STEPS,
        ),
    ),
    "grpo-tree-coupled": Method(
        FixedTreeGRPO,
        prompts,
        rollouts(
            loss={"loss_type": "grpo", "mask_truncated_completions": True},
            advantages={"scale_rewards": "batch"},
            tree={"comparison": "sibling"},
            process_reward=by_step,
            entropy={"top_quantile": 0.4},
            off_policy={"correction": "token_truncate"},
        ),
    ),
    "grpo-search": Method(
        FixedSearchGRPO,
        prompts,
        rollouts(
            beta=0.1,
            tree={
                "rollouts": ["samples", STEPS | {"class_path": "mcts"}, STEPS | {"class_path": "beam"}],
                "comparison": "sibling",
                "visit_weights": "linear",
                "preference": 0.2,
            },
            off_policy={"correction": "token_truncate"},
            optimizer=partial(torch.optim.SGD, lr=100.0),
        ),
    ),
    "grpo-replay": Method(
        FixedReplayGRPO,
        prompts,
        rollouts(
            loss={"loss_type": "grpo"},
            off_policy={
                "correction": "sequence_truncate",
                "replay_capacity": 12,
                "replay_share": 0.3,
                "replay_priority": "frontier",
            },
            optimizer=partial(torch.optim.SGD, lr=100.0),
        ),
    ),
    "ppo": Method(
        FixedPPO, prompts, rollouts(kl_coef=0.2, num_updates=1, entropy={"coef": 0.1}, optimizer=LARGE_STEPS)
    ),
    "ppo-whitened": Method(
        FixedPPO,
        prompts,
        rollouts(
            num_updates=1,
            num_mini_batches=2,
            process_reward=by_step,
            gae={"whiten_rewards": True},
            optimizer=partial(torch.optim.SGD, lr=3.0),
        ),
    ),
    "ppo-tree": Method(
        FixedTreePPO,
        prompts,
        rollouts(
            kl_coef=0.2,
            num_updates=1,
            process_reward=by_step,
            gae={"whiten_rewards": True},
            entropy={"coef": 0.1},
            optimizer=partial(torch.optim.SGD, lr=3.0),
        ),
    ),
    "ppo-search": Method(
        FixedSearchPPO,
        prompts,
        rollouts(
            num_updates=1,
            tree={"rollouts": ["samples", STEPS | {"class_path": "mcts"}, STEPS | {"class_path": "beam"}]},
            off_policy={"correction": "token_truncate"},
            optimizer=LARGE_STEPS,
        ),
    ),
}


def behind(method: type[PostTrainingModule]) -> type[PostTrainingModule]:
    """A method behind a compressor of its model, which is made next to the model's folder."""

    class Behind(method):  # type: ignore[valid-type, misc]
        def __init__(self, model: str, **options: Any) -> None:
            place = Path(f"{model}-compressor")
            with Path(f"{model}-lock").open("w") as lock:
                if not dist.is_initialized():  # ranks that know of each other write together, or not at all
                    fcntl.flock(lock, fcntl.LOCK_EX)
                if not all(gather_objects(place.exists())):
                    made = ContextCompressor.from_pretrained(model, ratio=4, segment_length=8, encoder_rank=0)
                    made.save_pretrained(place)
            super().__init__(model, compressor=str(place), **options)

    return Behind


def after_contexts(make: Callable[[int], list[Example]]) -> Callable[[int], list[Example]]:
    """Rows that follow contexts of one to four segments, some of them equal."""

    def made(count: int) -> list[Example]:
        texts = [row.root.tokens.tolist() for row in contexts(count)]
        return [
            Example(row.row_id, row.root, {**row.fields, "context": text})
            for row, text in zip(make(count), texts, strict=True)
        ]

    return made


# Methods that run in the packed layout alone.
PACKED: dict[str, Method] = {
    "compression": Method(
        ContextCompressionModule,
        contexts,
        {"ratio": 2, "segment_length": 6, "encoder_rank": 2, "kl_coef": 0.5, "autoencoding_coef": 0.3},
    ),
    "compression-decoder": Method(
        ContextCompressionModule,
        contexts,
        {"ratio": 4, "segment_length": 8, "recurrence": "replace", "placement": "end", "encoder_rank": 0}
        | {"pooling": "attention"}
        | {"train_decoder": True, "kl_coef": 0.3, "continuation_coef": 0.8},
    ),
    "compression-condensed": Method(
        ContextCompressionModule,
        asked_contexts,
        {"ratio": 2, "segment_length": 4, "condense_every": 2, "reads_query": True, "encoder_rank": 2, "kl_coef": 0.5},
    ),
}

PACKED |= {
    f"{name}-behind": Method(behind(METHODS[name].module), after_contexts(METHODS[name].rows), METHODS[name].options)
    for name in ("sft", "dpo", "simpo", "kto", "grpo", "ppo")
}

# Mixtures of experts with a loss on their routers, which compute in fp32 alone.
_BALANCED = {"router_aux_loss_coef": 0.5, "optimizer": LARGE_STEPS}
EXPERTS: dict[str, Method] = {
    f"{name}-experts": Method(METHODS[name].module, METHODS[name].rows, METHODS[name].options | _BALANCED)
    for name in ("sft", "dpo", "dpo-coupled", "kto", "process", "reward-adapters", "sft-turns", "grpo", "ppo")
}
# Adapters on the attention alone: what routers do depends on each member's hidden states.
_ATTENTION = {"lora": {"r": 2, "lora_dropout": 0.0, "target_modules": ["q_proj", "v_proj"]}}
EXPERTS["reward-adapters-experts"].options.update(_ATTENTION)
EXPERTS["dpo-checkpointed-experts"] = Method(DPOModule, pairs, _BALANCED | {"gradient_checkpointing": True})
