"""Thoughts: where they end, which tokens they are, what they may cost, and who sees them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from rlhf_lightning.data.formats import Row, demonstration
from rlhf_lightning.data.tokenization import RowTokenizer
from rlhf_lightning.inference import (
    BeamSearch,
    BestOfN,
    Budget,
    Completion,
    HiddenReasoning,
    LocalEngine,
    MajorityVote,
    RemoteEngine,
    RewardScorer,
    SamplingParams,
    TokenBeamSearch,
    VerifierScorer,
    build_strategy,
    derive_seed,
    reasoning_rows,
)
from rlhf_lightning.inference.completion import Request
from rlhf_lightning.inference.strategy import Candidate, Query, SearchResult
from rlhf_lightning.rewards import AnswerOnlyReward, RewardSet, exact_answer

from ..helpers import EOS_ID, UNK_ID, char_tokenizer, save_tiny_model
from ..models.test_reward_model import made
from .served import completion, serve

MARKS = ("<think>", "</think>")


class Scripted:
    """Continues texts by tokens of a script, and stops as engines do.

    Args:
        script: from the text so far to the texts of the tokens that follow; ``"<eos>"`` is the end.
        merged: further tokens.
        special: further special tokens.
    """

    def __init__(self, script: Callable[[str], Sequence[str]], merged: Sequence[str] = (), special: str = "") -> None:
        self.tokenizer: PreTrainedTokenizerFast = char_tokenizer()
        self.tokenizer.add_tokens(list(merged))
        if special:
            self.tokenizer.add_special_tokens({"additional_special_tokens": [special]})
        self.script = script
        self.end_token_ids = frozenset({EOS_ID})
        self.asked: list[tuple[list[str], SamplingParams, list[int]]] = []

    def encode(self, prompt: Any) -> tuple[int, ...]:
        return tuple(self.tokenizer(prompt)["input_ids"]) if isinstance(prompt, str) else tuple(prompt)

    def token(self, text: str) -> int:
        found = self.tokenizer.convert_tokens_to_ids(text)
        assert isinstance(found, int)
        return found

    def text(self, ids: Sequence[int]) -> str:
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=False))

    def num_positions(self) -> int:
        return 128

    def generate(
        self, prompts: Any, num_samples: int = 1, sampling: Any = None, *, seeds: Any = None, limits: Any = None
    ) -> list[list[Completion]]:
        limits = [sampling.max_new_tokens] * len(prompts) if limits is None else limits
        texts = [self.text(prompt) for prompt in prompts]
        self.asked.append((texts, sampling, list(limits)))
        stops = self.end_token_ids | set(sampling.stop_token_ids)
        found = []
        for text, prompt, limit in zip(texts, prompts, limits, strict=True):
            request = Request(tuple(prompt), (0, 0), 0, limit, sampling, frozenset(stops), self.tokenizer)
            for piece in self.script(text):
                token = self.token(piece)
                request.push(token, -token / 100, None)
                if request.finish_reason:
                    break
            found.append([request.completion()])
        return found


def then(thought: Sequence[str], answer: Sequence[str]) -> Callable[[str], Sequence[str]]:
    """The script of a thought, and of an answer once it is closed."""
    return lambda text: [*answer, "<eos>"] if "</think>" in text else [*thought, *answer, "<eos>"]


CUTS: dict[str, tuple[Scripted, str, str]] = {
    "characters": (Scripted(then("a=1</think>", "#4")), "", ""),
    "tokens that hold more": (
        Scripted(then(["a", "=", "1<", "/th", "ink>#4"], "2"), ["1<", "/th", "ink>#4"]),
        "",
        "#4",
    ),
    "blanks in the last token": (Scripted(then([*"a=1", "</think>\n"], "#4"), ["</think>\n"]), "\n", ""),
    "blanks and more": (Scripted(then([*"a=1</think", ">\n#"], "4"), [">\n#"]), "\n", "#"),
    "blanks before the answer": (Scripted(then("a=1</think>", "\n\n#4")), "\n\n", ""),
    "a token of its own": (Scripted(then([*"a=1", "</think>"], "#4"), ["</think>"]), "", ""),
    "a special token": (Scripted(then([*"a=1", "</think>"], "#4"), special="</think>"), "", ""),
}


@pytest.mark.parametrize("name", CUTS)
def test_a_thought_ends_at_its_mark_however_tokens_cut_it(name: str) -> None:
    engine, blanks, lead = CUTS[name]
    result = HiddenReasoning(engine).search(["q"], seeds=[3])[0]
    thought, opening = result.thought, len(engine.encode("<think>"))
    assert thought is not None
    assert (thought.text, str(thought), thought.closed) == ("a=1", "a=1", True)
    assert result.text == ("#42" if lead == "#4" else "#4")
    assert thought.passage == f"<think>a=1</think>{blanks}"
    assert thought.lead == lead
    # All tokens were sampled, after those of the opening mark.
    assert engine.text(result.token_ids) == f"<think>a=1</think>{blanks}{result.text}<eos>"
    assert thought.token_ids == result.token_ids[: len(thought.token_ids)]
    assert thought.written == tuple(range(opening))
    best = result.best
    assert list(best.logprobs) == [0.0] * opening + [-token / 100 for token in best.token_ids[opening:]]
    assert result.tokens == len(best.token_ids) - opening == best.completion().num_sampled
    assert best.answer_ids == best.token_ids[len(thought.token_ids) :]
    # The policy answers after exactly these tokens.
    assert [asked[0] for asked in engine.asked[-2:]] == [["q<think>"], ["q" + engine.text(thought.token_ids)]]


@pytest.mark.parametrize(
    ("thought", "limit", "text", "written"),
    [
        ("abcdefgh", 5, "abcde", "</think>"),
        ("abc</think>#4", 6, "abc", "hink>"),  # the limit cuts the mark, which is completed
        ("abc", 8, "abc", "</think>"),  # the policy ends the sequence instead
        ("", 8, "", "</think>"),
        ("ab<c", 4, "ab<c", "</think>"),
    ],
)
def test_a_thought_without_its_mark_is_closed(thought: str, limit: int, text: str, written: str) -> None:
    engine = Scripted(then(thought, "#4") if "</" in thought else then([*thought, "<eos>"], "#4"))
    strategy = HiddenReasoning(engine, thinking_tokens=limit, answer_tokens=4)
    result = strategy.search(["q"], seeds=[0])[0]
    assert result.thought is not None
    assert (result.text, result.thought.text, result.thought.closed) == ("#4", text, False)
    assert result.thought.passage == f"<think>{text}</think>"
    ids, opening = result.thought.token_ids, len("<think>")
    assert engine.text([ids[n] for n in result.thought.written]) == f"<think>{written}"
    assert engine.text(ids) == f"<think>{text}</think>"
    assert len(result.thought.logprobs) == len(ids)
    sampled = [n for n in range(len(ids)) if n not in result.thought.written]
    assert [result.thought.logprobs[n] for n in sampled] == [-ids[n] / 100 for n in sampled]
    assert sampled == list(range(opening, opening + len(sampled)))


def test_a_prompt_may_open_the_thought() -> None:
    engine = Scripted(then("a</think>", "#4"))
    result = HiddenReasoning(engine).search(["q<think>\n"], seeds=[0])[0]
    assert result.thought is not None
    assert (result.thought.passage, result.thought.written, result.text) == ("a</think>", (), "#4")
    assert result.tokens == len(result.token_ids)


def test_budgets_of_thought_and_answer() -> None:
    engine = Scripted(lambda text: "b" * 90)
    # Marks of 7 and 8 tokens; both budgets fit, or shrink in proportion, and more is the answer's.
    for most, thinking, answer in ((39, 16, 8), (27, 8, 4), (47, 16, 16), (16, 0, 1), (None, 16, 8)):
        sampling = None if most is None else SamplingParams(max_new_tokens=most)
        strategy = HiddenReasoning(engine, thinking_tokens=16, answer_tokens=8, sampling=sampling)
        result = strategy.search(["q"], seeds=[0])[0]
        assert result.thought is not None
        assert (len(result.thought.text), len(result.text)) == (thinking, answer)
        assert result.best.finish_reason == "length"
        assert len(result.token_ids) == thinking + answer + 15
        assert result.tokens == thinking + answer
    # A prompt of 100 of 128 positions leaves 13.
    strategy = HiddenReasoning(engine, thinking_tokens=16, answer_tokens=8)
    results = strategy.search(["q" * 100, "q"], seeds=[0, 0])
    assert [(len(r.thought.text), len(r.text)) for r in results if r.thought] == [(8, 5), (16, 8)]
    assert len(engine.asked[-1][0]) == 2  # one call for both
    with pytest.raises(
        ValueError, match="nothing is left for an answer: the prompt has 113 tokens, the marks 15, max_"
    ):
        strategy.search(["q" * 113], seeds=[0])
    with pytest.raises(ValueError, match="max_new_tokens is 15, and the model has 128 positions: raise max_new_tokens"):
        strategy.search(["q"], seeds=[0], sampling=SamplingParams(max_new_tokens=15))
    # A budget is kept to the token, one of them for the answer.
    for tokens, thinking, answer in ((1, 0, 1), (2, 1, 1), (17, 16, 1), (20, 16, 4)):
        limited = HiddenReasoning(engine, thinking_tokens=16, answer_tokens=8, budget=Budget(tokens=tokens))
        result = limited.search(["q"], seeds=[0])[0]
        assert result.thought is not None
        assert (len(result.thought.text), len(result.text), result.tokens) == (thinking, answer, tokens)
        assert result.stopped_by == "tokens"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_tiny_model(tmp_path_factory.mktemp("model"), "llama"))


@pytest.fixture(scope="module")
def engine(folder: str) -> LocalEngine:
    return LocalEngine(AutoModelForCausalLM.from_pretrained(folder), char_tokenizer())


def test_samples_are_the_engines_own_whatever_shares_the_batch(engine: LocalEngine) -> None:
    strategy = HiddenReasoning(engine, thinking_tokens=9, answer_tokens=6, sampling=SamplingParams(max_new_tokens=30))
    prompts, seeds = ["1+1=", "2+2=?", "3="], [5, 6, 7]
    together = strategy.search(prompts, seeds)
    for prompt, seed, result in zip(prompts, seeds, together, strict=True):
        alone = strategy.search([prompt], [seed])[0]
        assert (alone.token_ids, alone.text, str(alone.thought)) == (result.token_ids, result.text, str(result.thought))
        assert alone.best.logprobs == pytest.approx(result.best.logprobs, abs=1e-5)
        begun = [*engine.encode(prompt), *engine.encode("<think>")]
        params = SamplingParams(max_new_tokens=9, stop="</think>")
        thought = engine.generate([begun], 1, params, seeds=[[derive_seed(seed, "thought")]])[0][0]
        assert result.thought is not None
        ends = [t for t in thought.token_ids if t != EOS_ID]
        assert list(result.thought.token_ids) == [*engine.encode("<think>"), *ends, *engine.encode("</think>")]
        answer = engine.generate(
            [[*engine.encode(prompt), *result.thought.token_ids]],
            1,
            SamplingParams(max_new_tokens=6),
            seeds=[[derive_seed(seed, "answer")]],
        )[0][0]
        assert list(result.best.answer_ids) == answer.token_ids
        assert result.text == answer.text.lstrip()
        assert result.tokens == len(thought.token_ids) + len(answer.token_ids)
    groups = strategy.generate(prompts, 2, seeds=[[seed, seed + 50] for seed in seeds])
    assert [group[0].token_ids for group in groups] == [list(result.token_ids) for result in together]
    assert [str(group[0].thought) for group in groups] == [str(result.thought) for result in together]
    assert groups[0][0].token_ids != groups[0][1].token_ids


def test_who_sees_a_thought(folder: str, engine: LocalEngine) -> None:
    seen: list[tuple[str, str]] = []

    def judge(prompts: Sequence[str], completions: Sequence[str]) -> list[float]:
        seen.extend(zip(prompts, completions, strict=True))
        return [float(len(text)) for text in completions]

    sampling = SamplingParams(max_new_tokens=30)
    options: dict[str, Any] = {"thinking_tokens": 8, "answer_tokens": 7}
    # One thought and several answers, or several thoughts with an answer each.
    one = HiddenReasoning(BestOfN(engine, scorer=VerifierScorer(judge), n=4, sampling=sampling), **options)
    result = one.search(["1+1="], seeds=[2])[0]
    assert len({c.thought.token_ids for c in result.candidates if c.thought}) == 1
    assert [(prompt, text.lstrip()) for prompt, text in seen] == [("1+1=", c.text) for c in result.candidates]
    assert result.score == max(len(text) for _, text in seen)
    assert result.expansions == 4
    several = BestOfN(HiddenReasoning(engine, **options), scorer=VerifierScorer(judge), n=4, sampling=sampling)
    result = several.search(["1+1="], seeds=[2])[0]
    assert len({c.thought.token_ids for c in result.candidates if c.thought}) == 4
    assert result.thought is not None
    assert result.tokens == sum(c.completion().num_sampled for c in result.candidates)
    assert not any("think" in text for _, text in seen)

    # A reward model judges prompt and answer alone.
    model = made(folder, {})
    scorer = RewardScorer(model)
    for strategy, blanks in (
        (HiddenReasoning(BestOfN(engine, scorer=scorer, n=3, sampling=sampling), **options), True),
        (BestOfN(HiddenReasoning(engine, **options), scorer=scorer, n=3, sampling=sampling), False),
    ):
        # Without padding and unknown tokens, which no text shows.
        results = strategy.search(["1+1="] * 20, seeds=range(20))
        shown = [r for r in results if all(t == EOS_ID or t > UNK_ID for c in r.candidates for t in c.answer_ids)]
        result = next(r for r in shown if all(c.text for c in r.candidates))
        # In place, an answer is read with the blanks that it begins with.
        decoded = [engine.tokenizer.decode(c.answer_ids, skip_special_tokens=True) for c in result.candidates]
        assert [text.lstrip() for text in decoded] == [c.text for c in result.candidates]
        texts = decoded if blanks else [c.text for c in result.candidates]
        assert [c.score for c in result.candidates] == pytest.approx(model.score(["1+1="] * 3, texts), abs=1e-5)


def test_a_search_over_steps_answers_after_the_thought() -> None:
    def script(text: str) -> Sequence[str]:
        _, closing, answer = text.partition("</think>")
        return [*"12\n#4"[len(answer) :], "<eos>"] if closing else [*"a</think", ">1"]

    engine = Scripted(script, [">1"])
    strategy = HiddenReasoning(BeamSearch(engine, scorer=VerifierScorer(exact_answer), width=1, expand=2))
    result = strategy.search(["q"], seeds=[0], columns={"answer": ["4"]})[0]
    assert result.thought is not None
    assert (result.text, result.thought.text, result.score) == ("12\n#4", "a", 1.0)
    assert engine.text(result.token_ids) == "<think>a</think>12\n#4<eos>"
    assert result.tree.root.children[0].text == "2\n"
    with pytest.raises(ValueError, match=r"BeamSearch continues steps, and HiddenReasoning thinks before each: write"):
        BeamSearch(HiddenReasoning(engine), scorer=VerifierScorer(exact_answer))
    with pytest.raises(ValueError, match="HiddenReasoning wraps another one"):
        HiddenReasoning(HiddenReasoning(engine))


def test_a_beam_over_tokens_answers_after_the_thought(engine: LocalEngine) -> None:
    sampling = SamplingParams(max_new_tokens=22, temperature=0.0)
    strategy = HiddenReasoning(TokenBeamSearch(engine, width=1), thinking_tokens=4, answer_tokens=3, sampling=sampling)
    result = strategy.search(["1+1="], seeds=[0])[0]
    assert result.thought is not None
    greedy = engine.generate(
        [[*engine.encode("1+1="), *result.thought.token_ids]], 1, SamplingParams(max_new_tokens=3, temperature=0.0)
    )[0][0]
    assert list(result.best.answer_ids) == greedy.token_ids


def test_strategies_by_configuration(engine: LocalEngine) -> None:
    inner = {"class_path": "MajorityVote", "init_args": {"n": 3}}
    spec = {"class_path": "HiddenReasoning", "init_args": {"engine": inner, "thinking_tokens": 5}}
    built = build_strategy(spec, engine)
    assert (built.thinking_tokens, built.strategy.n, built.engine) == (5, 3, engine)
    best = {"class_path": "HiddenReasoning", "init_args": {"engine": "BestOfN"}}
    scorer = VerifierScorer(exact_answer)
    assert build_strategy(best, engine, scorer=scorer).strategy.scorer is scorer
    outer = {"class_path": "MajorityVote", "init_args": {"n": 3, "engine": "HiddenReasoning"}}
    assert isinstance(build_strategy(outer, engine).engine, HiddenReasoning)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda e: HiddenReasoning(e, thinking_tokens=0), "thinking_tokens is 0"),
        (lambda e: HiddenReasoning(e, answer_tokens=-1), "answer_tokens is -1"),
        (lambda e: HiddenReasoning(e, marks=("a", "a")), r"marks is \['a', 'a'\]; it must be two different texts"),
        (lambda e: HiddenReasoning(e, marks=("{", "}")), r"the tokenizer cannot write '\{', of the marks"),
        (
            lambda e: HiddenReasoning(RemoteEngine("http://h", api="chat")),
            "answers messages, and a thought is continued",
        ),
        (lambda e: HiddenReasoning(LocalEngine(e.model, None)).search([[5, 6]], [0]), "give the engine a tokenizer"),
        (lambda e: HiddenReasoning(RemoteEngine("http://h")).search([[5, 6]], [0]), "a thought continues a text"),
    ],
)
def test_mistakes_are_errors(make: Callable[[Any], Any], message: str, engine: LocalEngine) -> None:
    with pytest.raises(ValueError, match=message):
        make(engine)


@pytest.mark.parametrize("with_tokens", [False, True])
def test_a_server_thinks_as_text(with_tokens: bool) -> None:
    tokenizer = char_tokenizer() if with_tokens else None

    def reported(text: str) -> dict[str, Any]:
        return {"token_ids": list(char_tokenizer()(text)["input_ids"])} if with_tokens else {}

    def answer(path: str, body: dict[str, Any] | None, number: int) -> dict[str, Any]:
        assert body is not None
        if body["prompt"].endswith("</think>"):
            return completion("\n#4", "stop", **reported("\n#4"))
        if body["prompt"].startswith("slow"):
            return completion("ab"[: body["max_tokens"]], "length", **reported("ab"[: body["max_tokens"]]))
        assert body["stop"] == ["</think>"]
        return completion("a", "stop", **reported("a</think>"))

    with serve(answer) as served:
        engine = RemoteEngine(served.url, model="m", tokenizer=tokenizer)
        strategy = HiddenReasoning(engine, thinking_tokens=2, answer_tokens=4)
        quick, slow = strategy.search(["quick", "slow"], seeds=[0, 1])
        prompts = [body["prompt"] for body in served.bodies]
    assert sorted(prompts) == sorted(["quick<think>", "slow<think>", "quick<think>a</think>", "slow<think>ab</think>"])
    for result, text, closed in ((quick, "a", True), (slow, "ab", False)):
        assert result.thought is not None
        assert (result.text, result.thought.text, result.thought.closed) == ("#4", text, closed)
        assert result.thought.passage == f"<think>{text}</think>\n"
        whole = char_tokenizer()(f"<think>{text}</think>\n#4")["input_ids"] if with_tokens else []
        assert list(result.token_ids) == whole
    assert quick.tokens == (12 if with_tokens else 0)  # "a</think>" and "\n#4"


def results_of(engine: Scripted, prompts: Sequence[str], **columns: list[Any]) -> list[SearchResult]:
    return HiddenReasoning(engine, thinking_tokens=20, answer_tokens=20).search(
        prompts, seeds=[0] * len(prompts), columns=columns
    )


def test_rows_with_the_reasoning_kept_masked_or_stripped() -> None:
    engine = Scripted(then("a=1</think>", "\n#4"))
    results = results_of(engine, ["q", "p<think>\n"], answer=["4", "5"])
    kept = reasoning_rows(results)
    assert kept == [
        {"answer": "4", "prompt": "q", "completion": "<think>a=1</think>\n#4"},
        {"answer": "5", "prompt": "p<think>\n", "completion": "a=1</think>\n#4"},
    ]
    masked = reasoning_rows(results, "masked")
    assert masked[0] == {"answer": "4", "prompt": "q<think>a=1</think>\n", "completion": "#4"}
    stripped = reasoning_rows(results, "stripped")
    assert [(row["prompt"], row["completion"]) for row in stripped] == [("q", "#4"), ("p", "#4")]

    # A row's own answer and its verdict are not about this one.
    others = results_of(engine, ["q"], answer=["4"], response=["#5"], label=[False])
    assert reasoning_rows(others) == kept[:1]

    # Learned tokens: all after the prompt, or those of the answer alone, after the same context.
    rows = RowTokenizer(engine.tokenizer)
    for row, learned, context in (
        (kept[0], "<think>a=1</think>\n#4<eos>", "q"),
        (masked[0], "#4<eos>", "q<think>a=1</think>\n"),
        (stripped[0], "#4<eos>", "q"),
    ):
        tree = rows.answers(demonstration(row))
        assert engine.text(tree.tokens.tolist()) == context
        assert engine.text(tree.children[0].tokens.tolist()) == learned
        assert tree.children[0].weights is not None
        assert tree.children[0].weights.tolist() == [1.0] * len(tree.children[0].tokens)


def test_rows_of_chats_and_what_is_left_out() -> None:
    engine = Scripted(then("a</think>", "#4"))
    (result,) = results_of(engine, ["<user>q\n<assistant>"])
    chat = [{"role": "user", "content": "q"}]
    rows = RowTokenizer(engine.tokenizer)
    for reasoning, learned in (("kept", "<think>a</think>#4<eos>"), ("masked", "#4<eos>"), ("stripped", "#4<eos>")):
        (row,) = reasoning_rows([result], reasoning, prompts=[chat])  # type: ignore[arg-type]
        made = rows.answers(Row(row["prompt"], (row["completion"],)))
        scored = [
            token
            for segment in next(made.paths())
            for token, weight in zip(
                segment.tokens.tolist(),
                [0.0] * len(segment.tokens) if segment.weights is None else segment.weights,
                strict=True,
            )
            if weight
        ]
        assert engine.text(scored) == learned
    # A thought that was cut off, an answer that has not ended, a low score.
    open_end = HiddenReasoning(Scripted(lambda text: "b" * 50), thinking_tokens=3, answer_tokens=3)
    assert reasoning_rows(open_end.search(["q"], seeds=[0])) == []
    best = Candidate(Query("q", (), 0), (), "#4", (), "stop", 0.5, result.thought)
    assert reasoning_rows([SearchResult([best], 0)], least_score=0.6) == []
    assert len(reasoning_rows([SearchResult([best], 0)], least_score=0.5)) == 1
    with pytest.raises(ValueError, match="reasoning is 'mask'; it must be one of kept, masked, stripped; did you mean"):
        reasoning_rows([], "mask")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="result 0 has no thought"):
        reasoning_rows([SearchResult([Candidate(Query("q", (), 0), (), "#4")], 0)])
    with pytest.raises(ValueError, match=r"prompt 0 is \[5\]: give prompts= of texts or chat messages"):
        reasoning_rows([result], prompts=[[5]])
    with pytest.raises(ValueError, match="results has 1 entries and prompts 0"):
        reasoning_rows([result], prompts=[])


def test_rewards_see_the_answer_alone(tmp_path: Path) -> None:
    seen: list[str] = []

    def spy(prompts: Sequence[str], completions: Sequence[str], answer: Sequence[str]) -> list[float | None]:
        seen.extend(completions)
        return [float(text == right) if right else None for text, right in zip(completions, answer, strict=True)]

    texts = ["<think>#9</think>\n 4", "4", "<think>4", "a</think>4", "<think>4</think>", "<think>x</think>4"]
    columns = {"answer": ["4", "4", "4", "5", "4", ""], "completion_ids": [[5]] * 6, "level": [1] * 6}
    scores = RewardSet([AnswerOnlyReward(spy)])(["q"] * 6, texts, columns)
    assert seen == ["4", "4", "4", "4"]
    assert scores.values[:5, 0].tolist() == [1.0, 1.0, 0.0, 0.0, 0.0]
    assert scores.values[5, 0] != scores.values[5, 0]  # no verdict
    assert AnswerOnlyReward(spy).required_columns == ("answer",)
    with pytest.raises(ValueError, match="answer"):
        RewardSet([AnswerOnlyReward(spy)])(["q"], ["4"], {})
    spec = {"class_path": "rlhf_lightning.rewards.FormatReward", "init_args": {"pattern": "[0-9]"}}
    other = AnswerOnlyReward(spec, marks=("[", "]"), no_answer=None)
    assert other(["q"] * 3, ["[a]4", "[a", "x"]) == [1.0, None, 0.0]
    with pytest.raises(ValueError, match="marks is"):
        AnswerOnlyReward(spy, marks=("[", ""))
    with pytest.raises(ValueError, match="do not fit it"):
        AnswerOnlyReward({"class_path": "rlhf_lightning.rewards.FormatReward", "init_args": {"patern": "x"}})


def test_votes_count_answers_of_thoughts(engine: LocalEngine) -> None:
    """A vote over answers with thoughts is that over the same texts without."""
    sampling = SamplingParams(max_new_tokens=24)
    strategy = MajorityVote(HiddenReasoning(engine, thinking_tokens=5, answer_tokens=4), n=5, sampling=sampling)
    result = strategy.search(["1+1="], seeds=[0])[0]
    keys = [strategy.answer(c.text) for c in result.candidates]
    assert [c.score for c in result.candidates] == [0.0 if key is None else keys.count(key) / 5 for key in keys]
