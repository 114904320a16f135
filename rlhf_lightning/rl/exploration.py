"""Completions to train on from samples, searches, or both: the trees that strategies grow, as branches.

A search draws steps from the policy and decides by a scorer which of them are continued. For training, each partial
solution that it left is completed by one sample, so that all that was drawn leads to completions with rewards of their
own, the bad as well as the good.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from ..distributed.collectives import Metrics, sum_over_ranks
from ..distributed.unshard import gathered
from ..inference import Candidate, Completion, Node, Scores, SearchResult, SearchTree, derive_seed
from ..inference.candidates import Query
from ..inference.completion import FinishReason, decode
from ..inference.sampling import SamplingParams
from ..inference.strategy import Strategy
from ..sequences import Example
from .branches import Branch, TreeCompletion, branch_line
from .rollout_options import SAMPLES, SearchRollouts, build_rollouts


class Explorer:
    """Finds the completions of prompts to train on.

    Args:
        module: an ``OnPolicyModule``.
        options: what they come from.
    """

    def __init__(self, module: Any, options: SearchRollouts) -> None:
        self.module = module
        self.options = options
        self._strategies: list[Strategy | None] | None = None
        self.tokens = self.scorer_tokens = 0

    def __call__(self, prompts: Sequence[Example], seeds: Sequence[int]) -> list[list[Completion]]:
        """Completes prompts; every rank calls it, with any number of them.

        Args:
            prompts: this rank's.
            seeds: one per prompt; they determine all that is drawn.

        Returns:
            For each prompt the completions of all sources, those of a tree depth first.
        """
        if not self.options.searches:
            return self.module.generate(prompts, seeds)  # type: ignore[no-any-return]
        # Built at the first call, since the engine exists only after the module is configured.
        if self._strategies is None:
            scorer = OutcomeScorer(self.module)
            self._strategies = [
                None if spec == SAMPLES else build_rollouts(spec, self.module.engine, scorer)
                for spec in self.options.parts
            ]

        found: list[list[Completion]] = [[] for _ in prompts]
        # Searches take different numbers of rounds on each rank.
        with gathered(self.module.model):
            for number, strategy in enumerate(self._strategies):
                if strategy is None:
                    groups = self.module.generate(prompts, seeds)
                else:
                    groups = self._searched(strategy, prompts, [derive_seed(s, "search", number) for s in seeds])
                for completions, group in zip(found, groups, strict=True):
                    completions += group
        return found

    def _searched(self, strategy: Strategy, prompts: Sequence[Example], seeds: Sequence[int]) -> list[list[Completion]]:
        """Searches for all prompts together."""
        queries = [
            Query(self.module.prompt_text(prompt), tuple(prompt.root.tokens.tolist()), seed, _columns(prompt))
            for prompt, seed in zip(prompts, seeds, strict=True)
        ]
        results = strategy.run(queries, [self.module.sampling] * len(queries))

        # A strategy without a tree gives whole completions; of a tree, every open leaf is completed and trained on too.
        rests = self._complete(queries, results)
        groups: list[list[Completion]] = []
        for result in results:
            if result.tree is None:
                groups.append([candidate.completion() for candidate in result.candidates])
            else:
                groups.append(tree_completions(result.tree, rests, self._ending))

        self.tokens += sum(result.tokens for result in results) + sum(len(rest.token_ids) for rest in rests.values())
        self.scorer_tokens += sum(result.scorer_tokens for result in results)

        # Importance ratios divide by the log-prob of every token, which a strategy of one's own may have left out.
        for completion in (completion for group in groups for completion in group):
            if len(completion.logprobs) != len(completion.token_ids) or not completion.token_ids:
                raise ValueError(
                    f"{type(strategy).__name__} gave a completion of {len(completion.token_ids)} tokens with "
                    f"{len(completion.logprobs)} log-probabilities: training needs that of each token it was drawn with"
                )
        return groups

    def _complete(self, queries: Sequence[Query], results: Sequence[SearchResult]) -> dict[Node, Completion]:
        """Completes the partial solutions of all trees, with one call of the engine for each minimum length."""
        # A call of the engine has one minimum length, and each partial solution has used up another part of it.
        sampling: SamplingParams = self.module.sampling
        waiting: dict[SamplingParams, list[tuple[Query, Node, tuple[int, ...]]]] = {}
        for query, result in zip(queries, results, strict=True):
            if result.tree is None:
                continue
            for node in open_leaves(result.tree, sampling.max_new_tokens):
                tokens = node.all_token_ids()
                least = max(0, sampling.min_new_tokens - len(tokens))
                waiting.setdefault(replace(sampling, min_new_tokens=least), []).append((query, node, tokens))

        # Seeds follow the node's place in its tree, so that batching and ranks change no completion.
        found: dict[Node, Completion] = {}
        for params, group in waiting.items():
            completions = self.module.engine.generate(
                [[*query.token_ids, *tokens] for query, _, tokens in group],
                1,
                params,
                seeds=[[derive_seed(query.seed, "complete", *node.path)] for query, node, _ in group],
                limits=[sampling.max_new_tokens - len(tokens) for _, _, tokens in group],
            )
            for (_, node, _), samples in zip(group, completions, strict=True):
                found[node] = samples[0]
        return found

    def _ending(self, token_ids: Sequence[int], reason: FinishReason) -> tuple[str, FinishReason]:
        """Decodes a solution; a stop string may have begun in one step and ended in the next."""
        text = decode(self.module.tokenizer, token_ids)
        found = [at for stop in self.module.sampling.stop if (at := text.find(stop)) >= 0]
        return (text[: min(found)], "stop") if found else (text, reason)

    def begin(self) -> None:
        """Begins to count an iteration's tokens."""
        self.tokens = self.scorer_tokens = 0

    def metrics(self, groups: Sequence[Sequence[Completion]]) -> Metrics:
        """Computes the logged values of an iteration's trees, over all ranks: see ``tree_sums``."""
        local_sums = tree_sums(groups) | {"drawn": float(self.tokens), "scorer": float(self.scorer_tokens)}
        total = sum_over_ranks(local_sums)
        values = {
            "tree/completions": total["completions"] / max(total["prompts"], 1),
            "tree/depth": total["depth"] / max(total["completions"], 1),
            "tree/branching": total["branches"] / max(total["parents"], 1),
            "tree/visits": total["visits"] / max(total["branches"], 1),
            "tree/shared": 1 - total["unique"] / max(total["flattened"], 1),
            "tree/search_tokens": total["drawn"],
            "tree/scorer_tokens": total["scorer"],
        }
        return {name: torch.tensor(value, dtype=torch.float64) for name, value in values.items()}


class OutcomeScorer:
    """Scores solutions by a module's own rewards: their weighted sum, minus infinity where none could score.

    Args:
        module: an ``OnPolicyModule``.
    """

    def __init__(self, module: Any) -> None:
        self.module = module

    def score(self, candidates: Sequence[Candidate]) -> Scores:
        """Scores whole and partial solutions."""
        names = sorted({name for candidate in candidates for name in candidate.query.columns})
        columns: dict[str, list[Any]] = {name: [c.query.columns.get(name) for c in candidates] for name in names}
        columns["prompt_ids"] = [list(c.query.token_ids) for c in candidates]
        columns["completion_ids"] = [list(c.token_ids) for c in candidates]
        texts = [c.text for c in candidates]

        # NaN says that no reward function could score; no search should continue there.
        found = self.module.rewards([c.query.prompt for c in candidates], texts, columns)
        scores = self.module.combined(torch.from_numpy(found.values)).tolist()
        return Scores([-math.inf if math.isnan(score) else score for score in scores], [0] * len(scores))

    def cost(self, candidate: Candidate) -> int:
        """Returns the most tokens that scoring the candidate reads: a model's that a reward asks are not counted."""
        return 0


def open_leaves(tree: SearchTree, limit: int) -> list[Node]:
    """Returns the partial solutions of a tree that nothing continues, in its order, truncated ones included.

    Args:
        tree: a search's.
        limit: tokens of a completion, at most.
    """
    return [
        node
        for node in tree.leaves()
        if node.finish_reason is None or (node.finish_reason == "length" and len(node.all_token_ids()) < limit)
    ]


def tree_completions(
    tree: SearchTree,
    rests: Mapping[Node, Completion],
    ending: Callable[[Sequence[int], FinishReason], tuple[str, FinishReason]],
) -> list[Completion]:
    """Makes the completions of a search tree, depth first; those through a node share its branch.

    A solution that was drawn several times is as many completions, each with its part of the visits.

    Args:
        tree: a search's.
        rests: the rest of each partial solution that nothing continues.
        ending: from the tokens of a completion and its finish reason to its text and its finish reason.

    Example:
        >>> end = Node((7,), logprobs=(-0.5,), finish_reason="stop", multiplicity=2, visits=2)
        >>> step = Node((5, 6), logprobs=(-1.0, -0.1), multiplicity=3, visits=3, children=[end])
        >>> end.parent, tree = step, SearchTree(Node(children=[step]))
        >>> step.parent = tree.root
        >>> twins = tree_completions(tree, {}, lambda tokens, reason: ("", reason))
        >>> [completion.token_ids for completion in twins], twins[0].branch.parent.draws, twins[0].branch.draws
        ([[5, 6, 7], [5, 6, 7]], 3, 1)
    """
    made: dict[Node, Branch | None] = {}
    found: list[Completion] = []

    def end(branch: Branch, reason: FinishReason) -> None:
        line = branch.line
        tokens = [token for part in line for token in part.token_ids]
        logprobs = [logprob for part in line for logprob in part.logprobs]
        text, reason = ending(tokens, reason)
        found.append(TreeCompletion(tokens, text, logprobs, reason, branch=branch))

    for node in tree.nodes():
        above = None if node.parent is None else made[node.parent]
        # A whole solution: one completion per draw, each with an equal part of the visits.
        if node.finish_reason is not None and node not in rests:
            visits = max(1, node.visits // node.multiplicity)
            for _ in range(node.multiplicity):
                branch = Branch(node.token_ids, node.logprobs, above, visits=visits, score=node.score)
                end(branch, node.finish_reason)
            continue

        # An inner node or a partial solution: one branch, shared by all completions through it. The root has none.
        visits = max(1, node.visits)
        if node.parent is not None:
            above = Branch(node.token_ids, node.logprobs, above, node.multiplicity, visits, node.score)
        made[node] = above
        if (rest := rests.get(node)) is not None:
            branch = Branch(tuple(rest.token_ids), tuple(rest.logprobs), above, visits=visits)
            end(branch, rest.finish_reason)
    return found


def tree_sums(groups: Sequence[Sequence[Completion]]) -> dict[str, float]:
    """Sums over the completions of prompts: their number, branches and tokens, shared ones once and as flattened.

    Example:
        >>> step = Branch((5, 6))
        >>> group = [TreeCompletion([5, 6, t], "", [], "stop", branch=Branch((t,), parent=step)) for t in (7, 8)]
        >>> sums = tree_sums([group])
        >>> sums["branches"], sums["parents"], sums["depth"], sums["unique"], sums["flattened"]
        (3.0, 2.0, 4.0, 4.0, 6.0)
    """
    # The line of a completion is its branches from the prompt on; a parent is a branch, or the number of a prompt.
    lines: list[tuple[int, list[Branch]]] = []
    branches: dict[Branch, None] = {}
    parents: set[Branch | int] = set()
    for number, group in enumerate(groups):
        for completion in group:
            line = branch_line(completion)
            lines.append((number, line))
            branches.update(dict.fromkeys(line))
            parents.update((number, *line[:-1]) if line else ())
    counts = {
        "prompts": len(groups),
        "completions": len(lines),
        "depth": sum(len(line) for _, line in lines),
        "branches": len(branches),
        "parents": len(parents),
        "visits": sum(branch.visits for branch in branches),
        "unique": sum(len(branch.token_ids) for branch in branches),
        "flattened": sum(len(branch.token_ids) for _, line in lines for branch in line),
    }
    return {name: float(count) for name, count in counts.items()}


def _columns(prompt: Example) -> dict[str, Any]:
    return {name: value for name, value in prompt.fields.items() if name != "prompt"}
