"""The ``refine`` stage: a model revises its answers, and drafts become rows."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from ..evaluation.checks import check_scorer
from ..generation.options import sampling_params
from ..inference.answering import StrategyOption
from ..inference.policies import policy_spec
from ..self_improvement.refine import refine
from ..self_improvement.samples import model_hash
from ..self_improvement.scorers import load_scorer
from .row_files import SAMPLED, Journal, missing_parts, write_rows
from .sample_stage import stage_policy, stage_prompts
from .stages import RefineStage

_ADVICE = "raise revisions or sampling.temperature, change critique and revision, or refine with another model"


def check_refine(stage: RefineStage) -> None:
    """Checks the options of a stage before anything is loaded.

    Raises:
        ValueError: naming the option, its value and what is allowed.
    """
    policy_spec(stage.model)
    sampling_params(stage.sampling)
    StrategyOption(stage.strategy)
    check_scorer(stage.verifier)
    stage.check()
    _ = stage.settings
    if "spin" in stage.rows:
        raise ValueError("rows has 'spin', which compares demonstrations with plain samples: write a sample stage")


def run_refine(
    stage: RefineStage, folder: Path, seed: int, dtype: str, say: Callable[[str], None] = lambda line: None
) -> dict[str, float]:
    """Answers prompts, revises the answers, and writes rows of all drafts.

    Drafts are kept in ``sampled.jsonl``, part by part; an interrupted stage continues after the last part.

    Args:
        stage: the stage.
        folder: where the rows go.
        seed: a draft is a function of this, its prompt's number and its own.
        dtype: of the model's weights.
        say: shown one line per part.

    Returns:
        Counts, and the mean reward of the drafts.

    Raises:
        NoRowsError: no prompt gave a row.
    """
    policy, tokenizer = stage_policy(stage.model, dtype)
    engine, scorer, sampling = (
        StrategyOption(stage.strategy).on(policy),
        load_scorer(stage.verifier),
        sampling_params(stage.sampling),
    )
    examples = stage_prompts(stage, tokenizer)
    journal, name = Journal(folder / SAMPLED), model_hash(stage.model)
    for numbers in missing_parts(stage, journal, len(examples), say):
        drafts = refine(
            engine,
            tokenizer,
            [examples[n] for n in numbers],
            scorer,
            stage.settings,
            sampling=sampling,
            seed=seed,
            first=numbers[0],
            model=name,
        )
        journal.add([one.drafts for one in drafts])
    return write_rows(stage, journal, folder, seed, _ADVICE)
