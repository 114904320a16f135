"""Verdicts, pairs that are split, and partners."""

from __future__ import annotations

from hashlib import blake2b
from typing import Any

import numpy as np
import pytest

from rlhf_lightning.datamodules import UnpairedDataModule
from rlhf_lightning.datamodules.unpaired import mismatch
from rlhf_lightning.sequences.example import Example, Segment

from .toys import chars, ids

ROWS = [{"prompt": f"{i // 2}=", "completion": str(i), "label": i % 2 == 0} for i in range(6)]


def example(number: int, prompt: int, length: int = 1) -> Example:
    child = Segment(np.full(length, 100 + number), np.ones(length))
    return Example(f"rows:{number}", Segment(np.array([prompt]), None, (child,)))


def test_rows() -> None:
    [made] = UnpairedDataModule(tokenizer=chars()).make_examples("rows:1", ROWS[1])
    assert made.fields == {"label": False}
    assert made.root.tokens.tolist() == ids("0=")
    assert [child.tokens.tolist() for child in made.root.children] == [ids("1~")]


def test_pairs_are_split() -> None:
    pair = {"prompt": "1=", "chosen": "1", "rejected": "2", "id": 7}
    data = UnpairedDataModule(train=[pair], tokenizer=chars(), shuffle=False, partners=False)
    [batch] = data.train_dataloader()
    assert [item.row_id for item in batch] == ["memory:1/chosen", "memory:1/rejected"]
    assert [item.fields for item in batch] == [{"id": 7, "label": True}, {"id": 7, "label": False}]
    assert [item.root.children[0].tokens.tolist() for item in batch] == [ids("1~"), ids("2~")]
    assert data.report["train"]["rows"] == 1
    assert data.report["train"]["examples"] == 2


def expected_partners(examples: list[Example], seed: int) -> dict[str, str | None]:
    """A plain reading of the rule: around the circle of hashes, the next one with another prompt."""
    circle = sorted(examples, key=lambda e: blake2b(f"{seed}/{e.row_id}".encode(), digest_size=16).digest())
    partners: dict[str, str | None] = {}
    for place, one in enumerate(circle):
        others = [*circle[place + 1 :], *circle[:place]]
        fitting = [other.row_id for other in others if other.root.tokens.tolist() != one.root.tokens.tolist()]
        partners[one.row_id] = fitting[0] if fitting else None
    return partners


@pytest.mark.parametrize("seed", [0, 1])
def test_partners_are_those_of_the_circle_whatever_the_order(seed: int) -> None:
    examples = [example(number, prompt=number // 3) for number in range(9)]
    partners = expected_partners(examples, seed)
    assert None not in partners.values()
    for batch in (examples, examples[::-1], examples[4:] + examples[:4]):
        coupled = mismatch(batch, seed=seed)
        assert [one.row_id for one in coupled] == [one.row_id for one in batch]
        assert {one.row_id: one.fields["partner"] for one in coupled} == partners
        for one in coupled:
            number = int(partners[one.row_id].rpartition(":")[2])  # type: ignore[union-attr]
            assert [child.tokens[0] for child in one.root.children] == [100 + int(one.row_id[5:]), 100 + number]


def test_where_all_prompts_are_equal_there_is_no_partner() -> None:
    examples = [example(number, prompt=1) for number in range(3)]
    assert mismatch(examples) == examples
    assert mismatch(examples[:1]) == examples[:1]
    assert mismatch([]) == []


def test_a_partner_that_is_too_long_is_passed_over() -> None:
    examples = [example(number, prompt=number, length=5 if number == 2 else 1) for number in range(4)]
    coupled = mismatch(examples, max_length=4)
    assert "rows:2" not in [one.fields["partner"] for one in coupled]
    assert {len(one.root.children) for one in coupled} == {2}


def test_in_evaluation_partners_do_not_depend_on_the_batch_size() -> None:
    partners = []
    for size in (1, 2, 6):
        data = UnpairedDataModule(val=ROWS, tokenizer=chars(), eval_batch_size=size, seed=2)
        examples = [example for batch in data.val_dataloader() for example in batch]
        assert [len(batch) for batch in data.val_dataloader()] == [size] * (6 // size)
        partners.append([(one.row_id, one.fields["partner"], one.content_hash()) for one in examples])
    assert partners[0] == partners[1] == partners[2]
    prompts = [data.make_examples(f"memory:{i}", row)[0] for i, row in enumerate(ROWS, start=1)]
    assert {row_id: partner for row_id, partner, _ in partners[0]} == expected_partners(prompts, 2)


def test_ranks_give_the_partners_that_one_gives() -> None:
    def batches(rank: int, world_size: int) -> list[list[tuple[str, Any]]]:
        from .test_base import attached, trainer

        data = UnpairedDataModule(train=ROWS, tokenizer=chars(), global_batch_size=4, seed=2)
        loader = attached(data, trainer(rank, world_size)).train_dataloader()
        return [[(one.row_id, one.fields.get("partner")) for one in batch] for batch in loader]

    whole = batches(0, 1)
    assert all(partner for _, partner in whole[0])
    for rank in range(2):
        assert batches(rank, 2) == [batch[rank::2] for batch in whole]
