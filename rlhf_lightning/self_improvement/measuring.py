"""Measures a policy on a suite while it trains, its prompts shared among ranks."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch

from ..core import PostTrainingModule
from ..core.resume import random_state, set_random_state
from ..distributed.collectives import gather_objects
from ..distributed.unshard import gathered
from ..evaluation import Suite, Task, TaskResult
from ..evaluation.running import answer_task, check_scores, task_prompts
from ..inference import LocalEngine, SamplingParams, derive_seed
from ..models import evaluating
from ..rewards.specs import build_reward
from ..sequences import Example, Segment, pack, plan_micro_batches

# A prompt's number, its tokens, and those of a sample.
Sample = list[Any]
Measured = TypeVar("Measured")


class SuiteMeter:
    """Measures a module on the tasks of a suite; every rank calls it, and has all results.

    Random states are those of before. Prompts are read once for a tokenizer and settings.

    Args:
        suite: the suite.
        seed: of the samples, which depend on nothing else but their number and the policy.

    Raises:
        ValueError: a task without prompts that a policy answers.
    """

    def __init__(self, suite: Suite, seed: int) -> None:
        for task in suite.tasks:
            if not isinstance(task, Task):
                raise ValueError(
                    f"task {task.name!r} is a {type(task).__name__}, which is measured after training; in training, "
                    "give tasks of prompts that the policy answers"
                )
        self.tasks = [task for task in suite.tasks if isinstance(task, Task)]
        self.seed = seed
        self.verifiers = {task.name: build_reward(task.verifier) for task in self.tasks}
        self._examples: dict[str, list[Example]] = {}
        self._read_with: tuple[Any, Any] | None = None  # tokenizer and settings of the prompts

    def results(self, module: PostTrainingModule, settings: dict[str, Any] | None) -> list[TaskResult]:
        """Answers and verifies all prompts.

        Args:
            module: its model answers.
            settings: passed to the chat template; a task's own override them by name.

        Raises:
            ValueError: a task without prompts or verdicts, or a verifier that raised on any rank.
        """
        if self._read_with != (module.tokenizer, settings):
            self._read_with, self._examples = (module.tokenizer, settings), {}
        return _undisturbed(module, lambda: [self._result(module, task, settings) for task in self.tasks])

    def _result(self, module: PostTrainingModule, task: Any, settings: dict[str, Any] | None) -> TaskResult:
        start, verifier, name = time.perf_counter(), self.verifiers[task.name], type(module).__name__
        engine = LocalEngine(module.model, module.tokenizer)

        # A rank that raised alone would leave the others waiting.
        part, cause = [], None
        try:
            if task.name not in self._examples:
                self._examples[task.name] = task_prompts(
                    task, module.tokenizer, verifier, chat_template_kwargs=settings
                )
            examples = self._examples[task.name]
            numbers = range(len(examples))[module.global_rank :: module.trainer.world_size]
            part = answer_task(task, engine, examples, numbers, verifier, model=name, seed=self.seed)
        except Exception as error:
            cause = error
        found = gather_objects((part, None if cause is None else _in_one_line(task.name, cause)))
        if (said := next((message for _, message in found if message is not None), None)) is not None:
            raise ValueError(said) from cause

        # Rank r has every world_size-th prompt.
        parts = [answers for answers, _ in found]
        prompts = [parts[n % len(parts)][n // len(parts)] for n in range(sum(map(len, parts)))]
        result = TaskResult(name, task, tuple(prompts), time.perf_counter() - start)
        check_scores(result)
        return result

    def ask(self, module: PostTrainingModule, measure: Callable[[LocalEngine], Measured]) -> Measured:
        """Measures something else of the policy by an engine that samples from it; every rank does."""
        return _undisturbed(module, lambda: measure(LocalEngine(module.model, module.tokenizer)))

    def samples(self, module: PostTrainingModule) -> list[Sample]:
        """Draws one completion of every prompt at temperature 1; ``results`` must have read the prompts."""

        def draw() -> list[Sample]:
            engine, found = LocalEngine(module.model, module.tokenizer), []
            for place, task in enumerate(self.tasks):
                examples = self._examples[task.name]
                local_numbers = list(range(len(examples)))[module.global_rank :: module.trainer.world_size]
                prompts = [examples[number].root.tokens.tolist() for number in local_numbers]
                seeds = [[derive_seed(self.seed, "drift", number)] for number in local_numbers]
                sampling = SamplingParams(max_new_tokens=task.params.max_new_tokens)
                groups = engine.generate(prompts, 1, sampling, seeds=seeds)
                drawn = [
                    (place, n, prompt, group[0].token_ids)
                    for n, prompt, group in zip(local_numbers, prompts, groups, strict=True)
                ]
                found += [list(sample) for sample in drawn if sample[3]]
            return sorted((sample for part in gather_objects(found) for sample in part), key=lambda s: s[:2])

        return _undisturbed(module, draw)

    def mean_logprob(self, module: PostTrainingModule, samples: Sequence[Sample]) -> float:
        """Computes the policy's mean log-probability of the sampled tokens, in nats."""

        def score() -> float:
            local_samples = list(samples)[module.global_rank :: module.trainer.world_size]
            examples = [
                Example(f"{place}:{number}", Segment(prompt, children=[Segment(tokens, [1.0] * len(tokens))]))
                for place, number, prompt, tokens in local_samples
            ]
            total, count = 0.0, 0
            autocast = module.trainer.precision_plugin.forward_context()
            with torch.no_grad(), evaluating(module.model), autocast:
                for rows in plan_micro_batches(examples, budget=module.micro_batch_tokens):
                    batch = pack([examples[n] for n in rows], device=module.device)
                    logprobs = module.token_stats(batch).logprobs.double()
                    total, count = total + float(logprobs.sum()), count + len(logprobs)
            totals = [sum(values) for values in zip(*gather_objects((total, count)), strict=True)]
            return float(totals[0] / totals[1])

        return _undisturbed(module, score)


def _undisturbed(module: PostTrainingModule, measure: Callable[[], Measured]) -> Measured:
    device = torch.device(module.device)
    states = random_state(device)
    try:
        with gathered(module.model):
            return measure()
    finally:
        set_random_state(states, device)


def _in_one_line(task: str, error: Exception) -> str:
    said = (str(error).splitlines() or [""])[0]
    if isinstance(error, ValueError):
        return said
    return f"task {task!r} cannot be measured: {type(error).__name__}: {said}; correct its verifier or its prompts"
