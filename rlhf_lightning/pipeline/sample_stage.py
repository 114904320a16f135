"""The ``sample`` stage and the evaluation of exported models: a model answers prompts, a verifier checks them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from ..evaluation.answers import answer_prompts, load_verifier, read_prompts
from ..evaluation.checks import check_scorer
from ..generation.options import remote_engine, sampling_params
from ..inference import Engine, SamplingParams, derive_seed
from ..inference.answering import StrategyOption
from ..inference.policies import PolicySpec, build_policy, check_single, policy_spec
from ..models import load_tokenizer
from ..self_improvement.row_makers import hinted_rows, without_hints
from ..self_improvement.samples import ScoredPrompt, Scorer, check_samples, model_hash, sample_prompts
from ..self_improvement.scorers import load_scorer
from ..self_improvement.templates import check_places
from ..sequences import Example
from ..utils.files import json_line, write_atomically
from .config import Evaluation
from .row_files import SAMPLED, Journal, missing_parts, write_rows
from .stages import PromptStage, SampleStage

ANSWERS = "test_answers.jsonl"
_ADVICE = "raise num_samples or sampling.temperature, change what is kept, or sample from another model"


def run_sample(
    stage: SampleStage, folder: Path, seed: int, dtype: str, say: Callable[[str], None] = lambda line: None
) -> dict[str, float]:
    """Samples and scores completions, and writes rows of them.

    Samples are kept in ``sampled.jsonl``, part by part; an interrupted stage continues after the last part.

    Args:
        stage: the stage.
        folder: where the rows go.
        seed: a sample is a function of this, its prompt's number and its own.
        dtype: of the model's weights.
        say: shown one line per part.

    Returns:
        Counts, and the mean reward of the samples.

    Raises:
        NoRowsError: no prompt gave a row.
    """
    engine, tokenizer = _stage_engine(stage, dtype)
    examples = stage_prompts(stage, tokenizer)
    answering = StrategyOption(stage.strategy).on(engine)
    maker = _Maker(stage, answering, tokenizer, load_scorer(stage.verifier), seed)
    journal = Journal(folder / SAMPLED)

    # Seeds are functions of prompt and sample numbers, so a resumed stage draws the same samples.
    for numbers in missing_parts(stage, journal, len(examples), say):
        drawn = maker.sample([examples[n] for n in numbers], numbers)
        journal.add(drawn, maker.rationalised(drawn, numbers[0]))
    return write_rows(stage, journal, folder, seed, _ADVICE)


def stage_prompts(stage: PromptStage, tokenizer: PreTrainedTokenizerBase) -> list[Example]:
    """Reads the prompts of a stage."""
    return read_prompts(
        stage.prompts, tokenizer, columns=stage.columns or None, chat_template_kwargs=stage.chat_template_kwargs
    )


class _Maker:
    """Samples the prompts of a stage, and again, with a hint, prompts that no sample solved."""

    def __init__(
        self, stage: SampleStage, engine: Engine, tokenizer: PreTrainedTokenizerBase, scorer: Scorer, seed: int
    ) -> None:
        self.stage, self.engine, self.tokenizer, self.scorer, self.seed = stage, engine, tokenizer, scorer, seed
        self.model = model_hash(stage.model)
        self.sampling = sampling_params(stage.sampling)

    def sample(self, examples: Sequence[Example], numbers: Sequence[int], *names: str) -> list[ScoredPrompt]:
        return sample_prompts(
            self.engine,
            examples,
            self.scorer,
            num_samples=self.stage.num_samples,
            sampling=self.sampling,
            seed=derive_seed(self.seed, *names) if names else self.seed,
            numbers=numbers,
            model=self.model,
        )

    def rationalised(self, drawn: Sequence[ScoredPrompt], first: int) -> list[ScoredPrompt]:
        if self.stage.hint is None:
            return []
        rows = hinted_rows(drawn, self.stage.hint, threshold=_success(self.stage))
        if not rows:
            return []
        kwargs = self.stage.chat_template_kwargs
        examples = read_prompts(rows, self.tokenizer, chat_template_kwargs=kwargs)
        # By the prompts' own numbers: whether others are solved changes no sample.
        numbers = [first + example.fields["unhinted"]["place"] for example in examples]
        return without_hints(self.sample(examples, numbers, "hint"))


def _success(stage: SampleStage) -> float:
    assert stage.threshold is not None  # checked
    return stage.threshold


def evaluate(evaluation: Evaluation, model_folder: Path, dtype: str, answers_file: Path) -> dict[str, float]:
    """Answers the test prompts, writes the answers, and returns accuracy and number of rows."""
    policy, tokenizer = stage_policy(str(model_folder), dtype)
    option = StrategyOption(evaluation.strategy, own_sampling=True)
    engine = option.on(policy)
    examples = read_prompts(
        evaluation.prompts, tokenizer, limit=evaluation.limit, chat_template_kwargs=evaluation.chat_template_kwargs
    )
    greedy = SamplingParams(max_new_tokens=evaluation.max_new_tokens, temperature=0.0)
    sampling, verifier = option.sampling(engine, greedy), load_verifier(evaluation.verifier)
    groups = answer_prompts(engine, examples, verifier, sampling=sampling)
    answers = [group[0] for group in groups]
    rewards = [answer.reward for answer in answers if answer.reward is not None]
    if not rewards:
        raise ValueError(f"no reward for any of the prompts {evaluation.prompts!r}: they lack what the verifier reads")
    lines = [
        json_line({"row": row.row_id, "prompt": row.fields["prompt"], "completion": said.text, "reward": reward})
        for row, said, reward in ((answer.example, answer.completion, answer.reward) for answer in answers)
    ]
    write_atomically(answers_file, "".join(lines))
    return {"accuracy": sum(rewards) / len(rewards), "rows": len(rewards)}


def check_sample(stage: SampleStage) -> None:
    """Checks the options of a stage before anything is loaded.

    Raises:
        ValueError: naming the option, its value and what is allowed.
    """
    sampling = sampling_params(stage.sampling)
    StrategyOption(stage.strategy)
    check_scorer(stage.verifier)
    check_samples(stage.num_samples, sampling, stage.rows, strategy=stage.strategy)
    stage.check()
    policy_spec(stage.model)
    if stage.server is not None:
        check_single(stage.model, "model", "and a server samples from one: name one, whose tokenizer is read")
        remote_engine(stage.server | {"text_prompts": False}, None)  # the tokenizer comes later
    if stage.hint is not None:
        if "demonstrations" not in stage.rows or stage.threshold is None:
            raise ValueError("hint makes demonstrations of prompts below threshold: add them to rows, and a threshold")
        if "{prompt}" not in stage.hint:
            check_places("hint", stage.hint, ("prompt",))


def _stage_engine(stage: SampleStage, dtype: str) -> tuple[Engine, PreTrainedTokenizerBase]:
    """Makes the engine of a stage: a model, several as one, or a server."""
    if stage.server is None:
        return stage_policy(stage.model, dtype)
    tokenizer = load_tokenizer(str(stage.model))
    return remote_engine(stage.server, tokenizer), tokenizer


def stage_policy(model: PolicySpec, dtype: str) -> tuple[Engine, PreTrainedTokenizerBase]:
    """Loads a model that samples, or several as one, and the tokenizer."""
    policy = build_policy(model, dtype=dtype)
    assert policy.tokenizer is not None  # all models are folders or hub ids
    return policy, policy.tokenizer
