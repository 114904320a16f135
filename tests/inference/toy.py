"""An enumerable language model over steps, as an engine: every state has a table of steps with probabilities."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from itertools import product

import numpy as np
import torch
from torch import Tensor

from rlhf_lightning.inference import Completion, SamplingParams
from rlhf_lightning.inference.sampling import SampledTokens, check_finite, sample_tokens, uniforms
from rlhf_lightning.inference.strategy import Candidate, Scores
from tests.helpers import CHARACTERS, EOS_ID, VOCAB_SIZE

PROMPT = "?"
# A state is the text so far; its steps end with a line's end, or the solution ends with them.
Table = Mapping[str, Sequence[tuple[str, float]]]


def random_table(
    branching: int, depth: int, *, seed: int = 0, early: bool = False
) -> dict[str, list[tuple[str, float]]]:
    """Random probabilities for solutions of ``depth`` steps; with ``early``, the first step of a state may end one."""
    random = np.random.default_rng(seed)
    letters = "abcdefghij"[:branching]
    table: dict[str, list[tuple[str, float]]] = {}
    for length in range(depth):
        for steps in product(letters, repeat=length):
            state = "".join(f"{step}\n" for step in steps)
            weights = random.dirichlet(np.ones(branching + early)).tolist()
            end = "" if length == depth - 1 else "\n"
            table[state] = [(f"{letter}{end}", weight) for letter, weight in zip(letters, weights, strict=False)]
            if early:
                table[state].append(("z", weights[-1]))
    return table


def solutions(table: Table) -> dict[str, float]:
    """All solutions with their probabilities."""
    found: dict[str, float] = {}
    todo = [("", 1.0)]
    while todo:
        state, mass = todo.pop()
        for step, probability in table[state]:
            if step.endswith("\n"):
                todo.append((state + step, mass * probability))
            else:
                found[state + step] = mass * probability
    return found


class Characters:
    """A quick tokenizer of one token per character."""

    eos_token_id = EOS_ID

    def __len__(self) -> int:
        return VOCAB_SIZE

    def encode(self, text: str) -> list[int]:
        return [CHARACTERS.index(character) + 3 for character in text]

    def decode(self, ids: Sequence[int], **_: bool) -> str:
        return "".join(CHARACTERS[token - 3] for token in ids if token >= 3)


class ToyEngine:
    """Samples from a table, by one uniform per step and seed.

    Args:
        table: the model.
        in_turn: give the steps of a state in turn, whatever the seeds: as many draws as there are give each once.
    """

    def __init__(self, table: Table, *, in_turn: bool = False) -> None:
        self.table, self.in_turn = table, in_turn
        self.tokenizer = Characters()
        self.end_token_ids = frozenset({EOS_ID})
        self.generated = 0
        self.calls: list[int] = []
        self._turns: dict[str, int] = {}

    def encode(self, prompt: str | Sequence[int]) -> tuple[int, ...]:
        return tuple(self.tokenizer.encode(prompt)) if isinstance(prompt, str) else tuple(prompt)

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        num_samples: int = 1,
        sampling: SamplingParams | None = None,
        *,
        seeds: Sequence[Sequence[int]] | None = None,
        limits: Sequence[int] | None = None,
    ) -> list[list[Completion]]:
        assert sampling is not None
        assert seeds is not None
        limits = [sampling.max_new_tokens] * len(prompts) if limits is None else limits
        self.calls.append(len(prompts))
        return [
            [self._complete(list(prompt), sampling, seed, limit) for seed in row]
            for prompt, row, limit in zip(prompts, seeds, limits, strict=True)
        ]

    def _complete(self, prompt: list[int], sampling: SamplingParams, seed: int, limit: int) -> Completion:
        state = self.tokenizer.decode(prompt).removeprefix(PROMPT)
        tokens: list[int] = []
        logprobs: list[float] = []
        stopped = False
        for number in range(100):
            step, probability = self._choose(state, sampling, seed, number)
            ends = not step.endswith("\n")
            ids = [*self.encode(step), *[EOS_ID] * ends]
            tokens, logprobs = tokens + ids, logprobs + [math.log(probability)] + [0.0] * (len(ids) - 1)
            state += step
            stopped = ends or "\n" in sampling.stop
            if stopped:
                break
        stopped = stopped and len(tokens) <= limit
        tokens, logprobs = tokens[:limit], logprobs[:limit]
        self.generated += len(tokens)
        text = self.tokenizer.decode(tokens).removesuffix("\n")
        return Completion(tokens, text, logprobs, "stop" if stopped else "length")

    def _choose(self, state: str, sampling: SamplingParams, seed: int, number: int) -> tuple[str, float]:
        steps = self.table[state]
        if sampling.greedy:
            return max(steps, key=lambda step: step[1])[0], 1.0
        if self.in_turn:
            turn = self._turns.get(state, 0)
            self._turns[state] = turn + 1
            return steps[turn % len(steps)]
        ends = np.cumsum([probability for _, probability in steps])
        place = int(np.searchsorted(ends / ends[-1], uniforms([seed], [number])[0], side="right"))
        return steps[place]


class Judge:
    """Scores by a function of the text; reads the tokens of prompt and solution.

    Args:
        function: from the text of a candidate to its score.
    """

    def __init__(self, function: Callable[[str], float]) -> None:
        self.function = function
        self.read = 0
        self.calls: list[int] = []

    def score(self, candidates: Sequence[Candidate]) -> Scores:
        tokens = [self.cost(candidate) for candidate in candidates]
        self.read += sum(tokens)
        self.calls.append(len(candidates))
        return Scores([float(self.function(candidate.text)) for candidate in candidates], tokens)

    def cost(self, candidate: Candidate) -> int:
        return len(candidate.query.token_ids) + len(candidate.token_ids)


def step_scores(table: Table, *, seed: int = 0) -> Callable[[str], list[float]]:
    """Random probabilities of each step of a solution being right, like those of a process reward model."""
    random = np.random.default_rng(1000 + seed)
    found = {state + step: float(random.uniform(0.05, 1.0)) for state, steps in table.items() for step, _ in steps}

    def of(text: str) -> list[float]:
        lines = text.split("\n")
        pieces = [line + "\n" for line in lines[:-1]] + [lines[-1]] * bool(lines[-1])
        # A step that a budget has cut off is as good as not.
        return [found.get("".join(pieces[: n + 1]), 0.5) for n in range(len(pieces))]

    return of


def sample(
    logits_NV: Tensor,
    uniforms_N: Tensor | None,
    params: SamplingParams,
    *,
    seen_NV: Tensor | None = None,
    banned: tuple[Tensor, Tensor] | None = None,
) -> SampledTokens:
    """Samples one token per row and checks it; ``banned`` are rows, and tokens that must not be drawn in them."""
    barred = None
    if banned is not None:
        rows_N = torch.zeros(len(logits_NV), dtype=torch.bool)
        rows_N[banned[0]] = True
        barred = rows_N, banned[1]
    drawn = sample_tokens(logits_NV, uniforms_N, params, seen_NV=seen_NV, barred=barred)
    check_finite(bool(drawn.finite_N.all()))
    return drawn
