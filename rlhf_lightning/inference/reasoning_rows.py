"""Rows for fine-tuning from answers with thoughts: the reasoning kept, masked or stripped."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, get_args

from ..data.formats import OF_ANSWERS
from ..data.thoughts import THINK, check_marks
from ..utils.validation import check_choice, check_same_length
from .strategy import SearchResult

Reasoning = Literal["kept", "masked", "stripped"]
REASONING = get_args(Reasoning)


def reasoning_rows(
    results: Sequence[SearchResult],
    reasoning: Reasoning = "kept",
    *,
    prompts: Sequence[Any] | None = None,
    least_score: float | None = None,
    marks: Sequence[str] = THINK,
) -> list[dict[str, Any]]:
    r"""Makes a demonstration of each result whose thought the policy has closed itself and whose answer has ended.

    - ``kept``: thought and answer are learned;
    - ``masked``: the answer is learned after the thought, which is part of the prompt;
    - ``stripped``: the answer is learned without the thought.

    Args:
        results: of ``HiddenReasoning``, or of a strategy around it.
        reasoning: ``kept``, ``masked`` or ``stripped``.
        prompts: one per result, instead of the searched ones: the chat messages of a rendered chat, say.
        least_score: results whose score is lower, or that have none, are left out; ``None`` keeps all.
        marks: texts that open and close a thought; an opening one at a prompt's end is left out with the thought.

    Returns:
        Rows with ``prompt``, ``completion`` and the other columns of the prompts, as ``SFTDataModule`` reads them;
        those about other answers, such as ``response`` or ``label``, are left out.

    Raises:
        ValueError: a result has no thought, or a prompt is neither text nor chat messages.

    Example:
        >>> from rlhf_lightning.inference.candidates import Candidate, Query
        >>> from rlhf_lightning.inference.completion import Thought
        >>> thought = Thought("1+2=3", "<think>1+2=3</think>\n", closed=True)
        >>> best = Candidate(Query("1+2=?", (), 0), (), "#3", finish_reason="stop", thought=thought)
        >>> reasoning_rows([SearchResult([best], 0)], "masked")
        [{'prompt': '1+2=?<think>1+2=3</think>\n', 'completion': '#3'}]
    """
    check_choice("reasoning", reasoning, REASONING)
    opening, _ = check_marks(marks)
    given = [result.best.query.prompt for result in results] if prompts is None else list(prompts)
    check_same_length(results=results, prompts=given)
    rows = []
    for number, (result, prompt) in enumerate(zip(results, given, strict=True)):
        best = result.best
        if best.thought is None:
            raise ValueError(f"result {number} has no thought: give results of HiddenReasoning")
        scored = least_score is None or (best.score is not None and best.score >= least_score)
        if best.thought.closed and best.finish_reason == "stop" and best.text and scored:
            if not _is_readable(prompt):
                raise ValueError(f"prompt {number} is {prompt!r:.60}: give prompts= of texts or chat messages")
            row = with_reasoning(prompt, best.thought.passage, best.text, reasoning, opening)
            others = {name: value for name, value in best.query.columns.items() if name not in OF_ANSWERS}
            rows.append({**others, **row})
    return rows


def _is_readable(prompt: Any) -> bool:
    return isinstance(prompt, str) or (bool(prompt) and all(isinstance(message, Mapping) for message in prompt))


def with_reasoning(
    prompt: Any, passage: str, text: str, reasoning: Reasoning, opening: str = THINK[0]
) -> dict[str, Any]:
    """Makes the prompt and completion of a demonstration from a thought and an answer.

    Args:
        prompt: a text or chat messages.
        passage: the thought with its marks.
        text: the answer.
        reasoning: as in ``reasoning_rows``.
        opening: the mark that opens a thought.

    Example:
        >>> with_reasoning("2+2=?", "<think>4</think>", "#4", "kept")
        {'prompt': '2+2=?', 'completion': '<think>4</think>#4'}
    """
    before, after = {"kept": ("", passage + text), "masked": (passage, text), "stripped": ("", text)}[reasoning]
    if isinstance(prompt, str):
        if reasoning == "stripped" and prompt.rstrip().endswith(opening):
            prompt = prompt.rstrip().removesuffix(opening)
        return {"prompt": prompt + before, "completion": after}
    # The first words of an answer at the end of a prompt are its context.
    begun = [{"role": "assistant", "content": before}] if before else []
    answer = [{"role": "assistant", "content": after}]
    return {"prompt": [*map(dict, prompt), *begun], "completion": answer}
