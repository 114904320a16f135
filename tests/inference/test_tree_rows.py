"""Rows from search trees: values by hand, pairs, labelled steps and demonstrations, read by the datamodules."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from rlhf_lightning.datamodules import PreferenceDataModule, SFTDataModule, StepwiseDataModule
from rlhf_lightning.inference import (
    MCTS,
    Node,
    SearchTree,
    collect_demonstrations,
    collect_pairs,
    collect_steps,
    node_values,
)

from ..helpers import char_tokenizer, save_tiny_model
from .toy import PROMPT, Judge, ToyEngine, random_table, step_scores


def grown(node: Node, *below: Node, rollouts: tuple[Node, ...] = ()) -> Node:
    node.children, node.rollouts = list(below), list(rollouts)
    for child in (*below, *rollouts):
        child.parent = node
    for rollout in rollouts:
        rollout.rollout = True
    return node


def end(text: str, score: float | None, **given: Any) -> Node:
    return Node((9,), text, finish_reason=given.pop("finish_reason", "stop"), score=score, **given)


@pytest.fixture
def tree() -> SearchTree:
    """Two first steps: one leads to 1, 1 (drawn twice) and 0; the other to 0, and to 0.5 in a rollout."""
    good = grown(
        Node((1,), "a\n", value=0.7), end("#1", 1.0), end("#2", 1.0, multiplicity=2), end("#3", 0.0, chosen=True)
    )
    open_ = grown(Node((3,), "x\n", value=0.4), rollouts=(end("y\n#5", 0.5),))
    bad = grown(Node((2,), "b\n", value=0.9), end("#4", 0.0), open_)
    unknown, cut = Node((4,), "c\n"), end("d", 0.1, finish_reason="length")
    good.chosen = True
    return SearchTree(grown(Node(), good, bad, unknown, cut), "1+1=?")


def test_values_are_means_and_maxima_of_what_was_drawn_below(tree: SearchTree) -> None:
    good, bad, unknown, cut = tree.root.children
    means, bests = node_values(tree), node_values(tree, "best")
    assert (means[good], bests[good]) == (3 / 4, 1.0)
    assert (means[bad], bests[bad]) == (0.25, 0.5)
    assert means[cut] == 0.1
    assert unknown not in means
    assert means[tree.root] == pytest.approx((3 + 0.5 + 0.1) / 7)
    assert node_values(tree, "search") == {good: 0.7, bad: 0.9, bad.children[1]: 0.4}


def test_pairs_are_of_siblings_and_whole(tree: SearchTree) -> None:
    rows = collect_pairs(tree, columns={"answer": "2"})
    assert rows == [
        # Cut off, the last step is in no pair.
        {"prompt": "1+1=?", "answer": "2", "chosen": "a\n#1", "rejected": "b\n#4", "margin": 0.5},
        {"prompt": "1+1=?", "answer": "2", "chosen": "a\n#1", "rejected": "a\n#3", "margin": 1.0},
        {"prompt": "1+1=?", "answer": "2", "chosen": "b\nx\ny\n#5", "rejected": "b\n#4", "margin": 0.5},
    ]
    assert [row["margin"] for row in collect_pairs(tree, margin=0.5)] == [1.0]
    # By the search's values the second step is better: of its best and the other's worst solution a pair is made.
    assert collect_pairs(tree, estimate="search")[0]["chosen"] == "b\nx\ny\n#5"
    assert collect_pairs(tree, prompt=[{"role": "user", "content": "?"}], stop=["5"])[2]["chosen"] == "b\nx\ny\n#"


def test_steps_are_labelled_with_values(tree: SearchTree) -> None:
    rows = collect_steps(tree)
    assert [(row["completions"], row["labels"]) for row in rows] == [
        (["a", "#1"], [0.75, 1.0]),
        (["a", "#2"], [0.75, 1.0]),
        (["a", "#3"], [0.75, 0.0]),
        (["b", "#4"], [0.25, 0.0]),
        (["b", "x"], [0.25, 0.5]),
    ]
    assert collect_steps(tree, estimate="best")[3]["labels"] == [0.5, 0.0]


def test_steps_that_a_limit_cut_are_joined_and_prefixes_left_out() -> None:
    line = grown(Node((1,), "1+"), grown(Node((2,), "1=2\n"), end("#2", 1.0)))
    shorter = grown(Node((3,), "1+1=2\n"), end("", 0.0))  # nothing but the end of the sequence
    rows = collect_steps(SearchTree(grown(Node(), line, shorter), "?"))
    assert [(row["completions"], row["labels"]) for row in rows] == [(["1+1=2", "#2"], [1.0, 1.0])]


def test_values_outside_of_labels_are_refused(tree: SearchTree) -> None:
    tree.root.children[0].children[0].score = 3.0
    with pytest.raises(ValueError, match=r"^a step has the value \d.*, and labels are in \[0, 1\]: search with"):
        collect_steps(tree)


def test_the_chosen_solution_is_a_demonstration(tree: SearchTree) -> None:
    assert collect_demonstrations(tree) == [{"prompt": "1+1=?", "completion": "a\n#3"}]
    assert collect_demonstrations(tree, least=0.5) == []
    with pytest.raises(ValueError, match="estimate is 'worst'; it must be one of mean, best, search"):
        node_values(tree, "worst")  # type: ignore[arg-type]


def test_rows_of_a_search_load_in_the_datamodules(tmp_path: Path) -> None:
    table = random_table(3, 3)
    judge = Judge(lambda text: float(min(step_scores(table)(text), default=1.0) > 0.4))
    strategy = MCTS(ToyEngine(table), scorer=judge, simulations=30, actions=3)
    results = strategy.search([PROMPT] * 4, seeds=list(range(4)))
    model = str(save_tiny_model(tmp_path / "model"))
    for collect, kind in (
        (collect_pairs, PreferenceDataModule),
        (collect_steps, StepwiseDataModule),
        (collect_demonstrations, SFTDataModule),
    ):
        rows = [row for result in results for row in collect(result.tree, columns={"answer": "7"})]
        assert rows
        file = tmp_path / f"{collect.__name__}.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        data = kind(train=str(file), tokenizer=model, global_batch_size=1000, shuffle=False)
        data.prepare_data()
        data.setup("fit")
        (batch,) = data.train_dataloader()
        assert len(batch.examples) == len(rows)
        tokenizer = char_tokenizer()
        for row, example in zip(rows, batch.examples, strict=True):
            texts = [tokenizer.decode(child.tokens, skip_special_tokens=True) for child in example.root.children]
            if collect is collect_pairs:
                assert texts == [row["chosen"], row["rejected"]]
                assert example.fields["margin"] == row["margin"] > 0
            elif collect is collect_steps:
                assert texts == ["".join(f"{step}\n" for step in row["completions"])]
                assert example.fields["labels"] == row["labels"]
            else:
                assert texts == [row["completion"]]
            assert example.fields["answer"] == "7"
