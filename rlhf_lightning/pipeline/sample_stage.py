"""The ``sample`` stage and the evaluation of exported models: a model answers prompts, a verifier checks them."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from inspect import signature
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from ..evaluation.answers import Answer, answer_prompts, load_verifier, read_prompts
from ..generation.options import remote_engine, sampling_params
from ..inference import Engine, LocalEngine, SamplingParams, derive_seed
from ..merging import EnsemblePolicy
from ..models import load_causal_lm, load_tokenizer
from ..utils.files import json_line, write_atomically
from ..utils.messages import did_you_mean
from ..utils.progress import progress
from .config import Evaluation, SampleStage

PAIRS, ANSWERS, SAMPLED = "pairs.jsonl", "test_answers.jsonl", "sampled.jsonl"
_PROMPTS_AT_ONCE = 64
# Arguments of an ensemble that are not options of a stage.
_NOT_OF_ENSEMBLE = ("models", "tokenizer", "dtype", "device")


def run_sample(
    stage: SampleStage, folder: Path, seed: int, dtype: str, say: Callable[[str], None] = lambda line: None
) -> dict[str, float]:
    """Samples completions and writes ranked pairs.

    Results are kept in ``sampled.jsonl``, part by part; an interrupted stage continues after the last part.

    Among the samples of a prompt that ended before the limit, the best by the verifier is chosen and the worst is
    rejected, the first of equals each time; a prompt whose samples are all equally good gives no pair.

    Args:
        stage: the stage.
        folder: where ``pairs.jsonl`` goes.
        seed: a sample is a function of this, its prompt's number and its own.
        dtype: of the model's weights.
        say: shown one line per part.

    Returns:
        Counts, and the mean reward of the samples.

    Raises:
        ValueError: no prompt gave a pair.
    """
    params = sampling_params(stage.sampling)
    engine, tokenizer = _stage_engine(stage, dtype)
    verifier = load_verifier(stage.verifier)
    examples = read_prompts(stage.prompts, tokenizer, chat_template_kwargs=stage.chat_template_kwargs)

    # Seeds are functions of prompt and sample numbers, so a resumed stage draws the same samples.
    parts = _read_parts(folder / SAMPLED)
    rows = [pair for part in parts for pair in part["pairs"]]
    rest = range(len(parts) * _PROMPTS_AT_ONCE, len(examples), _PROMPTS_AT_ONCE)
    for start in progress(rest, f"sampling, {_PROMPTS_AT_ONCE} prompts at once"):
        if stage.max_pairs is not None and len(rows) >= stage.max_pairs:
            break
        prompts = examples[start : start + _PROMPTS_AT_ONCE]
        seeds = [[derive_seed(seed, start + n, s) for s in range(stage.num_samples)] for n in range(len(prompts))]
        groups = answer_prompts(engine, prompts, verifier, num_samples=stage.num_samples, sampling=params, seeds=seeds)
        parts.append(_summarise(groups))
        # Each part is on disk before the next one begins: an interrupted stage resumes from it.
        with (folder / SAMPLED).open("a", encoding="utf-8") as file:
            file.write(json_line(parts[-1]))
        rows += parts[-1]["pairs"]
        say(f"{start + len(prompts)} of {len(examples)} prompts, {len(rows)} pairs")

    rows = rows[: stage.max_pairs]
    rewards = [reward for part in parts for reward in part["rewards"]]
    mean = sum(rewards) / len(rewards) if rewards else 0.0
    if not rows:
        raise ValueError(
            f"no prompt of {stage.prompts!r} got both a better and a worse completion (mean reward {mean:.2f}): "
            "raise num_samples or sampling.temperature, or sample from another model"
        )

    # Complete: the parts are no longer needed.
    write_atomically(folder / PAIRS, "".join(map(json_line, rows)))
    (folder / SAMPLED).unlink(missing_ok=True)
    counts = {name: sum(part[name] for part in parts) for name in ("samples", "cut_off")}
    return {"samples": counts["samples"], "mean_reward": mean, "pairs": len(rows), "cut_off": counts["cut_off"]}


def _summarise(groups: Sequence[Sequence[Answer]]) -> dict[str, Any]:
    """Summarises a part: its pairs, its rewards, and its numbers of samples and of truncated ones."""
    answers = [answer for group in groups for answer in group]
    return {
        "pairs": [pair for pair in map(ranked_pair, groups) if pair is not None],
        "rewards": [float(answer.reward) for answer in answers if answer.reward is not None],
        "samples": len(answers),
        "cut_off": sum(answer.completion.finish_reason == "length" for answer in answers),
    }


def _read_parts(file: Path) -> list[dict[str, Any]]:
    """Reads the parts of an interrupted stage, and removes a truncated last line."""
    if not file.is_file():
        return []
    lines = file.read_bytes().splitlines(keepends=True)
    whole = [line for line in lines if line.endswith(b"\n")]
    # A crash may leave a part of a line.
    if len(whole) < len(lines):
        file.write_bytes(b"".join(whole))
    return [json.loads(line) for line in whole]


def ranked_pair(group: Sequence[Answer]) -> dict[str, Any] | None:
    """Makes a row of the best and the worst of a prompt's answers, if one is better than the other."""
    # Only complete answers: a truncated one must be neither preferred nor rejected.
    ended = [
        answer
        for answer in group
        if answer.reward is not None
        and math.isfinite(answer.reward)
        and answer.completion.finish_reason == "stop"
        and answer.completion.text
    ]
    if not ended:
        return None
    best = max(ended, key=lambda answer: answer.reward or 0.0)
    worst = min(ended, key=lambda answer: answer.reward or 0.0)
    # A text is not worse than itself, even if a noisy verifier gives it two rewards.
    if best.reward == worst.reward or best.completion.text == worst.completion.text:
        return None
    texts = {"chosen": best.completion.text, "rejected": worst.completion.text}
    return {"prompt": best.example.fields["prompt"], **texts} | {
        name: value for name, value in best.example.fields.items() if name not in ("prompt", *texts)
    }


def evaluate(evaluation: Evaluation, model_folder: Path, dtype: str, answers_file: Path) -> dict[str, float]:
    """Answers the test prompts greedily, writes the answers, and returns accuracy and number of rows."""
    model, tokenizer = _load(str(model_folder), dtype)
    examples = read_prompts(
        evaluation.prompts, tokenizer, limit=evaluation.limit, chat_template_kwargs=evaluation.chat_template_kwargs
    )
    greedy = SamplingParams(max_new_tokens=evaluation.max_new_tokens, temperature=0.0)
    groups = answer_prompts(
        LocalEngine(model, tokenizer), examples, load_verifier(evaluation.verifier), sampling=greedy
    )
    answers = [group[0] for group in groups]
    rewards = [answer.reward for answer in answers if answer.reward is not None]
    if not rewards:
        raise ValueError(f"no reward for any of the prompts {evaluation.prompts!r}: they lack what the verifier reads")
    lines = [
        json_line({"prompt": a.example.fields["prompt"], "completion": a.completion.text, "reward": a.reward})
        for a in answers
    ]
    write_atomically(answers_file, "".join(lines))
    return {"accuracy": sum(rewards) / len(rewards), "rows": len(rewards)}


def check_models(stage: SampleStage) -> None:
    """Checks that the options of a stage fit the number of its models.

    Raises:
        ValueError: they do not.
    """
    several = isinstance(stage.model, list)
    if several and stage.server is not None:
        raise ValueError(f"model is {stage.model!r}, and a server samples from one: name one, whose tokenizer is read")
    if stage.ensemble and not several:
        raise ValueError(f"ensemble combines models, and model is {stage.model!r}: write model: [A, B]")
    allowed = [name for name in signature(EnsemblePolicy).parameters if name not in _NOT_OF_ENSEMBLE]
    for key in stage.ensemble:
        if key not in allowed:
            raise ValueError(f"ensemble has no key {key!r}{did_you_mean(str(key), allowed)}")


def _stage_engine(stage: SampleStage, dtype: str) -> tuple[Engine, PreTrainedTokenizerBase]:
    """Makes the engine of a stage: a model, several as one, or a server."""
    if isinstance(stage.model, list):
        policy = EnsemblePolicy(stage.model, dtype=dtype, **stage.ensemble)
        assert policy.tokenizer is not None  # all models are folders
        return policy, policy.tokenizer
    if stage.server is not None:
        tokenizer = load_tokenizer(stage.model)
        return remote_engine(stage.server, tokenizer), tokenizer
    model, tokenizer = _load(stage.model, dtype)
    return LocalEngine(model, tokenizer), tokenizer


def _load(folder: str, dtype: str) -> tuple[nn.Module, PreTrainedTokenizerBase]:
    place = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model: nn.Module = load_causal_lm(folder, dtype=getattr(torch, dtype), trainable=False)
    return model.to(place), load_tokenizer(folder)
