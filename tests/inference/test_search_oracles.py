"""Searches on an enumerable model, against exhaustive search and naive loops."""

from __future__ import annotations

import math
from functools import partial

import numpy as np
import pytest

from rlhf_lightning.inference import DVTS, MCTS, AStar, BeamSearch, SamplingParams, derive_seed
from rlhf_lightning.inference.step_search import SplitScorer

from .toy import PROMPT, Judge, ToyEngine, random_table, solutions, step_scores

SEEDS = range(12)


def exhaustive(table, value):
    return max(solutions(table), key=value)


def best_below(table, value, text):
    """The highest value of all solutions that begin with a text: the score of an oracle."""
    return max(value(solution) for solution in solutions(table) if solution.startswith(text))


@pytest.mark.parametrize("aggregate", [min, math.prod])
@pytest.mark.parametrize("seed", SEEDS)
def test_beam_astar_and_exhaustive_search_find_the_same_optimum(aggregate, seed):
    table, scores = (
        random_table(3, 3, seed=seed, early=True),
        step_scores(random_table(3, 3, seed=seed, early=True), seed=seed),
    )

    def value(text):
        return aggregate(scores(text))

    optimum = value(exhaustive(table, value))
    engine = partial(ToyEngine, table, in_turn=True)

    # A beam as wide as a state has steps, with the oracle's scores; as wide as a level, with those of the steps alone.
    oracle = Judge(partial(best_below, table, value))
    assert BeamSearch(engine(), scorer=oracle, width=4, expand=4).search([PROMPT], seeds=[0])[0].score == optimum
    wide = BeamSearch(engine(), scorer=Judge(value), width=16, expand=4).search([PROMPT], seeds=[0])[0]
    assert wide.score == optimum
    found = AStar(engine(), scorer=Judge(value), actions=4).search([PROMPT], seeds=[0])[0]
    assert found.score == optimum

    # A* expands what lies above the optimum, and nothing below it.
    above = [state for state in table if state == "" or value(state) > optimum]
    assert len(above) <= found.expansions <= len([state for state in table if state == "" or value(state) >= optimum])


def test_a_narrow_beam_misses_the_optimum_at_times():
    missed = 0
    for seed in SEEDS:
        table = random_table(3, 3, seed=seed)
        scores = step_scores(table, seed=seed)

        def value(text, scores=scores):
            return math.prod(scores(text))

        strategy = BeamSearch(ToyEngine(table, in_turn=True), scorer=Judge(value), width=1, expand=3)
        missed += strategy.search([PROMPT], seeds=[0])[0].score < value(exhaustive(table, value))
    assert 0 < missed < len(SEEDS)


def test_lookahead_scores_what_a_step_leads_to():
    table = {
        "": [("a\n", 0.5), ("b\n", 0.5)],
        "a\n": [("c\n", 0.9), ("d\n", 0.1)],
        "b\n": [("c\n", 0.2), ("d\n", 0.8)],
        **{f"{one}\n{two}\n": [("e", 0.7), ("f", 0.3)] for one in "ab" for two in "cd"},
    }
    # Only the third letter is worth something, and b leads to it more often.
    worth = {"a": 0.4, "b": 0.3, "a\nc": 0.1, "b\nd": 0.6, "b\nd\ne": 0.2, "b\nc": 0.5}
    judge = Judge(lambda text: worth.get(text.strip(), 0.0))
    engine = ToyEngine(table, in_turn=True)
    plain = BeamSearch(engine, scorer=judge, width=1, expand=2).search([PROMPT], seeds=[0])[0]
    assert plain.text[0] == "a"
    engine = ToyEngine(table, in_turn=True)
    ahead = BeamSearch(engine, scorer=judge, width=1, expand=2, lookahead=1).search([PROMPT], seeds=[0])[0]
    values = {node.text: node.value for node in ahead.tree.root.children}
    assert values == {"a\n": 0.1, "b\n": 0.6}  # of a-c and b-d, the likeliest continuations
    assert all(node.score is None for node in ahead.tree.root.children)
    assert ahead.text[0] == "b"
    # Steps ahead are tokens of the policy: 2 * 2 drawn and 2 * 2 ahead, the same again, and 2 * 2 that end.
    assert ahead.tokens == engine.generated == 4 + 4 + 4 + 4 + 4


def test_astar_expands_no_more_than_uniform_cost_search():
    fewer = 0
    for seed in SEEDS:
        table = random_table(3, 4, seed=seed)
        mass = solutions(table)
        likeliest = max(mass, key=mass.__getitem__)

        def log_rest(text, mass=mass, table=table):
            """The highest log-probability of what may follow."""
            return max(math.log(p) for s, p in mass.items() if s.startswith(text)) - math.log(below(mass, text))

        def below(mass, text):
            return sum(p for s, p in mass.items() if s.startswith(text))

        uniform = AStar(ToyEngine(table, in_turn=True), actions=3, policy_weight=1.0, heuristic_weight=0.0)
        (first,) = uniform.search([PROMPT], seeds=[0])
        assert first.text == likeliest
        # Uniform cost search expands exactly the states that are likelier than the likeliest solution.
        assert first.expansions == sum(below(mass, state) > mass[likeliest] for state in table)

        counts = [first.expansions]
        for share in (0.5, 1.0):
            judge = Judge(lambda text, share=share: share * log_rest(text))
            informed = AStar(ToyEngine(table, in_turn=True), value=judge, actions=3, policy_weight=1.0)
            (found,) = informed.search([PROMPT], seeds=[0])
            assert found.text == likeliest
            counts.append(found.expansions)
        assert counts[0] >= counts[1] >= counts[2] == 4
        fewer += counts[0] > counts[1]
    assert fewer


@pytest.mark.parametrize("parallel", [1, 3])
def test_astar_in_parallel_finds_the_same(parallel):
    table = random_table(3, 3, seed=3)
    scores = step_scores(table, seed=3)
    strategy = AStar(
        ToyEngine(table, in_turn=True), scorer=Judge(lambda text: min(scores(text))), actions=3, parallel=parallel
    )
    assert strategy.search([PROMPT], seeds=[0])[0].text == exhaustive(table, lambda text: min(scores(text)))


def test_subtrees_of_dvts_are_greedy_and_independent():
    table = random_table(4, 3, seed=2)
    scores = step_scores(table, seed=2)

    def value(text):
        return min(scores(text))

    engine = ToyEngine(table)
    (result,) = DVTS(engine, scorer=Judge(value), width=3, expand=2).search([PROMPT], seeds=[9])

    # By hand, one subtree after the other: the best of two steps, drawn with the seeds of the path.
    ends, paths = [], []
    for subtree in range(3):
        text, path, first = "", (), 2 * subtree
        while True:
            steps = [engine._choose(text, SamplingParams(), derive_seed(9, *path, first + n), 0)[0] for n in range(2)]
            best = max(range(2), key=lambda n: value(text + steps[n]))
            place = steps.index(steps[best])
            text, path, first = text + steps[best], (*path, first + place), 0
            if not steps[best].endswith("\n"):
                break
        ends.append(text)
        paths.append(path)
    found = {node.path: result.tree.root for node in result.tree.nodes()}
    assert set(paths) <= found.keys()
    assert result.score == max(value(text) for text in ends)
    assert {c.text for c in result.candidates} >= set(ends)


def naive_puct(values, priors, simulations, c1=1.25, c2=19652.0):
    """Visits of the arms of a bandit whose values are known, after the formula."""
    visits = [0] * len(values)
    seen = []
    for total in range(simulations):
        scale = [(v - min(seen)) / (max(seen) - min(seen)) if len(set(seen)) > 1 else 0.0 for v in values]
        mean = sum(n * s for n, s in zip(visits, scale, strict=True)) / total if total else 0.0
        n_all = max(1, total)
        growth = math.log((n_all + c2 + 1) / c2) + c1
        ranks = [
            ((scale[a] if visits[a] else mean) + priors[a] * math.sqrt(n_all) / (1 + visits[a]) * growth, priors[a])
            for a in range(len(values))
        ]
        arm = ranks.index(max(ranks))
        visits[arm] += 1
        seen.append(values[arm])
    return visits


@pytest.mark.parametrize("seed", SEEDS)
def test_puct_visits_are_those_of_the_formula_and_converge(seed):
    random = np.random.default_rng(seed)
    # Values that differ by d = 1/4 at least: another step is only taken while n + 1 <= P sqrt(N) growth / d, so that of
    # N = 1000 simulations at most 165 go to all others.
    values = dict(zip("abcde", random.permutation([0.0, 0.25, 0.5, 0.75, 1.0]).tolist(), strict=True))
    table = {"": list(zip("abcde", random.dirichlet(np.ones(5)).tolist(), strict=True))}
    shares = []
    for simulations in (10, 100, 1000):
        strategy = MCTS(
            ToyEngine(table, in_turn=True), scorer=Judge(values.__getitem__), simulations=simulations, actions=5
        )
        (result,) = strategy.search([PROMPT], seeds=[0])
        children = result.tree.root.children
        expected = naive_puct([values[c.text] for c in children], [c.prior for c in children], simulations)
        assert [child.visits for child in children] == expected
        assert sum(expected) == result.tree.root.visits == simulations
        shares.append(max(children, key=lambda c: values[c.text]).visits / simulations)
    assert result.text == max(values, key=values.__getitem__)
    assert shares[2] >= 1 - 0.165
    assert shares[2] >= shares[1] - 0.05


@pytest.mark.parametrize("options", [{}, {"rule": "uct"}, {"leaves": 4}, {"widening": (2.0, 0.6), "actions": 9}])
def test_simulations_find_the_optimum_of_a_deep_tree(options):
    table = random_table(3, 3, seed=6)
    scores = step_scores(table, seed=6)

    def value(text):
        return min(scores(text))

    engine = ToyEngine(table, in_turn=True)
    strategy = MCTS(engine, scorer=Judge(value), **{"simulations": 400, "actions": 3, "choose": "visits", **options})
    (result,) = strategy.search([PROMPT], seeds=[0])
    assert result.text == exhaustive(table, value)
    root = result.tree.root
    assert root.visits == 400 == result.tree.statistics["simulations"]
    best = max(root.children, key=lambda child: child.visits)
    assert best.chosen
    for node in result.tree.nodes():
        # A node's visits are its own evaluation and those of its children, and so is the sum of its values.
        if node.children:
            own = 0 if node is root else 1
            assert node.visits == own + sum(child.visits for child in node.children)
            total = own * (node.score or 0.0) + sum(c.visits * c.value for c in node.children if c.visits)
            assert node.visits * node.value == pytest.approx(total, abs=1e-9)
        if "widening" in options and node.draws:
            assert node.draws <= min(9, math.ceil(2 * max(1, node.visits) ** 0.6))


def test_several_leaves_share_a_round():
    table = random_table(3, 3, seed=6)
    scores = step_scores(table, seed=6)
    rounds = {}
    for leaves in (1, 4):
        judge = Judge(lambda text: min(scores(text)))
        strategy = MCTS(ToyEngine(table, in_turn=True), scorer=judge, simulations=60, actions=3, leaves=leaves)
        assert strategy.search([PROMPT], seeds=[0])[0].tree.root.visits == 60
        rounds[leaves] = len(judge.calls)
        assert max(judge.calls[:-1]) > 1 or leaves == 1
    assert rounds[4] < 0.65 * rounds[1]


def test_rollouts_judge_what_a_scorer_cannot():
    table = random_table(2, 3, seed=1)
    worth = {text: n / 10 for n, text in enumerate(sorted(solutions(table)))}

    def searched(simulations):
        # The judge knows whole solutions only.
        options = {"actions": 2, "rollouts": 3, "rollout_weight": 1.0, "discount": 0.5}
        engine, judge = ToyEngine(table, in_turn=True), Judge(worth.__getitem__)
        return MCTS(engine, scorer=judge, simulations=simulations, **options).search([PROMPT], seeds=[0])[0]

    result = searched(1)
    leaf = next(n for n in result.tree.nodes() if n.rollouts and not n.children)
    assert leaf.visits == 1
    assert leaf.value == pytest.approx(np.mean([worth[leaf_text(n)] for n in leaf.rollouts]), abs=1e-12)
    assert {leaf_text(n) for n in result.tree.nodes() if n.rollout} <= {c.text for c in result.candidates}
    result = searched(6)
    # The discount counts steps: a node's values are halves of those below it.
    node = next(n for n in result.tree.nodes() if n.children and n.parent is not None)
    own = np.mean([worth[leaf_text(n)] for n in node.rollouts])
    total = own + 0.5 * sum(child.visits * child.value for child in node.children if child.visits)
    assert node.visits * node.value == pytest.approx(total, abs=1e-9)


def leaf_text(node):
    return "".join(step.text for step in node.line)


def test_minus_infinity_is_never_chosen_and_spoils_no_mean():
    table = {"": [("a", 0.5), ("b", 0.3), ("c", 0.2)]}
    worth = {"a": -math.inf, "b": 2.0, "c": 1.0}
    (result,) = MCTS(ToyEngine(table, in_turn=True), scorer=Judge(worth.__getitem__), simulations=50, actions=3).search(
        [PROMPT], seeds=[0]
    )
    assert result.text == "b"
    assert math.isfinite(result.tree.root.value)


def test_partial_solutions_have_a_scorer_of_their_own():
    table = random_table(2, 2, seed=0)
    whole, part = Judge(lambda text: 1.0), Judge(lambda text: 0.25)
    (result,) = BeamSearch(ToyEngine(table), scorer=whole, value=part, width=2, expand=2).search([PROMPT], seeds=[0])
    for node in result.tree.nodes():
        if node.parent is not None:
            assert node.score == (0.25 if node.finish_reason is None else 1.0)
    assert result.scorer_tokens == whole.read + part.read
    both = SplitScorer(whole=whole, partial=part)
    assert both.cost(result.best) == len(result.best.query.token_ids) + len(result.token_ids)


@pytest.mark.parametrize(
    ("cls", "options", "message"),
    [
        (MCTS, {"simulations": 0}, "simulations is 0"),
        (MCTS, {"rule": "ucb"}, "rule is 'ucb'; it must be one of puct, uct"),
        (MCTS, {"rollout_weight": 0.5}, "rollout_weight is 0.5 with rollouts=0"),
        (MCTS, {"widening": (1.0,)}, "widening is"),
        (MCTS, {"discount": 1.5}, "discount is 1.5"),
        (AStar, {"heuristic_weight": 0.0}, "policy_weight and heuristic_weight are 0"),
        (AStar, {"scorer": None}, "heuristic_weight is 1.0 without a scorer"),
        (AStar, {"parallel": 0}, "parallel is 0"),
        (DVTS, {"expand": 0}, "expand is 0"),
    ],
)
def test_bad_options_are_refused(cls, options, message):
    with pytest.raises(ValueError, match=message):
        cls(ToyEngine({}), **{"scorer": Judge(len), **options})
