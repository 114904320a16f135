"""A reward model that learns to tell two kinds of completions of the same prompts apart."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..data.lengths import longest
from ..data.messages import Text
from ..losses.reward import bradley_terry_loss
from ..metrics.intervals import Interval
from ..models import load_causal_lm, load_tokenizer, num_positions
from ..models.reward_model import RewardModel
from ..models.scoring import answered, grouped
from ..sequences import Segment, pack, register_attention
from ..utils.validation import check_count, check_positive
from .findings import bounded_mean


class LabelledPair(NamedTuple):
    """Two completions of a prompt, the first of the kind that is to score higher.

    Example:
        >>> LabelledPair("2+2=", "4", "5").first
        '4'
    """

    prompt: Text
    first: str
    second: str


@dataclass(frozen=True, kw_only=True)
class PairClassifierOptions:
    """Options of the training of a pair classifier.

    Args:
        epochs: passes over the training pairs, at least 1.
        learning_rate: of AdamW, above 0.
        batch_size: pairs per step, at least 1.
        holdout: part of the prompts that is held out, in (0, 1).
        seed: of the head and of the order.
    """

    epochs: int = 3
    learning_rate: float = 1e-4
    batch_size: int = 16
    holdout: float = 0.3
    seed: int = 0

    def __post_init__(self) -> None:
        check_count("epochs", self.epochs, "3 is usual")
        check_count("batch_size", self.batch_size, "16 is usual")
        check_positive("learning_rate", self.learning_rate, "1e-4 is usual")
        if not 0 < self.holdout < 1:
            raise ValueError(f"holdout is {self.holdout!r}; it must be in (0, 1) (0.3 is usual)")


@dataclass(frozen=True)
class TrainedPairClassifier:
    """A trained classifier and how well it tells held-out pairs apart.

    Attributes:
        model: the reward model.
        accuracy: share of held-out pairs whose first completion scores higher, a tie being half a right one, with its
            95 % interval; 0.5 is chance.
        held_out: the pairs that it was measured on.
        scores: of the first and of the second completion of each.
    """

    model: RewardModel
    accuracy: Interval
    held_out: tuple[LabelledPair, ...]
    scores: tuple[tuple[float, float], ...]


def train_pair_classifier(
    model: str | Path, pairs: Sequence[LabelledPair], options: PairClassifierOptions | None = None
) -> TrainedPairClassifier:
    """Trains a reward model on pairs of completions, and measures it on held-out prompts.

    The loss is that of ``RewardModule`` (Bradley-Terry), on the whole model, in fp32. All pairs of a prompt are on one
    side of the split, which depends on the prompt alone.

    Args:
        model: folder or hub id of the causal language model that it starts from.
        pairs: of at least one held-out prompt and one for training; pairs of equal completions, and of empty or too
            long ones, are ignored.
        options: of training.

    Raises:
        ValueError: no pairs, or all prompts on one side of the split.
    """
    options = options or PairClassifierOptions()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(options.seed)
        decoder = load_causal_lm(model, dtype=torch.float32, attn_implementation=register_attention(), headless=True)
        classifier = RewardModel(decoder, tokenizer=load_tokenizer(model), seed=options.seed)

        # Split by the prompt alone.
        found = [(pair, trees) for pair in pairs if (trees := _trees(classifier, pair)) is not None]
        shares = [_share(pair.prompt, options.seed) for pair, _ in found]
        held_out = [entry for entry, share in zip(found, shares, strict=True) if share < options.holdout]
        training = [trees for (_, trees), share in zip(found, shares, strict=True) if share >= options.holdout]
        if not held_out or not training:
            raise ValueError(
                f"of {len(pairs)} pairs, {len(training)} are left to train on and {len(held_out)} held out: give pairs "
                "of more prompts (pairs of equal, empty or too long completions do not count)"
            )
        _fit(classifier, training, options)

    scored, _ = classifier.summarized(classifier.score_trees([tree for _, trees in held_out for tree in trees]))
    scores = tuple(zip(scored[::2], scored[1::2], strict=True))
    accuracy = bounded_mean([0.5 if first == second else float(first > second) for first, second in scores])
    return TrainedPairClassifier(classifier, accuracy, tuple(pair for pair, _ in held_out), scores)


def readable(classifier: RewardModel, prompt: Text, completion: str) -> Segment | None:
    """Tokenizes a prompt with its completion; ``None`` for an empty completion, or one that is too long."""
    if not completion:
        return None
    tree = classifier.rows.answers(answered(prompt, completion))
    limit = num_positions(classifier.model)
    return None if limit is not None and longest(tree) > limit else tree


def _trees(classifier: RewardModel, pair: LabelledPair) -> tuple[Segment, Segment] | None:
    if pair.first == pair.second:
        return None
    first, second = (readable(classifier, pair.prompt, text) for text in (pair.first, pair.second))
    return None if first is None or second is None else (first, second)


def _fit(classifier: RewardModel, pairs: Sequence[tuple[Segment, Segment]], options: PairClassifierOptions) -> None:
    optimizer = torch.optim.AdamW(
        [p for p in classifier.parameters() if p.requires_grad], lr=options.learning_rate, weight_decay=0.0
    )
    draw = random.Random(options.seed)
    with torch.inference_mode(False), torch.enable_grad():
        for _ in range(options.epochs):
            order = draw.sample(range(len(pairs)), len(pairs))
            for start in range(0, len(order), options.batch_size):
                chosen = order[start : start + options.batch_size]
                rewards = _rewards(classifier, [tree for n in chosen for tree in pairs[n]])
                bradley_terry_loss(rewards[::2], rewards[1::2]).mean().backward()
                torch.nn.utils.clip_grad_norm_(classifier.parameters(), 1.0)
                optimizer.step()
                optimizer.zero_grad()
    classifier.requires_grad_(False).eval()


def _rewards(classifier: RewardModel, trees: Sequence[Segment]) -> Tensor:
    """Computes the rewards of sequences in their order; completions of one prompt share its computation."""
    examples, numbers = grouped(trees, classifier.micro_batch_tokens)
    batch = pack(examples, device=classifier.device)
    rewards_SMK = classifier(batch, classifier.layout)
    places = torch.tensor([n for group in numbers for n in group], device=classifier.device)
    rewards = classifier.options.combined(rewards_SMK.mean(1))
    return rewards[torch.argsort(places)]


def _share(prompt: Any, seed: int) -> float:
    """A number in [0, 1) that depends on the prompt and the seed alone."""
    digest = hashlib.blake2b(f"{seed}:{prompt}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") / 2**64
