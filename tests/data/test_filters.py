"""Filters of training rows against naive loops, in memory, streamed, resumed and over ranks."""

from __future__ import annotations

import random
import re
from pathlib import Path
from typing import Any

import pytest

from rlhf_lightning.data.duplicates import similar_texts
from rlhf_lightning.data.filtered_rows import FilteredRows
from rlhf_lightning.data.filters import (
    DropText,
    Duplicates,
    EvaluationOverlap,
    RowFilter,
    ScoreRange,
    StripText,
)
from rlhf_lightning.data.sources import open_source
from rlhf_lightning.datamodules import PreferenceDataModule, SFTDataModule
from rlhf_lightning.evaluation import contamination

from ..datamodules.toys import chars, complaint


def kept(rows: list[dict[str, Any]], *filters: RowFilter) -> list[dict[str, Any]]:
    return [row for _, row in FilteredRows(open_source(rows), filters)]


def module(rows: Any, *filters: RowFilter, **settings: Any) -> SFTDataModule:
    return SFTDataModule(train=rows, tokenizer=chars(), filters=list(filters), global_batch_size=4, **settings)


def ids_of(loader: Any) -> list[str]:
    return [example.row_id for batch in loader for example in batch]


def test_scores_within_limits_are_kept() -> None:
    rows = [{"text": "a", "score": score} for score in (1, 2.5, "3", 4, None, float("nan"))]
    assert [row["score"] for row in kept(rows, ScoreRange("score", least=2.5, most=3))] == [2.5, "3"]
    assert [row["score"] for row in kept(rows, ScoreRange("score", most=2.5))] == [1, 2.5]
    assert kept([{"ratings": {"style": 2}}, {"ratings": {"style": 4}}], ScoreRange("style", least=3)) == [
        {"ratings": {"style": 4}}
    ]
    assert "no column 'scor'" in complaint(kept, rows, ScoreRange("scor", least=1))
    assert "expected a finite number" in complaint(kept, [{"score": "high"}], ScoreRange("score", least=1))


def test_patterns_strip_texts_and_drop_rows() -> None:
    chat = [{"role": "user", "content": "Hi :-)"}, {"role": "assistant", "content": "Ho :-)"}]
    rows = [{"prompt": chat, "completion": "a :-)b", "n": 3}]
    assert kept(rows, StripText([r" :-\)", "b$"])) == [
        {"prompt": [{**chat[0], "content": "Hi"}, {**chat[1], "content": "Ho"}], "completion": "a", "n": 3}
    ]
    assert kept(rows, StripText([r" :-\)"], columns=["completion"])) == [{**rows[0], "completion": "ab"}]
    assert chat[0]["content"] == "Hi :-)"

    # A text is searched on its own: here "^Ho" begins the second message.
    assert kept(rows, DropText(["^Ho"])) == []
    assert kept(rows, DropText(["^Ho"], columns=["completion"])) == rows
    assert kept(rows, DropText(["user"])) == rows, "roles are no texts"
    assert "no column 'txt'" in complaint(kept, rows, DropText(["a"], columns=["txt"]))
    assert "no column 'txt'" in complaint(kept, rows, StripText(["a"], columns=["txt"]))


def test_the_first_of_equal_texts_is_kept() -> None:
    draw = random.Random(0)
    rows = [{"prompt": draw.choice("abc"), "completion": draw.choice("xyz"), "score": i} for i in range(40)]
    first = {(row["prompt"], row["completion"]): row for row in reversed(rows)}
    assert kept(rows, Duplicates()) == sorted(first.values(), key=lambda row: row["score"])
    of_prompt = {row["prompt"]: row for row in reversed(rows)}
    assert kept(rows, Duplicates(["prompt"])) == sorted(of_prompt.values(), key=lambda row: row["score"])
    numbers = [{"prompt": "12+13="}, {"prompt": "12-13="}, {"prompt": "1"}, {"prompt": "12+13="}]
    assert kept(numbers, Duplicates()) == numbers[:3]
    assert kept(numbers, Duplicates(similarity=0.9)) == numbers[:3]
    assert kept([{"tokens": [1]}, {"tokens": [2]}], Duplicates()) == [{"tokens": [1]}, {"tokens": [2]}]
    assert "no column 'p'" in complaint(kept, numbers, Duplicates(["p"]))


def test_what_is_dropped_before_repeats_nothing() -> None:
    rows = [{"text": "a", "score": 1}, {"text": "a!", "score": 5}, {"text": "a", "score": 4}]
    better = ScoreRange("score", least=3)
    assert kept(rows, better, StripText(["!"]), Duplicates()) == [{"text": "a", "score": 5}]
    assert kept(rows, Duplicates(), better) == [{"text": "a!", "score": 5}]


def naive_grams(text: str, n: int) -> set[tuple[str, ...]]:
    tokens = re.findall(r"\w+|[^\w\s]", text.casefold())
    size = min(n, len(tokens))
    return {tuple(tokens[i : i + size]) for i in range(len(tokens) - size + 1)}


@pytest.mark.parametrize("similarity", [0.3, 0.5, 0.8, 0.95])
def test_near_duplicates_are_those_of_all_pairs(similarity: float) -> None:
    draw = random.Random(int(similarity * 100))
    words = [f"w{i}" for i in range(60)]
    texts: list[str] = []
    for _ in range(150):
        base = draw.choice(texts).split() if texts and draw.random() < 0.7 else draw.choices(words, k=40)
        for _ in range(draw.choice((0, 1, 2, 4, 10))):
            base[draw.randrange(len(base))] = draw.choice(words)
        texts.append(" ".join(base).upper() if draw.random() < 0.2 else " ".join(base))

    left: list[str] = []
    for text in texts:
        own = naive_grams(text, 3)
        others = [naive_grams(other, 3) for other in left]
        if all(len(own & other) / len(own | other) < similarity for other in others):
            left.append(text)
    assert 10 < len(left) < 140
    rows = [{"text": text} for text in texts]
    assert [row["text"] for row in kept(rows, Duplicates(similarity=similarity, n=3))] == left


def test_columns_of_near_duplicates_are_compared_one_by_one() -> None:
    seen = similar_texts(0.5, 1)
    assert not seen([("chosen", "a b c"), ("rejected", "x y z")])
    assert not seen([("chosen", "x y z"), ("rejected", "a b c")])
    assert seen([("chosen", "c, b a"), ("rejected", "z y x")]), "6 of 7 are shared"


@pytest.mark.parametrize("n", [2, 3, 5])
def test_kept_rows_share_nothing_with_the_evaluation(n: int) -> None:
    draw = random.Random(n)
    rows, evaluation = (
        [{"prompt": " ".join(draw.choices("abcd", k=draw.randint(1, 9)))} for _ in range(count)] for count in (60, 5)
    )
    left = kept(rows, EvaluationOverlap(evaluation, n=n))
    assert 0 < len(left) < 60
    assert contamination(evaluation, left, n=n).share == 0
    for row in rows:
        if row not in left:
            assert contamination(evaluation, [row], n=n).share > 0
    # Where no text is shorter than n, the share of a row is that of the same measure with the rows exchanged.
    rows, evaluation = ([row for row in given if len(row["prompt"].split()) >= n] for given in (rows, evaluation))
    found = contamination(rows, evaluation, n=n, threshold=0.6).contaminated
    expected = [row for i, row in enumerate(rows) if f"memory:{i + 1}" not in found]
    assert kept(rows, EvaluationOverlap(evaluation, n=n, threshold=0.6)) == expected


def test_columns_of_an_evaluation() -> None:
    rows = [{"prompt": "1 2 3 4", "completion": "7 8"}, {"prompt": "5", "completion": "6"}]
    asked = [{"prompt": "2 3 4 5", "answer": "6"}]
    assert kept(rows, EvaluationOverlap(asked, n=3)) == rows[1:]
    assert kept(rows, EvaluationOverlap(asked, n=3, columns=["completion"])) == rows
    assert kept(rows, EvaluationOverlap(asked, n=3, evaluation_columns=["answer"])) == rows[:1]
    assert kept(rows, EvaluationOverlap(asked, n=3, evaluation_columns=None)) == []
    message = complaint(kept, rows, EvaluationOverlap([{"question": "a"}]))
    assert message.startswith("memory:1 has no column 'prompt': it has question; name")
    assert "no row of the evaluation has text" in complaint(kept, rows, EvaluationOverlap([{"prompt": ""}]))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ScoreRange("score"), "no limit"),
        (lambda: ScoreRange("score", least=2, most=1), "least=2 is above most=1"),
        (lambda: DropText(["(a"]), "the pattern '(a' is no regular expression"),
        (lambda: StripText([]), "expected a list of regular expressions"),
        (lambda: Duplicates(similarity=1.5), "similarity=1.5, expected above 0 and at most 1"),
        (lambda: Duplicates(n=0), "n is 0"),
        (lambda: EvaluationOverlap([{"prompt": "a"}], threshold=1.0), "threshold is 1.0"),
    ],
)
def test_options_out_of_range(make: Any, message: str) -> None:
    assert message in complaint(make)


ROWS = [
    {"prompt": f"{i % 7}+{i % 3}=", "completion": "12" if i % 5 else "no way", "score": i % 4, "n": str(i)}
    for i in range(40)
]
FILTERS = (ScoreRange("score", least=1), DropText(["no"]), Duplicates(["prompt", "completion"]))


def expected_ids() -> list[str]:
    seen, ids = set(), []
    for number, row in enumerate(ROWS, start=1):
        if row["score"] >= 1 and "no" not in row["completion"] and row["prompt"] not in seen:
            seen.add(row["prompt"])
            ids.append(f"memory:{number}")
    return ids


def test_only_training_rows_are_filtered_and_one_line_counts_them() -> None:
    data = module(ROWS, *FILTERS, val=ROWS)
    data.setup("fit")
    assert ids_of(data.val_dataloader()) == [f"memory:{i + 1}" for i in range(40)]
    assert sorted(ids_of(data.train_dataloader())) == sorted(expected_ids())
    report = data.report["train"]
    low = sum(row["score"] < 1 for row in ROWS)
    no = sum(row["score"] >= 1 and row["completion"] == "no way" for row in ROWS)
    repeated = 40 - low - no - len(expected_ids())
    assert report["filtered"] == low + no + repeated
    line = data._reader("train")
    line.read_all()
    assert (low, no, repeated) == (10, 6, 6)
    assert "22 rows filtered out (10 by ScoreRange(score), 6 by DropText, 6 by Duplicates)" in line.describe()


@pytest.mark.parametrize("streaming", [False, True])
def test_ranks_and_epochs_have_the_same_rows(streaming: bool) -> None:
    from ..datamodules.test_base import attached, trainer

    for world_size in (1, 3):
        found = []
        for rank in range(world_size):
            data = module(ROWS, *FILTERS, streaming=streaming, shuffle_buffer=8)
            attached(data, trainer(rank, world_size))
            loader = data.train_dataloader()
            found.append([ids_of(loader) for _ in range(2)])
        for epoch in range(2):
            assert sorted(i for of_rank in found for i in of_rank[epoch]) == sorted(expected_ids())


def test_a_stream_is_resumed_with_the_same_rows() -> None:
    whole = module(ROWS, *FILTERS, streaming=True, shuffle_buffer=8).train_dataloader()
    batches = [[example.row_id for example in batch] for batch in whole]
    begun = module(ROWS, *FILTERS, streaming=True, shuffle_buffer=8)
    rows = iter(begun.train_dataloader())
    for _ in range(4):
        next(rows)
    state = begun.state_dict()
    again = module(ROWS, *FILTERS, streaming=True, shuffle_buffer=8)
    again.load_state_dict(state)
    assert [[example.row_id for example in batch] for batch in again.train_dataloader()] == batches[3:]

    other = module(ROWS, *FILTERS[:2], streaming=True, shuffle_buffer=8)
    other.load_state_dict(state)
    assert "cannot resume on other data" in complaint(other.train_dataloader)


def test_an_edited_evaluation_is_other_data(tmp_path: Path) -> None:
    file = tmp_path / "eval.txt"
    digests = []
    for text in ("1+1", "1+2", "1+1"):
        file.write_text(text)
        digests.append(FilteredRows(open_source(ROWS), [EvaluationOverlap(str(file))]).fingerprint)
    assert digests[0] == digests[2] != digests[1]


def test_examples_are_cached_by_filters(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from rlhf_lightning.data import example_cache

    monkeypatch.setenv("RLHF_LIGHTNING_CACHE", str(tmp_path))
    monkeypatch.setattr("rlhf_lightning.datamodules.base.LEAST_ROWS", 1)
    counts = []
    for filters in (FILTERS, FILTERS[:1], FILTERS):
        data = module(ROWS, *filters)
        data.setup("fit")
        counts.append((data.report["train"]["kept"], data.report["train"].get("filtered by Duplicates")))
    assert counts[0] == counts[2] != counts[1]
    assert len(list(tmp_path.glob("*.npz"))) == 2

    class Own(RowFilter):
        def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
            return row

    assert example_cache.entry_name(FilteredRows(open_source(ROWS), [Own()]), chars(), {}) is None


def test_pairs_are_filtered_by_their_scores() -> None:
    rows = [
        {"prompt": prompt, "completion": "ab"[i], "helpfulness": score}
        for prompt, scores in (("1", (4, 1)), ("2", (2, 1)))
        for i, score in enumerate(scores)
    ]
    data = PreferenceDataModule(
        train=rows,
        tokenizer=chars(),
        pair_by={"helpfulness": 1.0},
        filters=[ScoreRange("chosen_score", least=3)],
        global_batch_size=4,
    )
    assert ids_of(data.train_dataloader()) == ["memory:1+2"]


def test_filters_in_yaml(tmp_path: Path) -> None:
    from jsonargparse import ArgumentParser

    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(SFTDataModule, "data")
    file = tmp_path / "data.yaml"
    file.write_text(
        """
        class_path: rlhf_lightning.datamodules.SFTDataModule
        init_args:
          train: sums:demonstrations?rows=8
          filters:
            - {class_path: rlhf_lightning.data.filters.ScoreRange, init_args: {column: score, least: 3}}
            - {class_path: rlhf_lightning.data.filters.DropText, init_args: {patterns: ["(?i)as an ai"]}}
            - {class_path: rlhf_lightning.data.filters.Duplicates, init_args: {similarity: 0.8}}
            - {class_path: rlhf_lightning.data.filters.EvaluationOverlap, init_args: {evaluation: eval.jsonl}}
        """
    )
    data = parser.instantiate(parser.parse_args([f"--data={file}"])).data
    assert data.filters == [
        ScoreRange("score", least=3),
        DropText(["(?i)as an ai"]),
        Duplicates(similarity=0.8),
        EvaluationOverlap("eval.jsonl"),
    ]
