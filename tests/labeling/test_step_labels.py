"""Step labels by completion, with an engine whose every sample is known."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any, Literal

import pytest
import torch

from rlhf_lightning.inference import Completion, LocalEngine, SamplingParams
from rlhf_lightning.labeling.step_labels import label_steps, sample_solutions
from rlhf_lightning.rewards.exact_answer import exact_answer

from ..helpers import char_tokenizer, tiny_model

TOKENIZER = char_tokenizer()
ROWS = [
    {"prompt": "1+2+3=?", "completions": ["1+2=3", "3+3=6", "#6"], "answer": "6", "level": 1},
    {"prompt": "2+2+1=?", "completion": "2+2=5\n5+1=6\n#6", "answer": "5"},
    {"prompt": "9=?", "completions": ["#9"], "answer": "9"},
]


class Scripted:
    """Completes with the right answer in every n-th sample, n being the number of steps there are plus one.

    After a step that holds ``=5`` nothing is ever right.
    """

    def __init__(self) -> None:
        self.prompts: list[str] = []
        self.seeds: list[list[int]] = []

    def generate(
        self,
        prompts: Any,
        num_samples: int = 1,
        sampling: SamplingParams | None = None,
        *,
        seeds: Sequence[Sequence[int]] | None = None,
    ) -> list[list[Completion]]:
        texts = [TOKENIZER.decode(ids) for ids in prompts]
        self.prompts += texts
        self.seeds += [list(row) for row in seeds or ()]
        groups = []
        for text in texts:
            problem, *steps = text.rstrip("\n").replace("?", "?\n").split("\n")
            right = sum(map(int, problem.removesuffix("=?").split("+")))
            answers = [right if n % (len(steps) + 1) == 0 and "=5" not in text else -1 for n in range(num_samples)]
            groups.append([Completion([], f"#{answer}", [], "stop") for answer in answers])
        return groups


def labelled(engine: Any = None, rows: Any = ROWS, **options: Any) -> list[dict[str, Any]]:
    return list(label_steps(rows, engine or Scripted(), TOKENIZER, exact_answer, **{"num_samples": 6, **options}))


def test_labels_are_the_share_of_right_completions() -> None:
    first, second, third = labelled()
    # One step there: every second sample is right, 3 of 6. Two steps: every third, 2 of 6. The last: its own answer.
    assert first["labels"] == [3 / 6, 2 / 6, 1.0]
    assert second["labels"] == [0.0, 0.0, 0.0]
    assert third["labels"] == [1.0]
    assert [row["labels"] for row in labelled(labels="hard")] == [[1.0, 1.0, 1.0], [0.0, 0.0, 0.0], [1.0]]


def test_rows_are_those_of_the_stepwise_contract() -> None:
    first, second, _ = labelled()
    assert first == {**ROWS[0], "labels": first["labels"]}
    assert second["completions"] == ["2+2=5", "5+1=6", "#6"]
    assert second.keys() == {"prompt", "completions", "labels", "answer"}


def test_a_verifier_gets_the_columns_that_it_takes() -> None:
    def right(prompts: Any, completions: list[str], answer: list[str]) -> list[float]:
        return [float(text.strip().endswith(f"#{n}")) for text, n in zip(completions, answer, strict=True)]

    rows = [{**row, "source": "book"} for row in ROWS]
    found = label_steps(rows, Scripted(), TOKENIZER, right, num_samples=6)  # type: ignore[arg-type]
    assert [row["labels"] for row in found] == [row["labels"] for row in labelled()]


def test_prefixes_are_prompt_and_steps() -> None:
    engine = Scripted()
    labelled(engine)
    assert engine.prompts == ["1+2+3=?1+2=3\n", "1+2+3=?1+2=3\n3+3=6\n", "2+2+1=?2+2=5\n", "2+2+1=?2+2=5\n5+1=6\n"]
    assert len({seed for row in engine.seeds for seed in row}) == 4 * 6


def test_seeds_depend_on_the_row_and_not_on_its_neighbours() -> None:
    rows = [{**row, "row_id": f"file:{n}"} for n, row in enumerate(ROWS)]
    whole, alone, other = Scripted(), Scripted(), Scripted()
    labelled(whole, rows)
    labelled(alone, rows[1:2])
    labelled(other, rows[1:2], seed=1)
    assert whole.seeds[2:] == alone.seeds
    assert not {seed for row in alone.seeds for seed in row} & {seed for row in other.seeds for seed in row}


def test_nothing_is_sampled_after_a_hopeless_step() -> None:
    engine = Scripted()
    first, second, third = labelled(engine, skip_after_failure=True)
    assert (first["labels"], second["labels"], third["labels"]) == ([3 / 6, 2 / 6, 1.0], [0.0, 0.0, 0.0], [1.0])
    assert sorted(engine.prompts) == ["1+2+3=?1+2=3\n", "1+2+3=?1+2=3\n3+3=6\n", "2+2+1=?2+2=5\n"]


@pytest.mark.parametrize("labels", ["soft", "hard"])
def test_a_right_answer_after_a_hopeless_step_counts(labels: Literal["soft", "hard"]) -> None:
    """The hard label of the last step is whether the solution is right, whatever was given up before."""
    rows = [{"prompt": "2+3=?", "completions": ["2+3=5", "#5"], "answer": "5"}]  # "=5" makes the script fail
    assert labelled(rows=rows, labels=labels)[0]["labels"] == [0.0, 1.0]
    assert labelled(rows=rows, labels=labels, skip_after_failure=True)[0]["labels"] == [0.0, 1.0]


class Unlucky:
    """Completes with the right answer, 5, but never after exactly one step."""

    def __init__(self) -> None:
        self.prompts: list[str] = []

    def generate(self, prompts: Any, num_samples: int = 1, *args: Any, **options: Any) -> list[list[Completion]]:
        texts = [TOKENIZER.decode(ids) for ids in prompts]
        self.prompts += texts
        answers = ["#0" if text.count("\n") == 1 else "#5" for text in texts]
        return [[Completion([], answer, [], "stop")] * num_samples for answer in answers]


def test_only_wrong_solutions_are_given_up() -> None:
    """A right answer shows that the step which no sample could save was no error: the next ones are still sampled."""
    right, wrong = (
        {"prompt": "2+3=?", "completions": ["let us add", "2+3=5", "so", answer], "answer": "5"}
        for answer in ("#5", "#4")
    )
    engine = Unlucky()
    first, second = labelled(engine, [right, wrong], skip_after_failure=True)
    assert first["labels"] == [0.0, 1.0, 1.0, 1.0]
    assert second["labels"] == [0.0, 0.0, 0.0, 0.0]
    assert sorted(text.count("\n") for text in engine.prompts) == [1, 1, 2, 3]
    assert [row["labels"] for row in labelled(Unlucky(), [right, wrong])] == [
        [0.0, 1.0, 1.0, 1.0],
        [0.0, 1.0, 1.0, 0.0],
    ]


def test_rows_without_an_answer_are_skipped() -> None:
    with pytest.warns(UserWarning, match="1 rows were skipped"):
        found = labelled(rows=[{**ROWS[0], "answer": None}, ROWS[2]])
    assert [row["prompt"] for row in found] == ["9=?"]


def test_many_rows_keep_their_order() -> None:
    rows = [{"prompt": f"{n}+1=?", "completions": ["so", f"#{n + 1}"], "answer": str(n + 1)} for n in range(70)]
    assert [row["prompt"] for row in labelled(rows=rows)] == [row["prompt"] for row in rows]


def test_a_real_engine_completes_from_tokens() -> None:
    engine = LocalEngine(tiny_model("llama"), TOKENIZER)
    sampling = SamplingParams(max_new_tokens=3)
    torch.manual_seed(0)
    first = labelled(engine, sampling=sampling)
    torch.manual_seed(1)
    assert labelled(engine, sampling=sampling) == first
    assert first[0]["labels"][-1] == 1.0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_samples": 0}, "num_samples is 0; it must be at least 1"),
        ({"labels": "crisp"}, "labels is 'crisp'"),
        ({"step_separator": ""}, "step_separator is ''"),
        ({"max_length": 0}, "max_length is 0; it must be at least 1"),
        ({"on_too_long": "cut"}, "on_too_long is 'cut'; it must be one of drop, error"),
        ({"rows": [{"prompt": "a"}]}, r"row rows:0 has the columns \['prompt'\]; it needs a prompt, and completions"),
        ({"rows": [{"prompt": "a", "completion": "\n"}]}, "row rows:0 has the columns"),
    ],
)
def test_what_cannot_be_labelled_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        labelled(**options)


class Fixed:
    """Writes the same texts after every prompt; the ones that end in ``...`` are cut off."""

    def __init__(self, *texts: str) -> None:
        self.texts = texts
        self.prompts: list[list[int]] = []
        self.seeds: list[list[int]] = []

    def generate(
        self,
        prompts: Any,
        num_samples: int = 1,
        sampling: SamplingParams | None = None,
        *,
        seeds: Sequence[Sequence[int]] | None = None,
    ) -> list[list[Completion]]:
        assert num_samples == len(self.texts)
        self.prompts += [list(ids) for ids in prompts]
        self.seeds += [list(row) for row in seeds or ()]
        return [
            [Completion([], text, [], "length" if text.endswith("...") else "stop") for text in self.texts]
            for _ in prompts
        ]


def test_solutions_are_split_and_those_of_no_use_are_counted() -> None:
    engine = Fixed("a\n\nb", "", "a\nb\n", "a\nb...", "\n", "b")
    rows = [{"prompt": "1+1=?", "answer": "2", "completion": "old", "labels": [1]}, {"prompt": "9=?", "row_id": "x:7"}]
    found = sample_solutions(rows, engine, TOKENIZER, num_solutions=6)
    assert found.rows == [
        {"prompt": "1+1=?", "answer": "2", "row_id": "rows:0/0", "completions": ["a", "b"]},
        {"prompt": "1+1=?", "answer": "2", "row_id": "rows:0/5", "completions": ["b"]},
        {"prompt": "9=?", "row_id": "x:7/0", "completions": ["a", "b"]},
        {"prompt": "9=?", "row_id": "x:7/5", "completions": ["b"]},
    ]
    assert (found.cut_off, found.empty, found.duplicates) == (2, 4, 2)
    assert [TOKENIZER.decode(ids) for ids in engine.prompts] == ["1+1=?", "9=?"]


def test_seeds_of_solutions_are_their_own() -> None:
    rows = [{"prompt": "1+1=?", "row_id": "x:0"}, {"prompt": "1+1=?", "row_id": "x:1"}]
    both, alone, other = Fixed("a", "b"), Fixed("a", "b"), Fixed("a", "b")
    sample_solutions(rows, both, TOKENIZER, num_solutions=2)
    sample_solutions(rows[1:], alone, TOKENIZER, num_solutions=2)
    sample_solutions(rows[1:], other, TOKENIZER, num_solutions=2, seed=1)
    assert both.seeds[1:] == alone.seeds
    assert len({seed for engine in (both, other) for row in engine.seeds for seed in row}) == 6


def test_prompts_may_come_as_tokens() -> None:
    row = {"prompt": "ignored", "completions": ["so", "#1"], "answer": "1", "row_id": "x:0"}
    engine = Fixed("#1", "#2")
    assert sample_solutions([row], engine, TOKENIZER, num_solutions=2, prompt_tokens=lambda row: [5, 6]).cut_off == 0
    options: dict[str, Any] = {"num_samples": 2, "prompt_tokens": lambda row: [5, 6]}
    assert labelled(engine, [row], **options)[0]["labels"] == [0.5, 1.0]
    assert engine.prompts == [[5, 6], [5, 6, *TOKENIZER("so\n")["input_ids"]]]


def test_a_chat_becomes_what_the_template_makes_of_it() -> None:
    engine = Fixed("#1")
    sample_solutions([{"prompt": [{"role": "user", "content": "1=?"}]}], engine, TOKENIZER, num_solutions=1)
    assert TOKENIZER.decode(engine.prompts[0]) == "<user>1=?\n<assistant>"


def test_solutions_that_cannot_be_sampled_are_refused() -> None:
    with pytest.raises(ValueError, match="num_solutions is 0; it must be at least 1"):
        sample_solutions([], Fixed(), TOKENIZER, num_solutions=0)
    with pytest.raises(ValueError, match="step_separator is ''"):
        sample_solutions([], Fixed(), TOKENIZER, step_separator="")
    with pytest.raises(ValueError, match=r"row rows:0 has the columns \['answer'\]; it needs a prompt"):
        sample_solutions([{"answer": "1"}], Fixed("a"), TOKENIZER, num_solutions=1)


# Rows that are too long.


def test_rows_that_fill_the_models_positions_are_skipped() -> None:
    """128 positions: 127 tokens of prompt and steps leave room for one more. The last step needs no room."""

    def row(length: int, answer: str) -> dict[str, Any]:
        return {"prompt": "1=?", "completions": ["a" * (length - 4), answer], "answer": "1"}

    engine = LocalEngine(tiny_model("llama"), TOKENIZER)
    rows = [row(127, "#1"), row(128, "#1"), {**row(9, "#1"), "answer": None}, row(10, "#1" + "0" * 200), ROWS[2]]
    skipped: Counter[str] = Counter()
    options: dict[str, Any] = {"sampling": SamplingParams(max_new_tokens=2), "num_samples": 1}
    found = labelled(engine, rows, skipped=skipped, **options)
    assert [len(row["completions"][0]) for row in found] == [123, 6, 2]
    assert skipped == {"too long": 1, "without verdict": 1}
    with pytest.warns(UserWarning, match="2 rows were skipped: 1 are too long, and the verifier gives no verdict on 1"):
        assert labelled(engine, rows, **options) == found
    with pytest.raises(
        ValueError, match="row rows:1 is too long: its prompt and first 1 steps have 128 tokens, and at m"
    ):
        labelled(engine, rows, on_too_long="error", **options)


def test_a_length_of_ones_own() -> None:
    rows = [{"prompt": "1=?", "completions": ["aa", "#1"], "answer": "1"}, ROWS[2]]
    for limit, expected in ((5, 1), (6, 2)):  # three tokens of prompt, two of the step, one of its separator
        skipped: Counter[str] = Counter()
        assert len(labelled(Fixed("#1"), rows, max_length=limit, skipped=skipped, num_samples=1)) == expected
        assert skipped["too long"] == 2 - expected
    found = sample_solutions(rows, Fixed("a"), TOKENIZER, num_solutions=1, max_length=2)
    assert (found.rows, found.too_long) == ([], 2)


def test_prompts_that_fill_the_models_positions_are_not_solved() -> None:
    engine = LocalEngine(tiny_model("llama"), TOKENIZER)
    rows = [{"prompt": "1" * 128}, {"prompt": "1" * 127, "row_id": "x:1"}]
    found = sample_solutions(rows, engine, TOKENIZER, num_solutions=1)
    assert found.too_long == 1
    assert found.cut_off + found.empty + len(found.rows) == 1
    with pytest.raises(ValueError, match="row rows:0 is too long: its prompt has 128 tokens, and at most 127 can be"):
        sample_solutions(rows, engine, TOKENIZER, num_solutions=1, on_too_long="error")
