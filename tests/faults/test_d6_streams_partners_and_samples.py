"""Orders of streams, compressed files, seeds, KTO's partners, and what an interrupted sample stage keeps."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import random
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rlhf_lightning.data.loaders import epoch_draws, epoch_order
from rlhf_lightning.datamodules import StreamLoader, open_source
from rlhf_lightning.datamodules.unpaired import NextPartner, mismatch
from rlhf_lightning.evaluation.answers import Answer
from rlhf_lightning.pipeline import load_pipeline, row_files, run_pipeline, sample_stage
from rlhf_lightning.self_improvement import samples
from rlhf_lightning.sequences import Example, Segment

ROWS = [{"prompt": f"{number}", "completion": "x"} for number in range(7)]
WRITTEN = {
    ".jsonl": "".join(json.dumps(row) + "\n" for row in ROWS),
    ".json": json.dumps(ROWS),
    ".csv": "prompt,completion\n" + "".join(f"{row['prompt']},x\n" for row in ROWS),
    ".txt": "".join(f"{row['prompt']}\n" for row in ROWS),
}
PACKERS = {"": bytes, ".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress}


@pytest.mark.parametrize("change", [str.lower, str.upper, str.title])
@pytest.mark.parametrize("packer", PACKERS)
@pytest.mark.parametrize("kind", WRITTEN)
def test_suffixes_in_any_case_packed_in_any_way(kind: str, packer: str, change: Any, tmp_path: Path) -> None:
    name = "rows" + change(kind + packer)
    (tmp_path / name).write_bytes(PACKERS[packer](WRITTEN[kind].encode()))
    for source in (str(tmp_path / name), str(tmp_path)):  # a folder, too
        opened = open_source(source)
        held = [{"prompt": row["prompt"]} for row in ROWS] if kind == ".txt" else ROWS
        assert [row for _, row in opened] == held
        assert opened.num_rows == 7


@pytest.mark.parametrize("suffix", [".PARQUET", ".Arrow"])
def test_tables_in_upper_case(suffix: str, tmp_path: Path) -> None:
    table, path = pa.Table.from_pylist(ROWS), tmp_path / f"rows{suffix}"
    if suffix == ".PARQUET":
        pq.write_table(table, path)
    else:
        with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
            writer.write_table(table)
    assert [row for _, row in open_source(str(path))] == ROWS


@pytest.mark.parametrize("packer", [".gz", ".bz2", ".xz"])
def test_a_packed_file_that_breaks_off_is_named(packer: str, tmp_path: Path) -> None:
    whole = PACKERS[packer](WRITTEN[".jsonl"].encode() * 100)
    (tmp_path / f"rows.jsonl{packer}").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=rf"rows\.jsonl{packer}' is not a complete (gzip|bzip2|xz) file"):
        list(open_source(str(tmp_path / f"rows.jsonl{packer}")))


def test_no_two_seeds_and_epochs_draw_the_same() -> None:
    big = [0, 1, 2**32 - 1, 2**32, 2**32 + 1, 2**64, 2**64 + 1, 2**128, 2**128 + 5]
    drawn = [epoch_draws(seed, epoch).random(4).tobytes() for seed in big for epoch in range(4)]
    assert len(set(drawn)) == len(drawn)
    assert epoch_order(50, 2**32, 0).tolist() != epoch_order(50, 0, 1).tolist()
    # Orders that seeds of everyday size had stay as they were.
    expected = np.random.Generator(np.random.PCG64(np.random.SeedSequence([7, 3]))).permutation(50)
    assert epoch_order(50, 7, 3).tolist() == expected.tolist()


def stream(source: Any, buffer: int = 4, seed: int = 0, **options: Any) -> StreamLoader:
    def make(row_id: str, stored: Any) -> list[Example]:
        return [Example(row_id, Segment([int(opened.parse(stored)["prompt"]) + 1]))]

    opened = open_source(source, **options)
    return StreamLoader(opened, make, 5, shuffle_buffer=buffer, seed=seed)


def epoch_of(loader: StreamLoader) -> list[tuple[str, int]]:
    return [(e.row_id, int(e.root.tokens[0]) - 1) for batch in loader for e in batch]


@pytest.fixture
def parts(tmp_path: Path) -> dict[str, Any]:
    """The numbers to 399 in ten files, and in one Parquet file of ten row groups."""
    rows = [{"prompt": str(number)} for number in range(400)]
    files = []
    for part in range(10):
        files.append(tmp_path / f"files/part-{part}.jsonl")
        files[-1].parent.mkdir(exist_ok=True)
        files[-1].write_text("".join(json.dumps(row) + "\n" for row in rows[part * 40 : part * 40 + 40]))
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "groups.parquet", row_group_size=40)
    return {
        "folder": str(tmp_path / "files"),
        "list": [str(file) for file in files],
        "parquet": str(tmp_path / "groups.parquet"),
        "list of parquet": [str(tmp_path / "groups.parquet")],
    }


@pytest.mark.parametrize("kind", ["folder", "list", "parquet", "list of parquet"])
def test_a_stream_of_parts_is_shuffled_over_all_of_them(kind: str, parts: dict[str, Any]) -> None:
    plain = dict(open_source(parts[kind]))
    loader = stream(parts[kind])
    epochs = [epoch_of(loader) for _ in range(3)]
    for rows in epochs:
        assert sorted(number for _, number in rows) == list(range(400))
        # A row keeps its name, in whatever order it comes.
        assert all(plain[row_id]["prompt"] == str(number) for row_id, number in rows)
        order = [number for _, number in rows]
        assert abs(np.corrcoef(order, range(400))[0, 1]) < 0.9  # the buffer alone: above 0.99
    assert len({tuple(rows) for rows in epochs}) == 3
    assert epochs[0] == epoch_of(stream(parts[kind]))
    assert epochs[0] != epoch_of(stream(parts[kind], seed=1))
    assert [number for _, number in epoch_of(stream(parts[kind], buffer=0))] == list(range(400))


@pytest.mark.parametrize("kind", ["folder", "parquet"])
def test_a_stream_of_parts_resumes(kind: str, parts: dict[str, Any]) -> None:
    whole = epoch_of(stream(parts[kind]))
    first = stream(parts[kind])
    seen = [e.row_id for batch, _ in zip(first, range(30), strict=False) for e in batch]
    second = stream(parts[kind])
    second.load_state_dict(first.state_dict())
    rest = [row_id for row_id, _ in epoch_of(second)]
    assert [row_id for row_id, _ in whole] == seen[: 400 - len(rest)] + rest


def test_columns_transforms_and_doubled_files_keep_their_rows(parts: dict[str, Any]) -> None:
    source = open_source([*parts["list"][:3], parts["list"][0]], columns={"question": "prompt"})
    rows = {row_id: source.parse(stored) for row_id, stored in source.shuffled(np.random.default_rng(0))}
    assert rows == dict(source)
    assert len(rows) == 160


# Partners for KTO's estimate.


def naive(place: int, prompts: list[int], lengths: list[int], room: float) -> int | None:
    """The next place round the circle, tried one by one."""
    steps = ((place + step) % len(prompts) for step in range(1, len(prompts)))
    return next((other for other in steps if prompts[other] != prompts[place] and lengths[other] <= room), None)


def test_the_next_partner_is_that_of_a_search_one_by_one() -> None:
    draw = random.Random(0)
    for _ in range(300):
        count = draw.randint(1, 12)
        prompts = [draw.randrange(draw.randint(1, 5)) for _ in range(count)]
        lengths = [draw.randint(1, 6) for _ in range(count)]
        search = NextPartner(prompts, lengths)
        for place in range(count):
            for room in (0, 3, 6, float("inf")):
                assert search(place, room) == naive(place, prompts, lengths, room), (prompts, lengths, place, room)


@pytest.mark.parametrize("fits", [True, False])
def test_partners_of_a_whole_split_take_no_quadratic_time(fits: bool) -> None:
    def example(number: int, prompt: int) -> Example:
        return Example(f"rows:{number}", Segment([prompt], children=(Segment([1] * 3, [1.0] * 3),)))

    # All but one have the same prompt; or nothing is short enough.
    examples = [example(number, 0 if fits and number else number + 1) for number in range(10_000)]
    started = time.process_time()
    coupled = mismatch(examples, max_length=None if fits else 3)
    assert time.process_time() - started < 5.0  # one by one: minutes
    assert sum("partner" in e.fields for e in coupled) == (10_000 if fits else 0)


# The sample stage.


def test_an_interrupted_sample_stage_continues(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(row_files, "PROMPTS_AT_ONCE", 8)
    monkeypatch.setattr(sample_stage, "stage_policy", lambda model, dtype: (None, tokenizer))
    from .. import helpers

    tokenizer = helpers.char_tokenizer()
    asked: list[str] = []
    stop_at = [20]

    def answer(engine: Any, examples: Any, verifier: Any, *, seeds: Any, **options: Any) -> list[list[Any]]:
        groups = []
        for example, own in zip(examples, seeds, strict=True):
            asked.append(example.row_id)
            if len(asked) == stop_at[0]:
                raise KeyboardInterrupt
            texts = [f"{seed % 97}" for seed in own]
            completions = [sampling_completion(text) for text in texts]
            groups.append([Answer(example, c, float(n)) for n, c in enumerate(completions)])
        return groups

    monkeypatch.setattr(samples, "answer_prompts", answer)
    stage = {"kind": "sample", "model": "m", "prompts": "sums:prompts?rows=30", "num_samples": 2}

    def run(folder: str) -> list[dict[str, Any]]:
        content = {"run_dir": str(tmp_path / folder), "stages": {"s": stage}}
        (tmp_path / f"{folder}.yaml").write_text(json.dumps(content))
        run_pipeline(load_pipeline(tmp_path / f"{folder}.yaml"), lambda line: None)
        return [json.loads(line) for line in (tmp_path / folder / "s/pairs.jsonl").read_text().splitlines()]

    with pytest.raises(KeyboardInterrupt):
        run("cut")
    kept = tmp_path / "cut/s/sampled.jsonl"
    assert len(kept.read_text().splitlines()) == 2
    with kept.open("a") as file:
        file.write('{"pairs": [')  # the line that was being written
    asked.clear()
    stop_at[0] = 0
    resumed = run("cut")
    assert len(asked) == 30 - 16
    assert not kept.exists()
    assert resumed == run("whole")
    assert len(resumed) == 30
    # Another configuration starts again.
    stop_at[0] = len(asked) + 10
    stage["num_samples"] = 3
    with pytest.raises(KeyboardInterrupt):
        run("cut")
    stage["num_samples"] = 2
    stop_at[0] = 0
    asked.clear()
    assert run("cut") == resumed
    assert len(asked) == 30


def sampling_completion(text: str) -> Any:
    from rlhf_lightning.inference import Completion

    return Completion(token_ids=[5], logprobs=[0.0], text=text, finish_reason="stop")
