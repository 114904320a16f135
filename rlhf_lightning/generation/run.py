"""Answers many prompts: each answer is a row, written when it is finished."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict
from typing import Any

import torch

from ..distributed.collectives import gather_objects
from ..evaluation.answers import read_prompts
from ..inference.policies import policy_tokenizer
from ..inference.telemetry import Telemetry
from ..sequences import Example
from ..utils.files import on_first_rank
from ..utils.inputs import input_hashes
from ..utils.progress import counting
from .options import GenerateOptions, remote_engine
from .output import Key, Output
from .ranks import joined_ranks
from .rows import Emit, Row, RowMaker

# Options that change no row, so that a run may be continued with others.
_NOT_RESULTS = ("output", "prompts_at_once", "max_batch_tokens", "speculation", "device")


def generate_rows(options: GenerateOptions, emit: Emit | None = None, *, show_progress: bool = True) -> dict[str, Any]:
    """Answers prompts, and writes each answer as a line of JSON as soon as it is finished.

    A row holds ``index``, the number of its prompt, and ``sample``, that of the answer; the prompt with its other
    columns (one that has a name of these, as ``given_NAME``); the answer as ``completion``; ``finish_reason`` (``stop``
    or ``length``); ``prompt_tokens``, ``completion_tokens``, ``tokens`` (sampled in all) and ``seconds`` (since the
    prompts that are worked on together were begun). With a strategy also ``score``, ``scorer_tokens``, ``expansions``,
    ``stopped_by`` (the limit of the budget that ended the search), ``thought`` where it thinks before it answers, and,
    if asked for, ``candidates``.

    Rows are functions of the options, the prompt and both numbers: neither the other prompts nor interruptions nor the
    number of ranks change one (its ``seconds`` apart), up to rounding in the model's own products. A call with the same
    options continues an output that exists; with others it is refused. Started by torchrun, ranks share the prompts,
    and the output has the rows of all in the order of prompts.

    Args:
        options: the options.
        emit: called with every row when it is finished, instead of an output.
        show_progress: show how many rows are done, and how long the rest may take.

    Returns:
        The summary, which is also written next to the output: ``rows``, ``prompts``, ``cut_off`` (rows that ended at a
        limit), ``tokens``, ``seconds`` and ``telemetry`` (see ``Telemetry``; of calls that ended or were interrupted),
        ``acceptance_rate``, ``cache_hit_rate``, ``seconds_p50`` and ``seconds_p95`` (of the rows), and with a strategy
        ``mean_score``.

    Raises:
        ValueError: an option is not allowed, something cannot be read, a prompt is too long, or the output is another
            run's. Rows that were written stay.

    Example:
        >>> options = GenerateOptions(model="runs/sft/model", prompts="test.jsonl", output="out.jsonl")
        >>> generate_rows(options)["rows"]  # doctest: +SKIP
        200
    """
    options.check()
    if (options.output is None) == (emit is None):
        raise ValueError("rows go to one place: give either output or emit")
    with joined_ranks("generate") as (rank, world_size):
        tokenizer = policy_tokenizer(options.model, options.adapter)
        examples = _read(options, tokenizer)
        keys = [(index, sample) for index in range(len(examples)) for sample in range(options.num_samples)]
        if emit is not None:
            if world_size > 1:
                raise ValueError(f"{world_size} processes cannot print rows in order: give an output")
            return _printed(options, examples, keys, emit, show_progress)
        output = Output(str(options.output), _origin(options, tokenizer), keys)
        try:
            return _written(options, examples, output, rank, world_size, show_progress)
        finally:
            output.end()
            output.release()


def _read(options: GenerateOptions, tokenizer: Any) -> list[Example]:
    examples = read_prompts(
        [{"prompt": options.prompt}] if options.prompts is None else options.prompts,
        tokenizer,
        limit=options.limit,
        chat_template_kwargs=options.chat_template_kwargs,
        columns=options.columns or None,
        transform=_as_message if options.chat else None,
    )
    if not examples:
        raise ValueError(f"prompts {options.prompts!r} holds no row: give a file with prompts")
    return examples


def _as_message(columns: dict[str, Any]) -> dict[str, Any]:
    """Makes a text prompt a user's message."""
    prompt = columns.get("prompt")
    if not isinstance(prompt, str):
        return columns
    return {**columns, "prompt": [{"role": "user", "content": prompt}]}


def _origin(options: GenerateOptions, tokenizer: Any) -> dict[str, Any]:
    """Everything that rows depend on: options, contents of files, the served model."""
    settings = {name: value for name, value in options.plain().items() if name not in _NOT_RESULTS}
    if options.dtype == "auto":
        on_gpu = (options.device or ("cuda" if torch.cuda.is_available() else "cpu")).startswith("cuda")
        settings["dtype"] = "bfloat16" if on_gpu else "float32"
    if options.server is not None:
        settings["served model"] = remote_engine(options.server, tokenizer).served_model()
    return settings | {"files": input_hashes(settings)}


def _printed(
    options: GenerateOptions, examples: Sequence[Example], keys: Sequence[Key], emit: Emit, show_progress: bool
) -> dict[str, Any]:
    rows: list[Row] = []
    maker, start = RowMaker(options, examples), time.perf_counter()
    with counting("answering", len(keys)) if show_progress else nullcontext() as advance:

        def finish(row: Row) -> None:
            rows.append(row)
            emit(row)
            if advance is not None:
                advance()

        maker.make(keys, finish)
    return _summary(rows, maker.telemetry(), time.perf_counter() - start)


def _written(
    options: GenerateOptions,
    examples: Sequence[Example],
    output: Output,
    rank: int,
    world_size: int,
    show_progress: bool,
) -> dict[str, Any]:
    # Rows written already decide the shares, so the first rank tells the others.
    found: set[Key] = set()
    on_first_rank(lambda: found.update(output.open()))
    done: set[Key] = gather_objects(found)[0]
    missing = [key for key in output.keys if key not in done]
    # Every rank takes its share of the prompts. Nothing is written before all of them can begin.
    share = set(sorted({index for index, _ in missing})[rank::world_size])
    local_keys, start = [key for key in missing if key[0] in share], time.perf_counter()
    maker = RowMaker(options, examples) if local_keys else None
    if missing:
        on_first_rank(lambda: output.save({**output.summary, "status": "unfinished"}))
    try:
        if maker is not None:
            output.begin(rank)
            total, before = (len(output.keys), len(done)) if world_size == 1 else (len(local_keys), 0)
            with counting("answering", total, before) if show_progress else nullcontext() as advance:

                def finish(row: Row) -> None:
                    output.append(row)
                    if advance is not None:
                        advance()

                maker.make(local_keys, finish)
    except KeyboardInterrupt:
        if rank == 0:
            spent = Telemetry() if maker is None else maker.telemetry()
            output.save(_added(output.summary, spent, time.perf_counter() - start) | {"status": "unfinished"})
        raise
    output.end()
    spent = Telemetry() if maker is None else maker.telemetry()
    ranks: list[tuple[Telemetry, float]] = gather_objects((spent, time.perf_counter() - start))
    joined = Telemetry.over_ranks([telemetry for telemetry, _ in ranks])
    on_first_rank(lambda: _finished(output, joined, max(seconds for _, seconds in ranks)))
    summary: dict[str, Any] = gather_objects(output.summary)[0]
    return summary


def _finished(output: Output, telemetry: Telemetry, seconds: float) -> None:
    """Joins the rows of all ranks, and writes the summary; one that was finished before stays."""
    if output.summary.get("status") == "finished":
        return
    spent = _added(output.summary, telemetry, seconds)
    output.save(_summary(output.join(), Telemetry(**spent["telemetry"]), spent["seconds"]) | {"status": "finished"})


def _quantile(values: Sequence[float], percent: int) -> float:
    """Returns the smallest value that so many percent of the values do not exceed.

    Example:
        >>> _quantile([0.4, 0.1, 0.3, 0.2], 50), _quantile([0.4, 0.1, 0.3, 0.2], 95)
        (0.2, 0.4)
    """
    return sorted(values)[max(0, -(-len(values) * percent // 100) - 1)]


def _added(before: dict[str, Any], telemetry: Telemetry, seconds: float) -> dict[str, Any]:
    """Adds what this call has cost to what earlier ones did."""
    total = telemetry.plus(Telemetry(**before.get("telemetry", {})))
    return {"seconds": before.get("seconds", 0.0) + seconds, "telemetry": asdict(total)}


def _summary(rows: Sequence[Row], telemetry: Telemetry, seconds: float) -> dict[str, Any]:
    scores = [row["score"] for row in rows if row.get("score") is not None]
    found: dict[str, Any] = {
        "rows": len(rows),
        "prompts": len({row["index"] for row in rows}),
        "cut_off": sum(row["finish_reason"] == "length" for row in rows),
        "tokens": sum(row["tokens"] for row in rows),
        "seconds": seconds,
        "telemetry": asdict(telemetry),
        "acceptance_rate": telemetry.acceptance_rate,
        "cache_hit_rate": telemetry.cache_hit_rate,
        **{f"seconds_p{percent}": _quantile([row["seconds"] for row in rows], percent) for percent in (50, 95)},
    }
    return found | ({"mean_score": sum(scores) / len(scores)} if scores else {})
