r"""Functions for ``transform=`` that map the columns of a published dataset to those of a data contract.

Each takes a row's columns and returns new ones, or ``None`` to drop the row; any function that does so can be
used instead, named by its dotted path in YAML.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from .cell_checks import check_number, describe_columns, wrong_type
from .messages import Messages
from .numbers_in_text import BOX, until_closing_brace

HELPSTEER_ATTRIBUTES = ("helpfulness", "correctness", "coherence", "complexity", "verbosity")

# Where another speaker begins in the prompts of HelpSteer2 that have several turns.
_HELPSTEER_TURN = re.compile(r"\s*<extra_id_1>(User|Assistant)\n\s*")
# Below this score even the better completion of an Orca pair is not good, by the card of the dataset.
_ORCA_LEAST_SCORE = 8
_BOXED = re.compile(BOX)


def chat_prompt(columns: dict[str, Any]) -> dict[str, Any]:
    """Makes a text prompt the user's message, after that of the system where there is a column ``system``.

    For rows of text and a model that was tuned on chats: the prompt is then rendered by its chat template, and answers
    in text become the assistant's. A prompt of messages is left unchanged.

    Args:
        columns: ``prompt``, perhaps ``system``, and any others, which stay.

    Raises:
        ValueError: for a prompt or system message that is not text.

    Example:
        >>> chat_prompt({"prompt": "2+2=", "system": "Be brief.", "answer": 4})["prompt"]
        [{'role': 'system', 'content': 'Be brief.'}, {'role': 'user', 'content': '2+2='}]
    """
    if isinstance(columns.get("prompt"), list):
        return columns
    rest = {name: value for name, value in columns.items() if name not in ("prompt", "system")}
    return {**rest, "prompt": _conversation(columns.get("system"), _text(columns, "prompt"))}


def orca_pair(columns: dict[str, Any]) -> dict[str, Any] | None:
    """Reads a pair of ``argilla/distilabel-intel-orca-dpo-pairs``, as its card recommends to use it.

    Leaves out ties and pairs that the judge did not rate, pairs whose better completion has a score below 8, and
    pairs whose question is in GSM8K's training file.

    Args:
        columns: ``system, input, chosen, rejected, status, chosen_score, in_gsm8k_train``; others are dropped.

    Raises:
        ValueError: for a missing or wrong column.

    Example:
        >>> row = {"system": "", "input": "2+2=", "chosen": "4", "rejected": "5", "status": "unchanged"}
        >>> orca_pair({**row, "chosen_score": 9.0, "in_gsm8k_train": False})
        {'prompt': [{'role': 'user', 'content': '2+2='}], 'chosen': '4', 'rejected': '5'}
        >>> orca_pair({**row, "chosen_score": 7.0, "in_gsm8k_train": False}) is None
        True
    """
    # A value may be null if the judge's answer could not be parsed, but no column may be missing.
    status, score, leaked = (_there(columns, name) for name in ("status", "chosen_score", "in_gsm8k_train"))
    unrated = score is None or check_number(score, "chosen_score") < _ORCA_LEAST_SCORE
    if status == "tie" or unrated or leaked:
        return None
    prompt = _conversation(columns.get("system"), _text(columns, "input"))
    return {"prompt": prompt, "chosen": _text(columns, "chosen"), "rejected": _text(columns, "rejected")}


def helpsteer2(columns: dict[str, Any]) -> dict[str, Any]:
    """Reads a rated response of ``nvidia/HelpSteer2``: its prompt as a conversation, its five ratings by attribute.

    Args:
        columns: ``prompt, response, helpfulness, correctness, coherence, complexity, verbosity``. In a prompt of
            several turns the later ones begin with a line ``<extra_id_1>User`` or ``<extra_id_1>Assistant``.

    Returns:
        ``prompt, completion, ratings`` and all other columns.

    Raises:
        ValueError: for a missing column, a row without any rating, or a prompt whose last turn is not the user's.

    Example:
        >>> row = helpsteer2({"prompt": "c#", "response": "A language.", "helpfulness": 3, "verbosity": 1})
        >>> row["prompt"], row["ratings"]["helpfulness"], row["ratings"]["coherence"]
        ([{'role': 'user', 'content': 'c#'}], 3, None)
    """
    first, *turns = _HELPSTEER_TURN.split(_text(columns, "prompt"))
    messages = [{"role": "user", "content": first}]
    messages += [{"role": who.lower(), "content": said} for who, said in zip(turns[::2], turns[1::2], strict=True)]
    if messages[-1]["role"] != "user":
        raise ValueError("the prompt's last turn is the assistant's, expected the user's: the response answers it")
    rest = {name: value for name, value in columns.items() if name not in ("prompt", "response", *HELPSTEER_ATTRIBUTES)}
    ratings = {name: columns.get(name) for name in HELPSTEER_ATTRIBUTES}
    if all(rating is None for rating in ratings.values()):
        raise ValueError(f"no rating{describe_columns(columns, 'helpfulness')}, expected {', '.join(ratings)}")
    return {**rest, "prompt": messages, "completion": _text(columns, "response"), "ratings": ratings}


def boxed_answer(columns: dict[str, Any]) -> dict[str, Any] | None:
    r"""Reads a problem of ``AI-MO/NuminaMath-CoT`` and the answer that its solution ends in.

    Leaves out problems whose solution has no answer in ``\boxed{}``, such as proofs, which cannot be verified.

    Args:
        columns: ``problem``, ``solution`` and perhaps ``source``, which stays; others are dropped.

    Returns:
        ``prompt``, the problem as the user's message; ``answer``, what the last box contains.

    Raises:
        ValueError: for a missing or wrong column.

    Example:
        >>> boxed_answer({"problem": "2+2?", "solution": r"So \boxed{\frac{8}{2}}.", "source": "amc"})
        {'source': 'amc', 'prompt': [{'role': 'user', 'content': '2+2?'}], 'answer': '\\frac{8}{2}'}
    """
    problem, solution = _text(columns, "problem"), _text(columns, "solution")
    answer = _last_box(solution)
    if not answer:
        return None
    kept = {"source": columns["source"]} if columns.get("source") is not None else {}
    return {**kept, "prompt": _conversation(None, problem), "answer": answer}


def _last_box(solution: str) -> str:
    r"""Returns the content of the last ``\boxed{}`` of a text; empty without one, or if it is not closed."""
    boxes = list(_BOXED.finditer(solution))
    if not boxes:
        return ""
    return until_closing_brace(solution, boxes[-1].end()).strip()


def _conversation(system: Any, question: str) -> Messages:
    if not question:
        raise ValueError("the prompt is empty: write something to be answered")
    if system is not None and not isinstance(system, str):
        raise wrong_type(system, "system", "a string")
    opening = [{"role": "system", "content": system}] if system else []
    return [*opening, {"role": "user", "content": question}]


def _there(columns: Mapping[str, Any], name: str) -> Any:
    if name not in columns:
        raise ValueError(f"no column {name!r}{describe_columns(columns, name)}")
    return columns[name]


def _text(columns: Mapping[str, Any], name: str) -> str:
    value = _there(columns, name)
    if not isinstance(value, str):
        raise wrong_type(value, name, "a string")
    return value
