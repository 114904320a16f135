"""Anything at all in a data file: examples, or one line that says what is wrong; and loaders that lose nothing."""

from __future__ import annotations

import csv
import gzip
import io
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rlhf_lightning.data.sources import MemoryRows
from rlhf_lightning.datamodules import (
    ExampleDataModule,
    ExampleLoader,
    PreferenceDataModule,
    PromptDataModule,
    SFTDataModule,
    StepwiseDataModule,
    StreamLoader,
    UnpairedDataModule,
)
from rlhf_lightning.datamodules.unpaired import mismatch
from rlhf_lightning.sequences.example import Example, Segment

from .toys import UNMARKED, chars, complaint

CONTRACTS = [SFTDataModule, PreferenceDataModule, UnpairedDataModule, StepwiseDataModule, PromptDataModule]
TOKENIZER = chars(UNMARKED, opening=True)
bounded = settings(
    max_examples=40, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)

# The values of rows.

texts = st.text(st.characters(codec="utf-8"), max_size=8) | st.sampled_from(
    ["", " ", "4", "nan", "true", "\ud800", "~"]
)
numbers = st.integers() | st.integers(-(10**400), 10**400) | st.floats() | st.booleans()
roles = st.sampled_from(["user", "assistant", "system", "tool", "", 3, None])
messages = st.lists(
    st.fixed_dictionaries({"role": roles, "content": texts | st.none() | numbers}, optional={"tool_calls": st.none()})
    | st.fixed_dictionaries({"from": st.sampled_from(["human", "gpt", "nobody", 1]), "value": texts | st.none()})
    | st.just({}),
    max_size=3,
)
plain = st.none() | numbers | texts | messages
anything = st.recursive(
    plain, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=2), max_leaves=6
)
COLUMNS = ["prompt", "chosen", "rejected", "completion", "response", "label", "completions", "labels", "messages"]
COLUMNS += ["conversations", "text", "margin", "ratings", "instruction", "input", "output", "system", "tools"]
COLUMNS += ["chat_template_kwargs", "chosen_score", "rejected_score"]
likely = st.fixed_dictionaries(
    {},
    optional={
        "prompt": texts | messages,
        "chosen": texts | messages,
        "rejected": texts | messages,
        "completion": texts | messages,
        "label": st.booleans() | plain,
        "completions": st.lists(texts, max_size=3),
        "labels": st.lists(st.booleans() | plain, max_size=3),
        "messages": messages,
        "margin": numbers | plain,
    },
)
rows = likely | st.dictionaries(st.sampled_from(COLUMNS) | texts, anything, max_size=5)


def read(cls: type[ExampleDataModule], path: Path, **options: Any) -> None:
    """Reads a file with every policy; what goes wrong is one line that names the file."""
    for policy in ({}, {"on_bad_row": "skip", "max_length": 6, "on_too_long": "truncate_start"}):
        data = cls(train=str(path), tokenizer=TOKENIZER, global_batch_size=2, **policy, **options)
        try:
            examples = [example for batch in data.train_dataloader() for example in batch]
        except ValueError as error:
            said = str(error)
            assert said, "an error without a word"
            assert "\n" not in said, said
            assert "\r" not in said, said
            assert path.name in said, said
            said.encode()  # can be shown
        else:
            assert options.get("streaming") or examples
            assert all(len(part.tokens) for example in examples for path_ in example.root.paths() for part in path_)


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("cls", CONTRACTS)
@bounded
@given(content=st.lists(rows, min_size=1, max_size=3))
def test_any_rows(cls: type[ExampleDataModule], streaming: bool, tmp_path: Path, content: list[dict[str, Any]]) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in content))
    read(cls, path, streaming=streaming)


@pytest.mark.parametrize("cls", [SFTDataModule, PreferenceDataModule])
@bounded
@given(content=st.lists(st.lists(texts.filter(lambda t: t.isprintable()), max_size=4), min_size=1, max_size=4))
def test_any_table(cls: type[ExampleDataModule], tmp_path: Path, content: list[list[str]]) -> None:
    written = io.StringIO()
    csv.writer(written).writerows([["prompt", "chosen", "rejected"], *content])
    path = tmp_path / "rows.csv"
    path.write_bytes(written.getvalue().encode("utf-8", "surrogatepass"))
    read(cls, path)


GOOD = b'{"prompt": "1", "chosen": "2", "rejected": "3"}\n'
pieces = st.sampled_from(
    [GOOD, b"{", b"[", b"]", b'"', b",", b"\xff", b"\xef\xbb\xbf", b"\x00", b"\n", b"PAR1", b"1e999", b"NaN"]
)


@pytest.mark.parametrize(
    "name",
    ["rows.jsonl", "rows.json", "rows.csv", "rows.parquet", "rows.arrow", "rows.jsonl.gz", "rows.csv.gz", "rows.txt"],
)
@bounded
@given(content=st.lists(pieces | st.binary(max_size=6), max_size=5), packed=st.booleans(), cut=st.integers(0, 30))
def test_any_bytes(name: str, tmp_path: Path, content: list[bytes], packed: bool, cut: int) -> None:
    path = tmp_path / name
    whole = b"".join(content)
    if name.endswith(".gz") and packed:
        whole = gzip.compress(whole)
        whole = whole[: len(whole) - cut] if cut < 20 else whole
    path.write_bytes(whole)
    read(PreferenceDataModule, path)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "rows.jsonl",
            b'{"prompt": "", "completion": "\\ud83d"}',
            "character 1 of a text is '\\ud83d', half of a",
        ),
        ("rows.jsonl", b'{"a\\nb": 1}', "no column 'prompt' (found: a\\nb)"),
        ("rows.jsonl", b"[" * 100_000, "JSON with hundreds of lists in lists"),
        ("rows.jsonl.gz", gzip.compress(b'{"prompt": "1", "completion": "2"}\n' * 9)[:-9], "not a complete gzip file"),
        ("rows.csv.gz", b"plain", "is not a complete gzip file"),
        ("rows.arrow", b"\xff" * 9, "is not an Arrow file"),
    ],
    ids=["surrogate", "line end", "nested", "cut gzip", "no gzip", "no arrow"],
)
def test_what_was_found(name: str, content: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    said = complaint(SFTDataModule(train=str(path), tokenizer=TOKENIZER).setup, "fit")
    assert message in said
    assert name in said


# An epoch is every row once, whoever reads it and wherever it is taken up again.


def numbered(count: int) -> list[Example]:
    return [Example(f"rows:{n}", Segment([n % 5, 9], None, (Segment([n + 10], [1.0]),))) for n in range(count)]


def loader(kind: str, count: int, **options: Any) -> ExampleLoader | StreamLoader:
    """Loaders of the same rows: in memory, streamed, streamed with every third row dropped."""
    if kind == "memory":
        return ExampleLoader(numbered(count), shuffle=True, **options)

    def make(row_id: str, row: Any) -> list[Example]:
        number = int(row["n"])
        return [] if kind == "holes" and number % 3 == 0 else [numbered(count)[number]]

    source = MemoryRows("rows", [{"n": n} for n in range(count)], num_rows=count)
    return StreamLoader(source, make, shuffle_buffer=4, **options)


@pytest.mark.parametrize("kind", ["memory", "stream", "holes"])
@settings(bounded, max_examples=60)
@given(
    count=st.integers(1, 23),
    batch_size=st.integers(1, 6),
    worlds=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    stop=st.integers(0, 12),
    epoch=st.integers(0, 2),
    seed=st.integers(0, 3),
    coupled=st.booleans(),
)
def test_an_epoch_is_every_row_once(
    kind: str, count: int, batch_size: int, worlds: tuple[int, int], stop: int, epoch: int, seed: int, coupled: bool
) -> None:
    options: dict[str, Any] = {"batch_size": batch_size, "seed": seed, "couple": mismatch if coupled else None}
    expected = Counter(e.row_id for n, e in enumerate(numbered(count)) if kind != "holes" or n % 3)
    whole = loader(kind, count, **options)
    order = [[[e.content_hash() for e in batch] for batch in whole] for _ in range(epoch + 1)][-1]

    def shares(world: int, state: dict[str, Any] | None, batches: int | None) -> tuple[list[list[Example]], Any]:
        """Global batches as the ranks of a world see them together, and the position that they stop at."""
        ranks = [loader(kind, count, **options, rank=rank, world_size=world) for rank in range(world)]
        parts: list[list[list[Example]]] = []
        states = []
        for rank in ranks:
            rank.load_state_dict(state if state is not None else {**rank.state_dict(), "epoch": epoch})
            seen: list[list[Example]] = []
            for batch in rank:
                seen.append(list(batch))
                batch.mark_consumed()
                if len(seen) == batches:
                    break
            parts.append(seen)
            states.append(rank.state_dict())
        assert all(one == states[0] for one in states), "ranks agree on where they are"
        assert len({len(part) for part in parts}) == 1, "ranks make the same number of steps"
        together = []
        for split in zip(*parts, strict=True):
            longest = max(map(len, split))
            together.append([part[place] for place in range(longest) for part in split if place < len(part)])
        return together, states[0]

    first, second = worlds
    stop = min(stop, len(order) - 1)
    begun, position = shares(first, None, stop) if stop else ([], None)
    rest, end = shares(second, position, None)
    seen = [example for batch in begun + rest for example in batch]
    assert Counter(example.row_id for example in seen) == expected
    assert (end["epoch"], end["rows"]) == (epoch + 1, 0)
    if kind != "holes":  # a hole shifts whose turn a row of the batch is, not which batch it is in
        assert [[e.content_hash() for e in batch] for batch in begun + rest] == order
    else:
        found = [sorted(e.content_hash() for e in batch) for batch in begun + rest]
        assert found == [sorted(batch) for batch in order]
