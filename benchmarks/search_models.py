"""The policies and scorers of the benchmark of searches, each trained from scratch on the embedded task."""

from __future__ import annotations

import random
import statistics
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import lightning
import torch

from rlhf_lightning import PPOModule, ProcessRewardModule, RewardModule, SFTModule
from rlhf_lightning.callbacks import ModelExport
from rlhf_lightning.core import WarmupSchedule
from rlhf_lightning.data.tasks import open_task
from rlhf_lightning.datamodules import PreferenceDataModule, PromptDataModule, SFTDataModule, StepwiseDataModule
from rlhf_lightning.inference import LocalEngine, SamplingParams
from rlhf_lightning.rewards import exact_answer

NANO = "configs/models/nano"
MOST_TOKENS = 112
# How often a step has a wrong sum, how far off it is at most, and how often one goes past a number.
SLIPS, NEAR, SKIPS = 0.25, 5, 0.04
Row = dict[str, Any]


def sources(contract: str, rows: int, seed: int, keys: str, terms: Sequence[int]) -> list[str]:
    """A task of each length."""
    return [f"sums:{contract}?rows={max(1, rows // len(terms))}&terms={n}&seed={seed}{keys}" for n in terms]


def slipping(problems: Sequence[str], slips: float, skips: float = 0.0) -> Iterator[Row]:
    """Solutions in which each step is wrong with a probability of its own, as the rows of every contract.

    A slip is a wrong sum; a skip goes past a number. A label tells whether the step itself is right.
    """
    for source in problems:
        draw = random.Random(source)
        for row in open_task(source):
            total, *numbers = [int(number) for number in row["prompt"].removesuffix("=?").split("+")]
            steps, labels = [], []
            while numbers:
                number, right = numbers.pop(0), True
                if numbers and draw.random() < skips:
                    number, right = numbers.pop(0), False
                shown = total + number
                if draw.random() < slips:
                    shown = draw.choice([n for n in range(max(0, shown - NEAR), shown + NEAR + 1) if n != shown])
                    right = False
                steps.append(f"{total}+{number}={shown}")
                labels.append(right)
                total = shown
            steps, labels = [*steps, f"#{total}"], [*labels, True]
            yield {"prompt": row["prompt"], "completions": steps, "labels": labels, "completion": "\n".join(steps)}


def step_labels(prompt: str, completion: str) -> list[bool]:
    """Tells for each step of a solution whether it adds the next number rightly to the total that was written."""
    written, *numbers = [int(number) for number in prompt.removesuffix("=?").split("+")]
    total, answer, labels = str(written), written + sum(numbers), []
    for step in completion.split("\n"):
        if numbers and not step.startswith("#"):
            number = numbers.pop(0)
            labels.append(total.isdigit() and step == f"{total}+{number}={int(total) + number}")
            total = step.rpartition("=")[2]
        else:
            # The answer: without steps, it is a guess.
            labels.append(step == f"#{answer if numbers else total}")
    return labels


def samples(policies: Sequence[tuple[str, str]], rows: int, seed: int) -> list[tuple[str, list[str]]]:
    """Each policy's solutions of its problems, four for each of them."""
    found = []
    for policy, high in policies:
        engine = LocalEngine.from_pretrained(policy)
        problems = sources("prompts", rows // 8, seed, f"&high={high}", range(3, 9))
        prompts = [row["prompt"] for source in problems for row in open_task(source)]
        params = SamplingParams(max_new_tokens=MOST_TOKENS, seed=seed)
        groups = engine.generate(prompts, 4, params)
        found += [(prompt, [c.text for c in group]) for prompt, group in zip(prompts, groups, strict=True)]
    return found


def labelled(drawn: Sequence[tuple[str, list[str]]]) -> list[Row]:
    """Sampled solutions with labelled steps."""
    return [
        {"prompt": prompt, "completions": text.split("\n"), "labels": step_labels(prompt, text)}
        for prompt, texts in drawn
        for text in texts
        if all(text.split("\n"))
    ]


def pairs(drawn: Sequence[tuple[str, list[str]]]) -> list[Row]:
    """A right solution against each wrong one of the same problem."""
    found = []
    for prompt, texts in drawn:
        answer = f"#{sum(int(number) for number in prompt.removesuffix('=?').split('+'))}"
        right = next((text for text in texts if all(step_labels(prompt, text))), None)
        wrong = [text for text in texts if text and text.rpartition("\n")[2] != answer]
        found += [{"prompt": prompt, "chosen": right, "rejected": text} for text in wrong if right is not None]
    return found


def optimizers(rate: float) -> dict[str, Any]:
    """AdamW with a short warm-up."""
    return {
        "optimizer": lambda parameters: torch.optim.AdamW(parameters, lr=rate, weight_decay=0.0),
        "lr_scheduler": lambda optimizer: WarmupSchedule(optimizer, warmup_steps=0.1),
    }


class Learned(lightning.Callback):
    """Ends training when the mean loss of ``steps`` steps is below ``loss``."""

    def __init__(self, loss: float, steps: int = 20) -> None:
        self.loss, self.recent = loss, deque[float](maxlen=steps)

    def on_train_batch_end(self, trainer: Any, module: Any, *args: Any) -> None:
        """Looks at the step's loss."""
        self.recent.append(float(trainer.callback_metrics["train/loss"]))
        enough = len(self.recent) == self.recent.maxlen and statistics.mean(self.recent) < self.loss
        trainer.should_stop = trainer.should_stop or enough


def fit(folder: Path, make: Callable[[], tuple[Any, Any]], *callbacks: Any, **export: str) -> str:
    """Trains and exports, unless that was done before."""
    done = Path(export.get("critic_folder", str(folder)))
    if not done.is_dir():
        start = time.process_time()
        module, data = make()
        lightning.Trainer(
            accelerator="cpu",
            devices=1,
            max_epochs=1,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            log_every_n_steps=1,
            callbacks=[ModelExport(str(folder), **export), *callbacks],
        ).fit(module, data)
        print(f"{done}: {time.process_time() - start:.0f} s", flush=True)
    return str(done)


def train(folder: Path, seed: int, scale: float) -> dict[str, str]:
    """Trains the policies and the scorers of one seed, and returns where each of them is."""
    lightning.seed_everything(seed, verbose=False)

    def rows(steps: int, batch: int) -> int:
        return max(1, round(steps * scale)) * batch

    def base() -> tuple[Any, Any]:
        train = sources("demonstrations", rows(300, 64), seed, "&high=12&careless=0.1", range(3, 7))
        train += sources("demonstrations", rows(60, 64), seed, "&high=20&careless=0.1", range(3, 7))
        train += sources("demonstrations", rows(120, 64), seed, "&high=12&careless=0", range(6, 10))
        data = SFTDataModule(train, global_batch_size=64)
        return SFTModule(NANO, init="random", **optimizers(2e-3)), data

    def guessing() -> tuple[Any, Any]:
        train = sources("demonstrations", rows(60, 64), 40 + seed, "&high=12&careless=0.65&slips=0.3", range(3, 7))
        return SFTModule(start, **optimizers(3e-4)), SFTDataModule(train, global_batch_size=64)

    def slips() -> tuple[Any, Any]:
        train = list(slipping(sources("prompts", rows(40, 64), 50 + seed, "&high=12", range(3, 7)), SLIPS))
        return SFTModule(start, **optimizers(2e-4)), SFTDataModule(train, global_batch_size=64)

    def first_process() -> tuple[Any, Any]:
        # To tell a wrong sum is learned from short solutions first: from long ones alone it takes many times as long.
        train = list(slipping(sources("prompts", rows(2500, 32), 10 + seed, "&high=12", (2, 3)), 0.3, SKIPS))
        return ProcessRewardModule(start, **optimizers(1e-3)), StepwiseDataModule(train, global_batch_size=32)

    def process() -> tuple[Any, Any]:
        return ProcessRewardModule(first, **optimizers(5e-4)), StepwiseDataModule(
            labelled(drawn()), global_batch_size=32
        )

    def reward() -> tuple[Any, Any]:
        # It starts from what the PRM has learned of steps.
        module = RewardModule(found["PRM"], pooling="mean", center_rewards_coefficient=0.01, **optimizers(3e-4))
        return module, PreferenceDataModule(pairs(drawn()), global_batch_size=32)

    def critic(policy: str) -> tuple[Any, Any]:
        # Only the critic's own weights learn while it is warmed up; its values start as the rewards.
        value = {"model": found["RM"], "warmup_iterations": 10**6, "coef": 1.0, "cliprange": None}
        module = PPOModule(
            found[policy],
            rewards=[exact_answer],
            num_generations=4,
            num_updates=2,
            max_completion_length=MOST_TOKENS,
            kl_coef=0.0,
            value=value,
            gae={"lam": 1.0, "whiten_advantages": False},
            seed=seed,
            **optimizers(3e-4),
        )
        keys, terms = ("&high=20", range(3, 7)) if policy == "guesses" else ("&high=12", range(3, 9))
        train = sources("prompts", rows(20, 32), 30 + seed, keys, terms)
        return module, PromptDataModule(train, global_batch_size=32)

    @cache
    def drawn() -> list[tuple[str, list[str]]]:
        return samples([(found["guesses"], "20"), (found["slips"], "12")], rows(180, 32), 60 + seed)

    start = fit(folder / "base", base)
    found = {"guesses": fit(folder / "guesses", guessing), "slips": fit(folder / "slips", slips)}
    first = fit(folder / "first PRM", first_process, Learned(0.03))
    found["PRM"] = fit(folder / "PRM", process)
    found["RM"] = fit(folder / "RM", reward)
    for policy in ("guesses", "slips"):
        done = folder / f"critic of {policy}"
        after = folder / f"after {policy}"
        found[done.name] = fit(after, lambda policy=policy: critic(policy), critic_folder=str(done))
    return found
