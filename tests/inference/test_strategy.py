"""Strategies: searches of many prompts advance together, and each sees its own answers alone."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch

from rlhf_lightning.inference import BeamSearch, BestOfN, Completion, SamplingParams
from rlhf_lightning.inference.budget import Account, Budget
from rlhf_lightning.inference.strategy import Candidate, Query, Sample, Scores, Search, SearchResult, Strategy

from .toy import PROMPT, Characters, Judge, ToyEngine, random_table


class Echo:
    """An engine whose completion is the last token of the prompt and the seed."""

    def __init__(self) -> None:
        self.calls: list[list[list[int]]] = []

    def encode(self, prompt):
        return tuple(prompt)

    def generate(self, prompts, num_samples=1, sampling=None, *, seeds=None):
        self.calls.append([list(prompt) for prompt in prompts])
        return [
            [Completion([prompt[-1], seed], f"{prompt[-1]}:{seed}", [0.0, 0.0], "stop") for seed in row]
            for prompt, row in zip(prompts, seeds, strict=True)
        ]


class Largest:
    """Scores a candidate by its last token, and reads three tokens for it."""

    def __init__(self) -> None:
        self.calls: list[int] = []

    def score(self, candidates: Sequence[Candidate]) -> Scores:
        self.calls.append(len(candidates))
        return Scores([float(c.token_ids[-1]) for c in candidates], [3] * len(candidates))


class TwoSteps(Strategy):
    """As many rounds as the prompt has tokens; each continues the best of three."""

    def start(self, query: Query, sampling: SamplingParams, account: Account) -> Search:
        state: tuple[int, ...] = ()
        best = None
        for number in range(len(query.token_ids)):
            seeds = tuple(query.seed + 10 * number + i for i in range(3))
            (completions,) = yield [Sample(query, state, seeds, sampling)]
            candidates = [Candidate.of(query, completion) for completion in completions]
            values = yield candidates
            best = candidates[values.index(max(values))].scored(max(values))
            state += best.token_ids
        return SearchResult([best], 0, tokens=account.tokens, scorer_tokens=account.scorer_tokens)


def test_searches_share_calls_and_nothing_else():
    engine, scorer = Echo(), Largest()
    strategy = TwoSteps(engine, scorer=scorer)
    together = strategy.search([[5], [6, 7, 8], [9, 9]], seeds=[100, 200, 300])
    assert [len(call) for call in engine.calls] == [9, 6, 3]  # 3 samples of every search that is left
    assert scorer.calls == [9, 6, 3]
    # By hand: each round draws the seeds s, s+1, s+2 and the largest wins; the next state begins with its tokens.
    assert [result.text for result in together] == ["5:102", "212:222", "302:312"]
    assert [result.tokens for result in together] == [6, 18, 12]
    assert [result.scorer_tokens for result in together] == [9, 27, 18]
    alone = TwoSteps(Echo(), scorer=Largest()).search([[6, 7, 8]], seeds=[200])
    assert alone[0].token_ids == together[1].token_ids
    assert alone[0].score == 222.0


def test_a_strategy_is_an_engine():
    strategy = TwoSteps(Echo(), scorer=Largest())
    groups = strategy.generate([[5], [6]], 2, seeds=[[1, 50], [7, 8]])
    assert [[completion.text for completion in group] for group in groups] == [["5:3", "5:52"], ["6:9", "6:10"]]
    outer = TwoSteps(TwoSteps(Echo(), scorer=Largest()), scorer=Largest())
    assert outer.search([[5]], seeds=[10])[0].text == "5:14"  # the best of seeds 10, 11, 12, each the best of three


def test_seeds_are_drawn_where_none_is_set():
    """As an engine's: the same samples for a seed of the settings or of torch, and others at each call otherwise."""
    strategy = TwoSteps(Echo(), scorer=Largest())
    torch.manual_seed(0)
    first, second = strategy.generate([[5], [6]], 2), strategy.generate([[5], [6]], 2)
    assert len({completion.text for groups in (first, second) for group in groups for completion in group}) == 8
    torch.manual_seed(0)
    assert [[c.text for c in group] for group in strategy.generate([[5], [6]], 2)] == [
        [c.text for c in group] for group in first
    ]
    torch.manual_seed(0)
    one, two = strategy.search([[5], [6]]), strategy.search([[5], [6]])
    assert len({result.text for result in (*one, *two)}) == 4
    torch.manual_seed(0)
    assert [result.text for result in one] == [group[0].text for group in strategy.generate([[5], [6]])]
    seeded = SamplingParams(seed=3)
    texts = [[group[0].text for group in strategy.generate([[5]], 1, seeded)] for _ in range(2)]
    assert texts[0] == texts[1] == [result.text for result in strategy.search([[5]], sampling=seeded)]
    with pytest.raises(ValueError, match=r"seeds has 1 rows of lengths \[2\]"):
        strategy.generate([[5]], 4, seeds=[[1, 2]])


def test_prompts_of_token_ids_stay_tokens_for_a_strategy_within():
    """The scorer within reads what it reads of a text: the prompt, and what was written after it."""
    table = random_table(3, 3, seed=5)

    class Reader(Judge):
        def __init__(self):
            super().__init__(len)
            self.prompts: list[object] = []

        def score(self, candidates):
            self.prompts += [candidate.query.prompt for candidate in candidates]
            return super().score(candidates)

    def searched(prompt):
        reader = Reader()
        inner = BestOfN(ToyEngine(table), scorer=reader, n=2)
        search = BeamSearch(inner, scorer=Judge(len), width=1, expand=1)
        return search.search([prompt], seeds=[2])[0].token_ids, reader.prompts

    characters = Characters()
    of_text, texts = searched(PROMPT)
    of_tokens, prompts = searched(characters.encode(PROMPT))
    assert of_tokens == of_text
    assert len(set(texts)) > 1
    assert prompts == [characters.encode(text) for text in texts]


def test_errors_name_the_prompt_and_the_remedy():
    strategy = TwoSteps(Echo(), scorer=Largest())
    with pytest.raises(ValueError, match="prompts has 2 entries and seeds 1"):
        strategy.search([[5], [6]], seeds=[0])
    with pytest.raises(ValueError, match="TwoSteps needs a scorer"):
        TwoSteps(Echo()).search([[5]], seeds=[0])

    class Broken:
        def score(self, candidates):
            return Scores([float("nan")] * len(candidates), [0] * len(candidates))

    with pytest.raises(ValueError, match="Broken scored a solution of prompt 0 with nan"):
        TwoSteps(Echo(), scorer=Broken()).search([[5]], seeds=[0])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tokens": 0}, "tokens is 0"),
        ({"seconds": -1.0}, "seconds is -1.0"),
        ({"expansions": 1.5}, "expansions is 1.5"),
    ],
)
def test_budgets_are_checked(options, message):
    with pytest.raises(ValueError, match=message):
        Budget(**options)


def test_an_account_names_the_limit_that_is_used_up():
    account = Account(Budget(tokens=10, expansions=2))
    assert account.exhausted() is None
    account.expansions = 2
    assert account.exhausted() == "expansions"
    account.tokens = 8
    assert account.affordable(5, 100) == (2, 1)
    account.tokens = 10
    assert account.affordable(5, 100) == (0, 0)
