"""The ``challenge`` stage: a model writes new prompts, and what a solver solves sometimes is kept."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from ..evaluation.answers import read_prompts
from ..evaluation.checks import check_scorer
from ..generation.options import sampling_params
from ..inference import Engine, derive_seed
from ..inference.policies import policy_spec
from ..self_improvement.challenger import agreement, challenge_rows, challenges, frontier, new_prompts
from ..self_improvement.samples import ScoredPrompt, Scorer, check_samples, model_hash, sample_prompts
from ..self_improvement.scorers import load_scorer
from ..self_improvement.templates import asked_like, last_words
from ..sequences import Example
from ..utils.files import json_line, write_atomically
from ..utils.validation import check_count
from .row_files import SAMPLED, Journal, NoRowsError
from .sample_stage import stage_policy, stage_prompts
from .stages import ChallengeStage

_REQUESTS_AT_ONCE = 64


def check_challenge(stage: ChallengeStage) -> None:
    """Checks the options of a stage before anything is loaded.

    Raises:
        ValueError: naming the option, its value and what is allowed.
    """
    policy_spec(stage.model)
    if stage.solver is not None:
        policy_spec(stage.solver, "solver")
    sampling_params(stage.writing)
    if stage.verifier is not None:
        check_scorer(stage.verifier)
    check_samples(stage.num_samples, sampling_params(stage.sampling))
    if stage.verifier is None and stage.num_samples < 3:
        raise ValueError(
            f"num_samples is {stage.num_samples}, and without a verifier the answer of most samples is the right one: "
            "draw at least 3, or give verifier"
        )
    if stage.num_samples < 2:
        raise ValueError(
            f"num_samples is {stage.num_samples}, and of one sample a prompt is solved always or never: draw at least 2"
        )
    # One request, no candidates, no prompts: the functions check their options.
    challenges(["a prompt"], number=1, num_examples=stage.num_examples, template=stage.template)
    check_count("number", stage.number, "one for each new prompt that is wanted")
    new_prompts([], [], max_overlap=stage.max_overlap)
    frontier([], success=stage.threshold, low=stage.low, high=stage.high)


def run_challenge(
    stage: ChallengeStage, folder: Path, seed: int, dtype: str, say: Callable[[str], None] = lambda line: None
) -> dict[str, float]:
    """Asks for new prompts, drops near copies, solves the others, and writes rows of the kept ones.

    New prompts and their samples are kept in ``sampled.jsonl``, part by part; an interrupted stage continues after the
    last part.

    Args:
        stage: the stage.
        folder: where the rows go.
        seed: a new prompt is a function of this and of its number, and so are its samples.
        dtype: of the models' weights.
        say: shown one line per part.

    Returns:
        Counts, and the mean pass rate of the rows.

    Raises:
        NoRowsError: no prompt is solved sometimes.
    """
    maker = _Maker(stage, seed, dtype)
    journal = Journal(folder / SAMPLED)
    for start in range(len(journal.parts) * _REQUESTS_AT_ONCE, stage.number, _REQUESTS_AT_ONCE):
        made = [scored for part in journal.parts for scored in part.prompts]
        journal.add(maker.part(start, made))
        asked = min(start + _REQUESTS_AT_ONCE, stage.number)
        say(f"{asked} of {stage.number} requests, {len(made) + len(journal.parts[-1].prompts)} new prompts")

    # Rows of all parts.
    solved = [scored for part in journal.parts for scored in part.prompts]
    kept = frontier(solved, success=stage.threshold, low=stage.low, high=stage.high)
    rows = challenge_rows(kept, success=stage.threshold, answered=stage.verifier is None)
    if not rows:
        raise NoRowsError(
            f"none of {len(solved)} new prompts from {stage.number} requests is solved sometimes: raise number or "
            "num_samples, change template or writing, or widen low and high"
        )
    write_atomically(folder / stage.outputs["prompts"], "".join(map(json_line, rows)))
    journal.file.unlink(missing_ok=True)
    mean = sum(row["pass_rate"] for row in rows) / len(rows)
    return {"requests": stage.number, "new_prompts": len(solved), "rows": len(rows), "pass_rate": mean}


class _Maker:
    """Writes and solves new prompts."""

    def __init__(self, stage: ChallengeStage, seed: int, dtype: str) -> None:
        self.stage, self.seed, self.model = stage, seed, model_hash(stage.solver or stage.model)
        self.writer: Engine
        self.writer, self.tokenizer = stage_policy(stage.model, dtype)
        self.solver, self.solver_tokenizer = self.writer, self.tokenizer
        if stage.solver is not None:
            self.solver, self.solver_tokenizer = stage_policy(stage.solver, dtype)
        self.scorer: Scorer = agreement if stage.verifier is None else load_scorer(stage.verifier)
        examples = stage_prompts(stage, self.tokenizer)
        # New prompts have the form of the first known one: a text, or messages.
        self.form = examples[0].fields["prompt"]
        self.known = [last_words(example.fields["prompt"]) for example in examples]
        self.requests = challenges(
            self.known,
            number=stage.number,
            num_examples=stage.num_examples,
            template=stage.template,
            seed=derive_seed(seed, "requests"),
        )

    def part(self, start: int, made: Sequence[ScoredPrompt]) -> list[ScoredPrompt]:
        """Writes and solves the prompts of the requests from a number on, given those made before."""
        asked = self._examples(self.requests[start : start + _REQUESTS_AT_ONCE], self.tokenizer)
        seeds = [[derive_seed(self.seed, "challenge", start + n)] for n in range(len(asked))]
        params = sampling_params(self.stage.writing)
        groups = self.writer.generate([e.root.tokens.tolist() for e in asked], 1, params, seeds=seeds)
        # A prompt that was cut off is not used.
        texts = [group[0].text for group in groups if group[0].finish_reason == "stop"]
        known = [*self.known, *(last_words(scored.prompt) for scored in made)]
        fresh = new_prompts(texts, known, max_overlap=self.stage.max_overlap)
        if not fresh:
            return []
        found = sample_prompts(
            self.solver,
            self._examples(fresh, self.solver_tokenizer),
            self.scorer,
            num_samples=self.stage.num_samples,
            sampling=sampling_params(self.stage.sampling),
            seed=derive_seed(self.seed, "solve"),
            first=len(made),
            model=self.model,
        )
        return [replace(scored, row_id=f"challenge/{n}") for n, scored in enumerate(found, start=len(made))]

    def _examples(self, texts: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> list[Example]:
        rows: list[dict[str, Any]] = [{"prompt": asked_like(self.form, text)} for text in texts]
        return read_prompts(rows, tokenizer, chat_template_kwargs=self.stage.chat_template_kwargs)
