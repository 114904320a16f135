"""Rollouts from searches: trees of an enumerable model and its probabilities, and of a tiny model and its softmax."""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from rlhf_lightning import GRPOModule, PPOModule
from rlhf_lightning.inference import (
    DVTS,
    MCTS,
    AStar,
    BeamSearch,
    Budget,
    Candidate,
    Completion,
    Node,
    ParticleFilter,
    SamplingParams,
    SearchTree,
)
from rlhf_lightning.inference.candidates import Query
from rlhf_lightning.rl import TreeRollouts
from rlhf_lightning.rl.branches import Branch, Branches, branch_line
from rlhf_lightning.rl.exploration import OutcomeScorer, open_leaves, tree_completions, tree_sums
from rlhf_lightning.sequences import Example, Segment, pack

from ..helpers import EOS_ID, save_tiny_model
from ..inference.toy import PROMPT, Characters, Judge, ToyEngine, random_table
from ..modules.naive import naive_model
from .fixed_trees import tree_completion

TABLE = random_table(3, 3, early=True)


def probability(tokens: tuple[int, ...]) -> float:
    """That of a solution under the table, by following its steps."""
    text, state, found = Characters().decode(tokens), "", 1.0
    while state != text:
        step, mass = next((s, p) for s, p in TABLE[state] if text.startswith(state + s))
        state, found = state + step, found * mass
    return found


def searched(kind: str) -> tuple[Any, list[Any]]:
    """A tree of an enumerable model, and its completions with partial solutions completed by a fixed end."""
    engine, judge = ToyEngine(TABLE), Judge(lambda text: math.sin(sum(map(ord, text))))
    strategy: Any = {
        "mcts": lambda: MCTS(engine, scorer=judge, simulations=9, actions=3),
        "mcts-rollouts": lambda: MCTS(engine, scorer=judge, simulations=5, actions=3, rollouts=2, rollout_weight=1.0),
        "beam": lambda: BeamSearch(engine, scorer=judge, width=2, expand=3),
        "dvts": lambda: DVTS(engine, scorer=judge, width=2, expand=3),
        "astar": lambda: AStar(engine, scorer=judge, actions=3, budget=Budget(expansions=4)),
        "particles": lambda: ParticleFilter(engine, scorer=judge, particles=6, potential="exponential"),
        "unscored": lambda: AStar(engine, scorer=judge, budget=Budget(scorer_tokens=1)),
    }[kind]()
    (result,) = strategy.search([PROMPT], seeds=[3])
    params = SamplingParams()
    rests = {
        node: engine.generate([engine.encode(PROMPT) + node.all_token_ids()], 1, params, seeds=[[number]])[0][0]
        for number, node in enumerate(open_leaves(result.tree, 256))
    }
    return result.tree, tree_completions(result.tree, rests, str_ending)


@pytest.mark.parametrize("kind", ["mcts", "mcts-rollouts", "beam", "dvts", "astar", "particles", "unscored"])
def test_a_search_tree_becomes_whole_completions(kind: str) -> None:
    tree, group = searched(kind)
    assert group
    for completion in group:
        tokens = tuple(completion.token_ids)
        # Whole, with the log-probs of its draws, and made of its branches.
        assert completion.finish_reason == "stop"
        assert tokens[-1] == EOS_ID
        assert sum(completion.logprobs) == pytest.approx(math.log(probability(tokens)))
        assert tokens == tuple(token for branch in branch_line(completion) for token in branch.token_ids)
    # Every node is a branch, once, as often drawn as it was; an ended one is as many completions.
    branches = Branches([group])
    shares = branches.shares(torch.ones(len(group), dtype=torch.bool))
    counted = torch.zeros(len(branches), dtype=torch.float64).index_add(0, branches.pair_B, shares[branches.pair_B])
    assert torch.allclose(counted, branches.draws_B.double())
    nodes = [node for node in tree.nodes() if node.parent is not None]
    ended = [node for node in nodes if node.finish_reason is not None]
    partial = [node for node in nodes if node.finish_reason is None]
    open_ = open_leaves(tree, 256)
    assert len(branches) == sum(n.multiplicity for n in ended) + len(partial) + len(open_)
    assert len(group) == sum(n.multiplicity for n in ended) + len(open_)
    scores = Counter(n.score for n in partial)
    scores.update(n.score for n in ended for _ in range(n.multiplicity))
    scores[None] += len(open_)
    found = Counter(None if math.isnan(score) else score for score in branches.scores_B.tolist())
    assert found == scores
    # Completions that share a branch stand together: depth first.
    for branch in range(len(branches)):
        through = branches.pair_S[branches.pair_B == branch].tolist()
        assert through == list(range(through[0], through[0] + len(through)))


def test_a_search_without_a_step_gives_one_sample() -> None:
    tree = SearchTree(Node())
    (completion,) = tree_completions(tree, {tree.root: Completion([7, 1], "x", [-1.0, -2.0], "stop")}, str_ending)
    assert completion.token_ids == [7, 1]
    assert branch_line(completion)[0].parent is None


def str_ending(tokens: Any, reason: Any) -> Any:
    return str(tokens), reason


def test_visits_come_from_the_search() -> None:
    tree, group = searched("mcts")
    through = {node.all_token_ids(): node for node in tree.nodes()}
    for completion in group:
        line = branch_line(completion)
        for place, branch in enumerate(line):
            node = through.get(tuple(token for part in line[: place + 1] for token in part.token_ids))
            if node is not None and node.finish_reason is None:
                assert branch.visits == max(1, node.visits)
                assert branch.score == node.score
        # The rest of a partial solution counts as its last step does.
        if tuple(completion.token_ids) not in through:
            assert line[-1].visits == (line[-2].visits if len(line) > 1 else 1)


# On a tiny model.

OPTIONS = {"num_generations": 3, "max_completion_length": 12, "seed": 5}
STEPS = {"step_separator": None, "max_step_tokens": 3}


def odd(completion_ids: list[list[int]]) -> list[float]:
    """Whether the last token is odd."""
    return [float(ids[-1] % 2) for ids in completion_ids]


def rows(count: int) -> list[Example]:
    return [Example(f"rows:{n}", Segment([5 + n, 6, 7 + n]), {"answer": str(n)}) for n in range(count)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_tiny_model(tmp_path_factory.mktemp("model"), "qwen3", initializer_range=0.1))


def built(folder: str, rollouts: Any, **options: Any) -> GRPOModule:
    module = GRPOModule(folder, **{"rewards": [odd], **OPTIONS, "tree": {"rollouts": rollouts}, **options})
    module.configure_model()
    return module


def search_of(name: str, **options: Any) -> dict[str, Any]:
    return {"class_path": name, "init_args": {**STEPS, **options}}


SEARCHES: dict[str, Any] = {
    "beam": search_of("beam", width=2, expand=2),
    "mcts": search_of("MCTS", simulations=4, actions=2, rollouts=1, rollout_weight=0.5),
    "astar": search_of("astar", actions=2, budget={"expansions": 3}),
    "cut-off": search_of("beam", width=2, expand=2, budget={"tokens": 20}),
    "best-of": {"class_path": "best_of_n", "init_args": {"n": 3}},
}


@pytest.mark.parametrize("kind", SEARCHES)
def test_tokens_have_the_log_probs_that_they_were_drawn_with(kind: str, folder: str) -> None:
    module, policy = built(folder, SEARCHES[kind], temperature=0.7), naive_model(folder)
    found = module.rollout(rows(2))
    assert len(found.completions) == 2
    for prompt, group in zip(found.prompts, found.completions, strict=True):
        assert len(group) > 1
        for completion in group:
            ids = torch.tensor([*prompt.root.tokens.tolist(), *completion.token_ids])
            with torch.no_grad():
                logprobs = (policy(input_ids=ids[None]).logits[0] / 0.7).log_softmax(dim=-1)
            start = len(prompt.root.tokens)
            expected = [float(logprobs[i - 1, ids[i]]) for i in range(start, len(ids))]
            assert completion.logprobs == pytest.approx(expected, abs=1e-5)
            ended = completion.token_ids[-1] == EOS_ID
            assert completion.finish_reason == ("stop" if ended else "length")
            assert ended or len(completion.token_ids) == 12
            assert completion.text == module.tokenizer.decode(completion.token_ids, skip_special_tokens=True)
    # One tree for each prompt, each token of a branch laid out once.
    trees, values = module.prepare(found)
    assert [tree.row_id for tree in trees] == ["rows:0/0", "rows:1/0"]
    branches = {b for group in found.completions for c in group for b in branch_line(c)}
    distinct = {(tuple(t for part in b.line for t in part.token_ids), len(b.token_ids)) for b in branches}
    assert pack(trees).num_tokens <= 6 + sum(length for _, length in distinct)
    sums = tree_sums(found.completions)
    assert float(values["tree/completions"]) == sums["completions"] / 2
    assert float(values["tree/visits"]) == pytest.approx(sums["visits"] / sums["branches"])
    assert float(values["tree/shared"]) == pytest.approx(1 - sums["unique"] / sums["flattened"])
    if kind == "best-of":
        assert float(values["tree/shared"]) == 0
        assert float(values["tree/search_tokens"]) == sums["unique"]


@pytest.mark.parametrize("kind", ["beam", "mcts"])
def test_a_tree_does_not_depend_on_the_other_prompts(kind: str, folder: str) -> None:
    module = built(folder, SEARCHES[kind])
    together = module.rollout(rows(3)).completions
    alone = [module.rollout([row]).completions[0] for row in rows(3)[::-1]][::-1]

    def told(groups: list[Any]) -> list[Any]:
        return [[(c.token_ids, [b.token_ids for b in branch_line(c)]) for c in group] for group in groups]

    assert told(alone) == told(together)
    module.iteration = 1
    assert told(module.rollout(rows(3)).completions) != told(together)


def test_a_mixture_holds_the_samples_and_the_searches(folder: str) -> None:
    module = built(folder, ["samples", SEARCHES["beam"], SEARCHES["best-of"]])
    only = built(folder, SEARCHES["beam"])
    plain = built(folder, "samples")
    assert TreeRollouts(rollouts="mixed").parts == ["samples", "mcts"]
    group = module.rollout(rows(1)).completions[0]
    samples = plain.rollout(rows(1)).completions[0]
    assert group[:3] == samples
    assert len({b for c in group[3:-3] for b in branch_line(c)}) < sum(len(branch_line(c)) for c in group[3:-3])
    assert all(branch_line(c)[0].parent is None for c in group)
    # A search's draws are its own: they depend on its place in the list.
    assert [c.token_ids for c in group[3:-3]] != [c.token_ids for c in only.rollout(rows(1)).completions[0]]
    # Validation samples.
    assert module.rollout(rows(1), stage="val").completions == plain.rollout(rows(1), stage="val").completions


def test_the_modules_rewards_score_where_there_is_no_scorer(folder: str) -> None:
    def right(completions: list[str], answer: list[str]) -> list[float | None]:
        return [None if len(text) % 2 else float(number) for text, number in zip(completions, answer, strict=True)]

    module = built(folder, "beam", rewards=[odd, right], reward_weights=[1.0, 10.0])
    query = Query("?", (4, 5), 0, {"answer": "7"})
    candidates = [Candidate(query, (6, 8), "ab"), Candidate(query, (6, 9), "a")]
    assert OutcomeScorer(module).score(candidates).values == [70.0, 1.0]
    alone = built(folder, "beam", rewards=[right])
    assert OutcomeScorer(alone).score(candidates).values == [7.0, -math.inf]


def test_stop_strings_minimum_length_and_empty_ranks(folder: str) -> None:
    module = built(folder, SEARCHES["beam"], sampling={"stop": ["5"], "min_new_tokens": 6}, max_completion_length=9)
    assert module.rollout([]).completions == []
    for completion in module.rollout(rows(3)).completions[0]:
        assert "5" not in completion.text
        written = module.tokenizer.decode(completion.token_ids, skip_special_tokens=True)
        assert (completion.finish_reason == "stop") == ("5" in written or completion.token_ids[-1] == EOS_ID)
        assert EOS_ID not in completion.token_ids[:5]
        assert len(completion.token_ids) <= 9


def test_a_checkpoint_holds_plain_options(folder: str, tmp_path: Path) -> None:
    scorer = {"class_path": "VerifierScorer", "init_args": {"function": lengths}}
    module = built(folder, search_of("beam", scorer=scorer))
    stored = module.hparams["tree"]["rollouts"]["init_args"]["scorer"]["init_args"]["function"]
    assert stored == f"{__name__}.lengths"
    torch.save(dict(module.hparams["tree"]), tmp_path / "options.pt")
    again = torch.load(tmp_path / "options.pt", weights_only=True)
    assert TreeRollouts(**again).searches
    assert len(module.rollout(rows(1)).completions[0]) > 1


def lengths(prompts: list[str], completions: list[str]) -> list[float]:
    return [float(len(text)) for text in completions]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("mtcs", "there is no strategy 'mtcs'; did you mean"),
        ([], "tree.rollouts is empty; write samples"),
        (search_of("MCTS", simulation=3), "strategy MCTS has no option 'simulation'; did you mean 'simulations'"),
        (search_of("beam", width=0), "width is 0"),
        (search_of("beam", sampling={"top_k": 3}), "tree.rollouts gives beam a sampling of its own"),
        ("token_beam", "tree.rollouts is TokenBeamSearch, whose tokens are not drawn from the policy"),
        (search_of("beam", engine="mcts"), "tree.rollouts gives beam an engine of its own"),
        ("HiddenReasoning", "tree.rollouts is HiddenReasoning, whose tokens are not drawn from the policy"),
        (search_of("beam", scorer=Judge(len)), "tree.rollouts holds a Judge, which a checkpoint cannot"),
        (3, "strategy is 3: write a class name"),
    ],
)
def test_wrong_options_are_named_before_a_model_is_loaded(given: Any, message: str) -> None:
    for method in (GRPOModule, PPOModule):
        with pytest.raises((ValueError, TypeError), match="^" + message.replace("(", r"\(")) as error:
            method("nowhere", rewards=[odd], tree={"rollouts": given})
        assert "\n" not in str(error.value)


def test_an_engine_without_log_probs_is_refused(folder: str) -> None:
    module = built(folder, SEARCHES["beam"])
    generate = module.engine.generate

    def silent(*args: Any, **kwargs: Any) -> Any:
        return [[c.__class__(c.token_ids, c.text, [], c.finish_reason) for c in g] for g in generate(*args, **kwargs)]

    module.engine.generate = silent  # type: ignore[method-assign]
    with pytest.raises(ValueError, match=r"^BeamSearch gave a completion of \d+ tokens with 0 log-probabilities: tra"):
        module.rollout(rows(1))


def test_sums_of_a_tree() -> None:
    root = Branch((1, 2), (0.0, 0.0))
    deep = Branch((3,), (0.0,), root)
    ends = [Branch((4, 5, 6), (0.0,) * 3, deep), Branch((7,), (0.0,), deep), Branch((8,), (0.0,), root)]
    sums = tree_sums([[tree_completion(end) for end in ends], [tree_completion(Branch((9,), (0.0,)))]])
    # Parents: both prompts, root and deep. Lines of 3, 3, 2 and 1 branches.
    assert (sums["branches"], sums["parents"], sums["depth"]) == (6, 4, 9)
    assert (sums["unique"], sums["flattened"]) == (2 + 1 + 3 + 1 + 1 + 1, 6 + 4 + 3 + 1)
    often = Branch((2,), (0.0,), visits=5)
    below = Branch((3,), (0.0,), often, visits=4)
    # A branch that two completions share counts once.
    group = [tree_completion(Branch((end,), (0.0,), below, visits=2)) for end in (4, 5)]
    assert tree_sums([group])["visits"] == 5 + 4 + 2 + 2
