"""Collects training rows from search trees: pairs of siblings, labelled steps, and the chosen solution.

Rows are those of ``PreferenceDataModule``, ``StepwiseDataModule`` and ``SFTDataModule``.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, get_args

from ..utils.validation import check_choice, check_not_negative
from .trees import Node, SearchTree

Estimate = Literal["mean", "best", "search"]


def node_values(tree: SearchTree, estimate: Estimate = "mean") -> dict[Node, float]:
    """Computes what each node is worth, as far as it is known.

    Args:
        tree: a search's.
        estimate: of the scores of the solutions at or below a node, each as often as it was drawn, the ``mean``, or the
            ``best``; or the ``search``'s own value. With a verifier of 0 and 1, ``mean`` is the soft and ``best`` the
            hard estimate of Math-Shepherd (Wang et al., 2023, arXiv:2312.08935).

    Returns:
        Finite values; nodes below which no solution has such a score are missing.
    """
    check_choice("estimate", estimate, get_args(Estimate))
    if estimate == "search":
        return {node: node.value for node in tree.nodes() if node.value is not None and math.isfinite(node.value)}
    # Parents come before their children.
    nodes = list(tree.nodes())
    totals: dict[Node, tuple[float, int, float]] = {}
    for node in reversed(nodes):
        found = [totals[child] for child in (*node.children, *node.rollouts) if child in totals]
        if node.finish_reason is not None and node.score is not None and math.isfinite(node.score):
            found.append((node.score * node.multiplicity, node.multiplicity, node.score))
        if found:
            sums, counts, bests = zip(*found, strict=True)
            totals[node] = sum(sums), sum(counts), max(bests)
    return {node: best if estimate == "best" else total / count for node, (total, count, best) in totals.items()}


def collect_pairs(
    tree: SearchTree,
    *,
    estimate: Estimate = "mean",
    margin: float = 0.0,
    prompt: Any = None,
    columns: Mapping[str, Any] | None = None,
    stop: Sequence[str] = (),
) -> list[dict[str, Any]]:
    """Makes a pair at each node of the best and the worst of the steps that continue it.

    A step alone is no answer, so a pair has whole solutions, which differ from that step on: the best-scored one below
    the better step is chosen, the worst-scored one below the worse is rejected. Truncated solutions are in no pair.

    Args:
        tree: a search's.
        estimate: of a step, see ``node_values``.
        margin: pairs whose steps differ by no more than this are left out, at least 0.
        prompt: of the rows, such as chat messages; by default the tree's text.
        columns: further columns of the rows.
        stop: strings before which solutions end.

    Returns:
        Rows with ``prompt``, ``chosen``, ``rejected``, and ``margin``, the difference of the steps' values.

    Example:
        >>> right, wrong = (Node((n,), f"#{n}", finish_reason="stop", score=float(n)) for n in (1, 0))
        >>> tree = SearchTree(Node(children=[wrong, right]), "0+1=?")
        >>> right.parent = wrong.parent = tree.root
        >>> collect_pairs(tree)
        [{'prompt': '0+1=?', 'chosen': '#1', 'rejected': '#0', 'margin': 1.0}]
    """
    check_not_negative("margin", margin, "0 takes all pairs that differ")
    values = node_values(tree, estimate)
    rows = []
    for node in tree.nodes():
        siblings = [n for n in (*node.children, *node.rollouts) if n in values and next(_ended(n), None) is not None]
        if len(siblings) < 2:
            continue
        better, worse = max(siblings, key=values.__getitem__), min(siblings, key=values.__getitem__)
        chosen = max(_ended(better), key=_score)
        rejected = min(_ended(worse), key=_score)
        texts = {"chosen": _text(chosen, stop), "rejected": _text(rejected, stop)}
        differs = texts["chosen"] != texts["rejected"] and _score(chosen) > _score(rejected)
        gap = values[better] - values[worse]
        if gap > margin and differs and all(texts.values()):
            rows.append({**_shared(tree, prompt, columns), **texts, "margin": gap})
    return rows


def collect_steps(
    tree: SearchTree,
    *,
    estimate: Estimate = "mean",
    step_separator: str = "\n",
    prompt: Any = None,
    columns: Mapping[str, Any] | None = None,
    stop: Sequence[str] = (),
) -> list[dict[str, Any]]:
    r"""Makes a row of each line of steps, labelled with their values.

    A line ends before a step whose value is unknown, and before one that was cut off. One that another begins with, or
    repeats, is left out.

    Args:
        tree: a search's.
        estimate: of a step, see ``node_values``; all in [0, 1].
        step_separator: ends a step; what the search cut off before it (``max_step_tokens``) is joined.
        prompt: of the rows, such as chat messages; by default the tree's text.
        columns: further columns of the rows.
        stop: strings before which solutions end.

    Returns:
        Rows with ``prompt``, ``completions`` (the steps) and ``labels`` (their values).

    Raises:
        ValueError: a value outside of [0, 1].

    Example:
        >>> last = Node((7,), "#3", finish_reason="stop", score=1.0)
        >>> first = Node((5, 6), "1+2=3\n", children=[last])
        >>> tree = SearchTree(Node(children=[first]), "1+2=?")
        >>> first.parent, last.parent = tree.root, first
        >>> collect_steps(tree)
        [{'prompt': '1+2=?', 'completions': ['1+2=3', '#3'], 'labels': [1.0, 1.0]}]
    """
    values = node_values(tree, estimate)
    outside = [value for node, value in values.items() if node.parent is not None and not 0 <= value <= 1]
    if outside:
        raise ValueError(
            f"a step has the value {outside[0]!r}, and labels are in [0, 1]: search with a scorer of probabilities, "
            "such as a VerifierScorer of 0 and 1, or a ProcessScorer"
        )
    lines: dict[tuple[str, ...], list[float]] = {}
    for node in tree.nodes():
        if node.parent is not None and not node.children and not node.rollout:
            steps = list(_steps(node, values, step_separator, stop))
            if steps:
                lines.setdefault(tuple(text for text, _ in steps), [value for _, value in steps])
    begun = {line[:count] for line in lines for count in range(1, len(line))}
    return [
        {**_shared(tree, prompt, columns), "completions": list(line), "labels": labels}
        for line, labels in lines.items()
        if line not in begun
    ]


def collect_demonstrations(
    tree: SearchTree,
    *,
    least: float | None = None,
    prompt: Any = None,
    columns: Mapping[str, Any] | None = None,
    stop: Sequence[str] = (),
) -> list[dict[str, Any]]:
    """Makes a row of the chosen solution, if it has ended.

    Args:
        tree: a search's.
        least: the score that it must have; ``None`` takes any.
        prompt: of the row, such as chat messages; by default the tree's text.
        columns: further columns of the row.
        stop: strings before which solutions end.

    Returns:
        A row with ``prompt`` and ``completion``, or none.

    Example:
        >>> end = Node((7,), "#3", finish_reason="stop", score=1.0, chosen=True)
        >>> tree = SearchTree(Node(children=[end]), "1+2=?")
        >>> end.parent = tree.root
        >>> collect_demonstrations(tree, least=0.5)
        [{'prompt': '1+2=?', 'completion': '#3'}]
    """
    chosen = [node for node in tree.nodes() if node.chosen and node.finish_reason == "stop"]
    good = [node for node in chosen if least is None or (node.score is not None and node.score >= least)]
    texts = [text for node in good if (text := _text(node, stop))]
    return [{**_shared(tree, prompt, columns), "completion": text} for text in texts]


def _shared(tree: SearchTree, prompt: Any, columns: Mapping[str, Any] | None) -> dict[str, Any]:
    return {"prompt": tree.prompt if prompt is None else prompt, **(columns or {})}


def _ended(node: Node) -> Iterator[Node]:
    """Yields the scored solutions at or below a node that ended and were not cut off."""
    return (n for n in node.subtree() if n.finish_reason == "stop" and n.score is not None and math.isfinite(n.score))


def _score(node: Node) -> float:
    return -math.inf if node.score is None else node.score


def _text(node: Node, stop: Sequence[str]) -> str:
    return _before("".join(step.text for step in node.line), stop)


def _before(text: str, stop: Sequence[str]) -> str:
    return text[: min((at for string in stop if (at := text.find(string)) >= 0), default=len(text))]


def _steps(
    node: Node, values: Mapping[Node, float], separator: str, stop: Sequence[str]
) -> Iterator[tuple[str, float]]:
    """Yields the steps of a line with their values, as far as these are known."""
    text = ""
    for step in node.line[1:]:
        if step not in values:
            return
        text += step.text
        ended = step.finish_reason == "stop"
        if not ended and not text.endswith(separator):
            continue
        whole = (_before(text, stop) if ended else text).removesuffix(separator)
        text = ""
        if whole.strip("\r\n"):
            yield whole, values[step]
