"""Compresses the contexts of rows, and answers their prompts after what is left of them."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from ..data.sources import open_source
from ..data.text_tokens import encode, prompt_tokens
from ..evaluation.answers import load_verifier, score_texts
from ..inference import LocalEngine, SamplingParams, derive_seed
from ..inference.policies import check_single
from ..inference.specs import build_compressor, compressor_spec
from ..models import CompressedContext
from ..rewards.exact_answer import check_verdicts
from ..utils.files import json_line, json_values, write_atomically
from ..utils.validation import check_count
from .options import Dtype

Row = dict[str, Any]
_NAMES = ("index", "completion", "finish_reason", "context_tokens", "entries", "bytes", "completion_tokens", "reward")


@dataclass(frozen=True, kw_only=True)
class CompressOptions:
    """Options of ``compress``.

    Args:
        model: folder or hub id of a model, which answers.
        compressor: the folder of a learned compressor, a class name such as truncation, sink_window, attention_eviction
            or text_summary, or class_path and init_args; options follow as --compressor.ratio=8.
        input: rows with the columns context and prompt: a file, folder, hub id or task such as recall:prompts?rows=100.
        output: a JSON Lines file that does not exist yet; without it rows are printed.
        verifier: dotted path of a reward function that checks answers against the rows' columns; none by default.
        sampling: settings of the answers, without a seed; greedy by default.
        limit: number of rows to read, at least 1; all by default.
        columns: new name of a column -> its name in the rows, such as '{context: document, prompt: question}'.
        rows_at_once: rows that are compressed and answered together, at least 1; affects no result.
        max_batch_tokens: tokens of cache held at once, at least 1; affects memory, not results.
        seed: every answer is a function of this and the number of its row.
        dtype: of the weights; auto is bfloat16 on a GPU, else float32.
        device: where the model runs; by default a GPU if there is one.
    """

    model: str
    compressor: str | dict[str, Any]
    input: str | list[str]
    output: str | None = None
    verifier: str | None = None
    sampling: SamplingParams = field(default_factory=lambda: SamplingParams(temperature=0.0))
    limit: int | None = None
    columns: dict[str, str] = field(default_factory=dict)
    rows_at_once: int = 64
    max_batch_tokens: int = 65536
    seed: int = 0
    dtype: Dtype = "auto"
    device: str | None = None

    def check(self) -> None:
        """Checks the options before anything is loaded.

        Raises:
            ValueError: naming the option, its value and what is allowed.
        """
        check_single(self.model, "model", "and a compressor is of one: name the one that it was made for")
        if self.sampling.seed is not None:
            raise ValueError(f"sampling.seed is {self.sampling.seed}: write seed, which is that of all answers")
        check_count("rows_at_once", self.rows_at_once, "64 is usual")
        check_count("max_batch_tokens", self.max_batch_tokens, "65536 is a good start; lower it to save memory")
        if self.limit is not None:
            check_count("limit", self.limit, "leave it out to read all rows")
        if self.verifier is not None:
            load_verifier(self.verifier)
        try:
            compressor_spec(self.compressor)
        except TypeError as error:  # an option that there is not
            raise ValueError(str(error)) from error

    def plain(self) -> dict[str, Any]:
        """Returns the options as plain values, the compressor in full."""
        found: dict[str, Any] = {option.name: getattr(self, option.name) for option in fields(self)}
        sampling = {option.name: getattr(self.sampling, option.name) for option in fields(self.sampling)}
        return found | {"sampling": sampling, "compressor": compressor_spec(self.compressor)}


@dataclass(frozen=True)
class _Read:
    """A row, and its tokens."""

    columns: Row
    context: list[int]
    prompt: list[int]


def compress_rows(options: CompressOptions, emit: Callable[[Row], object] | None = None) -> dict[str, float]:
    """Compresses contexts of rows, and answers their prompts after what is left of them.

    A row of the output holds ``index``, the columns of the row (one that has a name of these, as ``given_NAME``), the
    answer as ``completion``, ``finish_reason``, ``context_tokens``, ``entries`` and ``bytes``, the number of entries of
    the cache that stand for the context and what their keys and values take, ``completion_tokens``, and with a verifier
    ``reward``. The output is written at the end, as a whole.

    Args:
        options: the options.
        emit: called with every row when its part is finished, instead of an output.

    Returns:
        ``rows``; ``context_tokens`` and ``entries`` of all, their ``ratio``, and ``bytes``; ``compress_seconds`` and
        ``answer_seconds``; and with a verifier ``accuracy``, the mean reward of rows that have one.

    Raises:
        ValueError: an option is not allowed, something cannot be read, or a row has no context or prompt.

    Example:
        >>> options = CompressOptions(model="runs/sft/model", compressor="truncation", input="rows.jsonl")
        >>> compress_rows(options, print)["ratio"]  # doctest: +SKIP
        4.0
    """
    options.check()
    if (options.output is None) == (emit is None):
        raise ValueError("rows go to one place: give either output or emit")
    if options.output is not None and Path(options.output).expanduser().exists():
        raise ValueError(f"output {options.output!r} already exists: remove it, or write to another file")
    engine = LocalEngine.from_pretrained(
        options.model, dtype=options.dtype, device=options.device, max_batch_tokens=options.max_batch_tokens
    )
    read = _rows(options, engine.tokenizer)
    compressor = build_compressor(options.compressor, engine.model, engine.tokenizer, options.model)
    rows: list[Row] = []
    seconds = {"compress_seconds": 0.0, "answer_seconds": 0.0}
    for start in range(0, len(read), options.rows_at_once):
        part = read[start : start + options.rows_at_once]
        before = time.perf_counter()
        contexts = compressor.compress([row.context for row in part], [row.prompt for row in part])
        seconds["compress_seconds"] += time.perf_counter() - before
        before = time.perf_counter()
        done = _answered(options, engine, part, contexts, start)
        seconds["answer_seconds"] += time.perf_counter() - before
        rows += done
        if emit is not None:
            for row in done:
                emit(row)
    if options.output is not None:
        text = "".join(json_line(json_values(row)) for row in rows)
        write_atomically(Path(options.output).expanduser(), text)
    return _summary(rows) | seconds


def _rows(options: CompressOptions, tokenizer: Any) -> list[_Read]:
    """Reads and tokenises rows: the context begins a sequence, and the prompt continues it."""
    found: list[_Read] = []
    for row_id, columns in _limited(open_source(options.input, columns=options.columns or None), options.limit):
        for name in ("context", "prompt"):
            if not isinstance(columns.get(name), str) or not columns[name]:
                raise ValueError(
                    f"{row_id}: {name} is {columns.get(name)!r:.60}; it must be a text: name the column that has it "
                    f"with columns={{{name}: NAME}}"
                )
        prompt = encode(tokenizer, columns["prompt"], continues=True)
        found.append(_Read(columns, prompt_tokens(tokenizer, columns["context"]), prompt))
    if not found:
        raise ValueError(f"input {options.input!r} holds no row: give a file with contexts and prompts")
    return found


def _limited(source: Any, limit: int | None) -> Iterator[tuple[str, Row]]:
    for number, row in enumerate(source):
        if limit is not None and number >= limit:
            return
        yield row


def _answered(
    options: CompressOptions,
    engine: LocalEngine,
    part: Sequence[_Read],
    contexts: Sequence[CompressedContext],
    start: int,
) -> list[Row]:
    """Makes the rows of the output."""
    # Seeds follow the number of the row, so that the size of a part changes no answer.
    seeds = [[derive_seed(options.seed, start + n, 0)] for n in range(len(part))]
    prompts = [row.prompt for row in part]
    samples = [group[0] for group in engine.generate(prompts, 1, options.sampling, seeds=seeds, contexts=contexts)]
    rewards: list[float | None] = []
    if options.verifier is not None:
        texts = [sample.text for sample in samples]
        given = score_texts(load_verifier(options.verifier), [row.columns for row in part], texts)
        rewards = check_verdicts(given, len(part))

    # The row's own columns come along; names that the output needs are moved out of the way, not overwritten.
    rows: list[Row] = []
    for n, (row, context, sample) in enumerate(zip(part, contexts, samples, strict=True)):
        others = {f"given_{name}" if name in _NAMES else name: value for name, value in row.columns.items()}
        made = {
            "index": start + n,
            **others,
            "completion": sample.text,
            "finish_reason": sample.finish_reason,
            "context_tokens": context.num_tokens,
            "entries": context.size,
            "bytes": context.nbytes,
            "completion_tokens": len(sample.token_ids),
        }
        rows.append(made | ({"reward": rewards[n]} if rewards else {}))
    return rows


def _summary(rows: Sequence[Row]) -> dict[str, float]:
    found = {name: float(sum(row[name] for row in rows)) for name in ("context_tokens", "entries", "bytes")}
    found |= {"rows": float(len(rows)), "ratio": found["context_tokens"] / found["entries"]}
    rewards = [row["reward"] for row in rows if row.get("reward") is not None]
    return found | ({"accuracy": sum(rewards) / len(rewards)} if rewards else {})
