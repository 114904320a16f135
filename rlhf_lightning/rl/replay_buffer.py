"""Completions of earlier iterations that are trained on again, with the log-probs that they were drawn with.

A completion in the buffer was drawn by an older policy. When it comes back, the log-probs of the policy of today are
computed as for new ones, and the off-policy correction weights its tokens by the ratio of the two (truncated importance
sampling); the updates then start from there. Its advantages are those of the completions that it was drawn with.

All ranks hold the same records, and draw the same ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..distributed.collectives import Metrics, gather_objects, world_size
from ..sequences import Example, Segment
from .policy_loss import OffPolicyCorrection, ReplayPriority
from .priority_buffer import PriorityBuffer
from .rollouts import path_lengths

# Fields of a record per token; the same that its tree has.
_PER_TOKEN = ("sampling_logprobs", "advantages", "shares")


@dataclass(frozen=True, eq=False)
class Record:
    """A completion, with what stays fixed of it.

    Args:
        row_id: its prompt's row.
        iteration: when it was drawn.
        priority: above 0.
        prompt: the prompt's tokens.
        tokens: its own.
        sampling_logprobs: of each token, under the distribution that it was drawn from.
        advantages: of each token.
        shares: weight of each token, which copies of it in other completions shared.
    """

    row_id: str
    iteration: int
    priority: float
    prompt: np.ndarray
    tokens: np.ndarray
    sampling_logprobs: np.ndarray
    advantages: np.ndarray
    shares: np.ndarray


_ARRAYS = [field.name for field in fields(Record) if field.name not in ("row_id", "iteration", "priority")]


def replay_priority(
    kind: ReplayPriority, *, advantages_n: np.ndarray, sampling_logprobs_n: np.ndarray, spread: float
) -> float:
    r"""Computes how much a completion deserves to come back, at least 0.

    - ``uniform``: 1.
    - ``hard_negative``: :math:`\max(0, -\bar A)\, e^{\overline{\log q}}`, with the means over its tokens of advantages
      and sampling log-probs: what is worse than its like, and likely. Others do not come back.
    - ``frontier``: the standard deviation of the returns of its prompt's completions, which is largest where the policy
      succeeds half of the time.

    Args:
        kind: one of these.
        advantages_n: of its tokens.
        sampling_logprobs_n: of its tokens.
        spread: standard deviation of the returns of its prompt's completions.

    Example:
        >>> bad, likely = np.array([-2.0, -2.0]), np.log([0.5, 0.5])
        >>> round(replay_priority("hard_negative", advantages_n=bad, sampling_logprobs_n=likely, spread=0.3), 6)
        1.0
    """
    if kind == "uniform":
        return 1.0
    if kind == "frontier":
        return spread
    return max(0.0, -float(advantages_n.mean())) * float(np.exp(sampling_logprobs_n.mean()))


class ReplayBuffer(PriorityBuffer[Record]):
    """Keeps completions, and gives some of them back; those whose tokens have no advantage, or without priority, not.

    Args:
        options: capacity, share, priority and maximum age.
        seed: of the draws.

    Attributes:
        records: in the order in which they came.
    """

    def __init__(self, options: OffPolicyCorrection, seed: int) -> None:
        super().__init__(options.replay_capacity, seed, max_age=options.replay_max_age)
        self.options = options

    def exchange(self, trees: Sequence[Example], spread_S: Tensor, iteration: int) -> tuple[list[Example], Metrics]:
        """Gives back completions of earlier iterations, and then keeps those of this one; every rank calls it.

        Args:
            trees: this rank's training trees, with the fields of their tokens.
            spread_S: standard deviation of the returns of its prompt's completions, for each completion of the
                rollouts.
            iteration: number of this one.

        Returns:
            This rank's share of the replayed completions, as trees of one completion each, and logged values.
        """
        own = [record for tree in trees for record in self._records(tree, spread_S, iteration)]
        names = [tree.fields["prompt_id"] for tree in trees]
        parts = gather_objects((sum(len(path_lengths(tree)) for tree in trees), names, own))
        count = int(self.options.replay_share * sum(part[0] for part in parts))
        prompts = sorted({name for part in parts for name in part[1]})
        drawn = self.draw(count if prompts else 0, iteration)
        # The order of rows, not of ranks.
        self.add(sorted((record for part in parts for record in part[2]), key=lambda record: record.row_id))

        rank = torch.distributed.get_rank() if world_size() > 1 else 0
        first = 1 + max((int(tree.fields["tokens"].max(initial=-1)) for tree in trees), default=-1)
        found = []
        for number, record in list(enumerate(drawn))[rank :: world_size()]:
            # Steps are split by prompts: a replayed completion goes along with one of this iteration.
            found.append(_tree(record, number, prompts[number % len(prompts)], first))
            first += len(record.tokens)
        values = {"replay/size": float(len(self.records)), "replay/completions": float(len(drawn))}
        if drawn:
            values["replay/age"] = sum(iteration - record.iteration for record in drawn) / len(drawn)
        return found, {name: torch.tensor(value, dtype=torch.float64) for name, value in values.items()}

    def _records(self, tree: Example, spread_S: Tensor, iteration: int) -> list[Record]:
        """Makes records of a tree's completions that teach something."""
        ends = np.cumsum(path_lengths(tree)).tolist()
        if not ends:
            return []
        found = []
        for place, path, start, end in zip(
            tree.fields["places"], tree.root.paths(), [0, *ends[:-1]], ends, strict=True
        ):
            own = {name: np.array(tree.fields[name][start:end], np.float64) for name in _PER_TOKEN}
            priority = replay_priority(
                self.options.replay_priority,
                advantages_n=own["advantages"],
                sampling_logprobs_n=own["sampling_logprobs"],
                spread=float(spread_S[place]),
            )
            if own["advantages"].any() and priority > 0:
                tokens = np.concatenate([segment.tokens for segment in path[1:]])
                prompt = np.asarray(tree.root.tokens, np.int64)
                row_id = tree.fields["prompt_id"]
                found.append(Record(row_id, iteration, priority, prompt, tokens.astype(np.int64), **own))
        return found

    # Checkpoints.

    def state_dict(self) -> dict[str, Any]:
        """Returns all records as flat tensors."""
        state: dict[str, Any] = {
            "row_ids": [record.row_id for record in self.records],
            "iterations": torch.tensor([record.iteration for record in self.records], dtype=torch.long),
            "priorities": torch.tensor([record.priority for record in self.records], dtype=torch.float64),
        }
        for name in ("prompt", "tokens"):
            parts = [getattr(record, name) for record in self.records]
            state[f"{name}_lengths"] = torch.tensor([len(part) for part in parts], dtype=torch.long)
        for name in _ARRAYS:
            kind = np.float64 if name in _PER_TOKEN else np.int64
            joined = np.concatenate([np.empty(0, kind), *(getattr(record, name) for record in self.records)])
            state[name] = torch.from_numpy(joined)
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores the records of ``state_dict``, as many as there is room for."""
        sizes = {name: state[f"{'prompt' if name == 'prompt' else 'tokens'}_lengths"].tolist() for name in _ARRAYS}
        arrays = {name: [part.numpy() for part in state[name].split(sizes[name])] for name in _ARRAYS}
        self.records = []
        self.add(
            [
                Record(row_id, iteration, priority, *(arrays[name][n] for name in _ARRAYS))
                for n, (row_id, iteration, priority) in enumerate(
                    zip(state["row_ids"], state["iterations"].tolist(), state["priorities"].tolist(), strict=True)
                )
            ]
        )


def _tree(record: Record, number: int, prompt_id: str, first: int) -> Example:
    """Makes a tree of a record: its tokens are numbered from ``first`` on, as copies of no others."""
    completion = Segment(record.tokens, np.ones(len(record.tokens), np.float32))
    given = {
        "prompt_id": prompt_id,
        "places": [-1],
        "num_completions": 1,
        "tokens": np.arange(first, first + len(record.tokens)),
    }
    given |= {name: getattr(record, name) for name in _PER_TOKEN}
    row_id = f"{record.row_id}/replay/{record.iteration}/{number}"
    return Example(row_id, Segment(record.prompt, children=[completion]), given)
