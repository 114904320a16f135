"""``rlhf-lightning label-steps``: turns prompts into solutions with labelled steps."""

from __future__ import annotations

import json
import os
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import transformers
from transformers import PreTrainedTokenizerBase

from ..core.trainer_checks import check_single_process
from ..evaluation.answers import Verifier, load_verifier, read_prompts
from ..inference import Engine, RemoteEngine, SamplingParams
from ..inference.answering import StrategyOption
from ..inference.policies import PolicySpec, build_policy, check_single, policy_spec, policy_tokenizer
from ..sequences import Example
from ..utils.command_line import parse_options
from ..utils.files import json_line, write_atomically
from ..utils.imports import find_own_modules
from ..utils.inputs import input_hashes
from .step_labels import TOO_LONG, UNJUDGED, OnTooLong, label_steps, sample_solutions

_PROMPTS_AT_ONCE = 16
_COUNTED = (TOO_LONG, "cut off", "without steps", "duplicates", UNJUDGED)
# Options that change no result, so a run may be resumed with others; on_too_long too, since error only ends a run.
_NOT_RESULTS = ("output", "max_concurrency", "timeout", "api_key_variable", "on_too_long")


@dataclass(frozen=True)
class LabelOptions:
    r"""Options of ``label-steps``.

    Args:
        prompts: a source of ``PromptDataModule``: a file, folder, hub id or task such as sums:prompts?rows=100.
        output: a JSON Lines file that does not exist yet.
        model: a folder or hub id, or several that sample as one: a list, or class_path EnsemblePolicy with init_args;
            with --url its name on the server, or nothing for the only one there.
        url: a server of the OpenAI protocol, such as http://localhost:8000, instead of a model in this process.
        tokenizer: folder or hub id, by default the model's; needed with --url unless --model is one.
        verifier: dotted path of the reward function that checks whole solutions against the rows' columns.
        num_solutions: solutions sampled per prompt; 0 labels those in the rows (completions, completion or response).
        num_completions: completions of each prefix, at least 1.
        labels: soft is the share of completions that are right, hard is 1 if any is.
        step_separator: ends each step; \n means a line's end.
        sampling: settings of solutions and completions, without a seed.
        strategy: how each of them is found instead of sampled: a class name such as best_of_n, or class_path and
            init_args, the scorer included. A label is then the share of right searches from a step on.
        success: smallest reward of a right answer.
        skip_after_failure: once no completion of a wrong solution succeeds, label its remaining steps 0.
        max_length: maximum tokens of a prompt, or of a prompt and all steps but the last; at least 1. By default, and
            at most, the model's limit (with --url, if the server reports it).
        on_too_long: drop longer ones, which are counted, or error.
        limit: number of prompts to read, at least 1; all by default.
        chat_template_kwargs: passed to the chat template; the rows' own take precedence.
        seed: every sample is a function of this, the row's id and the sample's number.
        dtype: type of the model's weights; not with --url.
        dialect: of the server: vllm sends all sampling settings, openai only the standard ones.
        text_prompts: send prompts as text, to a server that takes no token ids.
        api_key_variable: the environment variable that holds the server's key.
        max_concurrency: maximum number of requests to the server at once, at least 1.
        timeout: seconds after which a silent request is given up.
    """

    prompts: str | list[str]
    output: str
    model: PolicySpec | None = None
    url: str | None = None
    tokenizer: str | None = None
    verifier: str = "rlhf_lightning.rewards.exact_answer"
    num_solutions: int = 4
    num_completions: int = 8
    labels: Literal["soft", "hard"] = "soft"
    step_separator: str = "\\n"
    sampling: SamplingParams = field(default_factory=SamplingParams)
    strategy: str | dict[str, Any] | None = None
    success: float = 0.5
    skip_after_failure: bool = False
    max_length: int | None = None
    on_too_long: OnTooLong = "drop"
    limit: int | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    seed: int = 0
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    dialect: Literal["vllm", "openai"] = "vllm"
    text_prompts: bool = False
    api_key_variable: str | None = None
    max_concurrency: int = 16
    timeout: float = 600.0

    @property
    def separator(self) -> str:
        r"""The separator, with ``\n`` and ``\t`` of a command line replaced."""
        return self.step_separator.replace("\\n", "\n").replace("\\t", "\t")

    def check(self) -> None:
        """Checks the options before a model is loaded.

        Raises:
            ValueError: naming the option, its value and the allowed values.
        """
        if Path(self.output).expanduser().exists():
            raise ValueError(f"output {self.output!r} already exists: remove it, or write to another file")
        if self.model is None and self.url is None:
            raise ValueError("no model for the solutions is given: pass --model with a folder, or --url of a server")
        if self.model is not None and not isinstance(policy_spec(self.model), str) and self.tokenizer is not None:
            raise ValueError(f"tokenizer is {self.tokenizer!r}, and an ensemble has that of its models: leave it out")
        if self.url is not None and self.model is not None:
            check_single(self.model, "model", "and --url is of a server, which has one by that name: give its name")
        if self.url is not None and self.tokenizer is None and self.model is None:
            raise ValueError("--url alone gives no tokenizer: pass --tokenizer, the model's")
        for name, least in (("num_solutions", 0), ("num_completions", 1), ("max_length", 1)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"{name} is {value}; it must be at least {least}")
        if self.sampling.seed is not None:
            raise ValueError(f"sampling.seed is {self.sampling.seed}: write --seed, which is that of all samples")
        StrategyOption(self.strategy)
        if not self.step_separator:
            raise ValueError("step_separator is ''; it must have at least one character, such as a line's end")


def label_prompts(options: LabelOptions, say: Callable[[str], None] = print) -> dict[str, float]:
    """Samples solutions of prompts and labels their steps by completing each prefix and checking the answers.

    Paper: Math-Shepherd (Wang et al., 2023, arXiv:2312.08935); formula and departures are in
    :func:`~rlhf_lightning.labeling.step_labels.label_steps`. ``StepwiseDataModule`` reads the rows.

    The output is written at the end, as a whole. Until then results are collected in a hidden file next to it, from
    which the same call resumes after an interruption.

    Args:
        options: the options.
        say: shown one line per finished part.

    Returns:
        Numbers of prompts, solutions and steps; means of the labels (``mean_label``) and of last steps' (``right``);
        numbers of prompts and solutions skipped because they were too long, cut off, without steps, duplicate or
        without verdict.

    Raises:
        ValueError: an option is not allowed, no solution could be labelled, or, with ``on_too_long="error"``, something
            is too long; earlier results are kept, and the same call resumes from there.

    Example:
        >>> options = LabelOptions("sums:prompts?rows=50", "steps.jsonl", "runs/quickstart/sft/model")
        >>> label_prompts(options)["solutions"]  # doctest: +SKIP
        141
    """
    options.check()
    verify = load_verifier(options.verifier)
    tokenizer = _tokenizer(options)
    engine = _engine(options, tokenizer)
    examples = read_prompts(
        options.prompts, tokenizer, limit=options.limit, chat_template_kwargs=options.chat_template_kwargs
    )

    # The journal begins with everything that the results depend on: options, contents of files, the served model.
    settings = {name: value for name, value in asdict(options).items() if name not in _NOT_RESULTS}
    origin = {**settings, "files": input_hashes(settings)}
    if isinstance(engine, RemoteEngine):
        origin["served model"] = engine.served_model()
    journal = _Journal(Path(options.output).expanduser(), origin)
    answering = StrategyOption(options.strategy).on(engine)

    # Parts of a few prompts, so that little is lost when the run is interrupted.
    while part := examples[journal.done : journal.done + _PROMPTS_AT_ONCE]:
        journal.append(len(part), *_labelled(part, options, answering, tokenizer, verify))
        say(f"{journal.done} of {len(examples)} prompts: {len(journal.rows)} solutions labelled")
    return journal.finish()


def _labelled(
    part: Sequence[Example],
    options: LabelOptions,
    engine: Engine,
    tokenizer: PreTrainedTokenizerBase,
    verify: Verifier,
) -> tuple[list[dict[str, Any]], dict[str, int]]:
    """Labels solutions of some prompts; returns them, and how many were skipped for each reason."""
    common: dict[str, Any] = {
        "step_separator": options.separator,
        "sampling": options.sampling,
        "max_length": options.max_length,
        "on_too_long": options.on_too_long,
        "seed": options.seed,
    }  # fmt: skip
    tokens = {example.row_id: example.root.tokens.tolist() for example in part}
    rows = [{**example.fields, "row_id": example.row_id} for example in part]

    cut_off = empty = duplicates = too_long = 0
    skipped: Counter[str] = Counter()

    # Solutions of the model; without them, the rows hold solutions.
    if options.num_solutions:
        rows, cut_off, empty, duplicates, too_long = sample_solutions(
            rows,
            engine,
            tokenizer,
            num_solutions=options.num_solutions,
            prompt_tokens=lambda row: tokens[row["row_id"]],
            **common,
        )
        # A solution's id is its prompt's id and a number.
        tokens = {row["row_id"]: tokens[row["row_id"].rpartition("/")[0]] for row in rows}

    labelled = label_steps(
        rows,
        engine,
        tokenizer,
        verify,
        num_samples=options.num_completions,
        labels=options.labels,
        success=options.success,
        skip_after_failure=options.skip_after_failure,
        prompt_tokens=lambda row: tokens[row["row_id"]],
        skipped=skipped,
        **common,
    )

    # Row ids are for seeds and messages only.
    written = [{name: value for name, value in row.items() if name != "row_id"} for row in labelled]
    counts = too_long + skipped[TOO_LONG], cut_off, empty, duplicates, skipped[UNJUDGED]
    return written, dict(zip(_COUNTED, counts, strict=True))


def _tokenizer(options: LabelOptions) -> PreTrainedTokenizerBase:
    try:
        return policy_tokenizer(options.tokenizer or options.model)  # type: ignore[no-any-return]
    except ValueError as error:
        if options.tokenizer or options.url is None:
            raise
        raise ValueError(
            f"--model={options.model} is a name that the server knows, and no tokenizer: give --tokenizer, the model's"
        ) from error


def _engine(options: LabelOptions, tokenizer: PreTrainedTokenizerBase) -> Engine:
    if options.url is not None:
        return RemoteEngine(
            options.url,
            None if options.model is None else str(options.model),
            tokenizer=tokenizer,
            dialect=options.dialect,
            text_prompts=options.text_prompts,
            api_key_variable=options.api_key_variable,
            max_concurrency=options.max_concurrency,
            timeout=options.timeout,
        )
    policy = build_policy(options.model, dtype=options.dtype)
    policy.tokenizer = tokenizer  # the one that is given, or its own
    return policy


class _Journal:
    """Keeps the results so far in a hidden file next to the output, line by line.

    The first line holds the settings and inputs; a truncated last line is dropped, and its prompts are redone.
    """

    def __init__(self, target: Path, origin: dict[str, Any]) -> None:
        self.target = target
        self.path = target.with_name(f".{target.name}.journal")
        self.done = 0
        self.rows: list[dict[str, Any]] = []
        self.skipped = dict.fromkeys(_COUNTED, 0)
        # As JSON gives it back, so that it compares equal to what a journal holds.
        origin = json.loads(json.dumps(origin, default=str))
        if self.path.exists():
            self._read(origin)
        else:
            target.parent.mkdir(parents=True, exist_ok=True)
            self._write(origin)

    def _read(self, origin: dict[str, Any]) -> None:
        content = self.path.read_bytes()
        # A crash may leave a part of the next line, or zeros that the disk had not replaced yet, after the last line.
        whole = content[: content.rfind(b"\n") + 1]
        parts = whole.split(b"\n")[:-1]
        if parts and not parts[-1].strip(b"\0"):
            whole = whole[: -len(parts.pop()) - 1]
        lines = [self._parsed(number, part) for number, part in enumerate(parts, start=1)]
        if not lines and content and not content.startswith((b"{", b"\0")):
            raise ValueError(f"{str(self.path)!r} is no journal of label-steps: move it away, or write to another file")

        # Rows of different settings must not be mixed in one file.
        first = lines[0] if lines else origin
        changed = [name for name in {**origin, **first} if origin.get(name) != first.get(name)]
        if changed:
            raise ValueError(
                f"output {str(self.target)!r} was started with different {' and '.join(changed)}: resume with the "
                f"same, write to another file, or remove {self.path}"
            )
        if len(whole) < len(content):
            os.truncate(self.path, len(whole))
        if not lines:
            self._write(origin)
        for line in lines[1:]:
            self._count(line)

    def _parsed(self, number: int, part: bytes) -> dict[str, Any]:
        try:
            line: dict[str, Any] = json.loads(part)
            if number > 1:
                # Read as `_count` will, which must not fail halfway.
                sum([line["prompts"], *line["skipped"].values()])
                [row["labels"] for row in line["rows"]]
            elif not isinstance(line, dict):
                raise TypeError
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise ValueError(
                f"line {number} of {str(self.path)!r} is damaged ({type(error).__name__}): cut the file before that "
                "line, or remove it to start from the beginning"
            ) from None
        return line

    def append(self, num_prompts: int, rows: list[dict[str, Any]], skipped: dict[str, int]) -> None:
        line = {"prompts": num_prompts, "skipped": skipped, "rows": rows}
        self._write(line)
        self._count(line)

    def _count(self, line: dict[str, Any]) -> None:
        self.done += line["prompts"]
        self.rows += line["rows"]
        for reason, number in line["skipped"].items():
            self.skipped[reason] += number

    def _write(self, line: dict[str, Any]) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json_line(line))
            file.flush()
            os.fsync(file.fileno())

    def finish(self) -> dict[str, float]:
        """Writes the output, removes the journal, and returns counts and means."""
        if not self.rows:
            self.path.unlink()
            reasons = ", ".join(f"{number} {reason}" for reason, number in self.skipped.items() if number)
            raise ValueError(
                f"no solution of {self.done} prompts could be labelled ({reasons or 'none at all'}): raise "
                "sampling.max_new_tokens, use another model, or check what the verifier reads"
            )
        write_atomically(self.target, "".join(map(json_line, self.rows)))
        self.path.unlink()
        given = [label for row in self.rows for label in row["labels"]]
        return {
            "prompts": self.done,
            "solutions": len(self.rows),
            "steps": len(given),
            "mean_label": sum(given) / len(given),
            "right": sum(row["labels"][-1] for row in self.rows) / len(self.rows),
            **self.skipped,
        }


def run_command(args: Sequence[str]) -> None:
    """Runs ``rlhf-lightning label-steps``.

    Args:
        args: those of :class:`LabelOptions`, or ``--config FILE`` with them.

    Raises:
        SystemExit: 130 after Ctrl-C.
    """
    description = (label_prompts.__doc__ or "").partition("\n")[0]
    given = parse_options("label-steps", LabelOptions, args, description)

    # Before a model is loaded.
    check_single_process("label-steps")
    options = LabelOptions(**given)
    transformers.utils.logging.disable_progress_bar()
    find_own_modules()
    started = time.time()
    try:
        found = label_prompts(options, lambda line: print(f"[{time.time() - started:6.1f} s] {line}", flush=True))
    except KeyboardInterrupt:
        print(f"\ninterrupted: the same command resumes from the last line above ({options.output})", file=sys.stderr)
        raise SystemExit(130) from None
    skipped = ", ".join(f"{found[reason]} {reason}" for reason in _COUNTED if found[reason]) or "none"
    print(
        f"{found['solutions']} solutions of {found['prompts']} prompts in {found['steps']} steps: mean label "
        f"{found['mean_label']:.2f}, {found['right']:.0%} right; skipped: {skipped}"
    )
    print(f"rows: {options.output}")
