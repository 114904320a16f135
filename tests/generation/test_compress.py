"""``rlhf-lightning compress``: its rows against engines called by hand, and what it refuses."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from rlhf_lightning.cli import main
from rlhf_lightning.generation.compress import CompressOptions, compress_rows
from rlhf_lightning.inference import LocalEngine, SamplingParams
from rlhf_lightning.inference.specs import build_compressor, compressor_spec
from rlhf_lightning.models import load_tokenizer

from ..helpers import char_tokenizer, tiny_model
from ..test_cli import refused

ROWS = [
    {"context": f"a={n}; b={n + 1}; c=7; d={n * n}.", "prompt": f"{key}?", "answer": str(n), "index": f"row {n}"}
    for n, key in enumerate("abcdabc")
]
GREEDY = SamplingParams(max_new_tokens=6, temperature=0.0)
VERIFIER = f"{__name__}.first_is_even"


def first_is_even(prompts: list[str], completions: list[str], answer: list[str], **columns: Any) -> list[float]:
    """Right are completions that begin with an even letter: about half of what a random model writes."""
    assert set(columns) == {"context", "index"}
    return [float(bool(text) and ord(text[0]) % 2 == 0) for text in completions]


@pytest.fixture
def model(tiny_model_folder: Callable[[str], Path]) -> str:
    return str(tiny_model_folder("llama"))


@pytest.fixture
def rows(tmp_path: Path) -> str:
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return str(file)


def rows_of(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_answers_are_those_to_the_last_tokens_and_the_prompt(model, rows, tmp_path, capsys):
    output = tmp_path / "new" / "out.jsonl"
    further = ["--compressor=truncation", "--compressor.ratio=4", "--rows_at_once=3", "--sampling.max_new_tokens=6"]
    greedy = ["--sampling.temperature=0", f"--verifier={VERIFIER}"]
    main(["compress", f"--model={model}", f"--input={rows}", f"--output={output}", *further, *greedy])
    found = rows_of(output)
    engine, tokenizer = LocalEngine.from_pretrained(model), load_tokenizer(model)
    texts = []
    for number, (row, given) in enumerate(zip(found, ROWS, strict=True)):
        tokens, asked = tokenizer(given["context"])["input_ids"], tokenizer(given["prompt"])["input_ids"]
        kept = -(-len(tokens) // 4)
        [[expected]] = engine.generate([[*tokens[-kept:], *asked]], 1, GREEDY)
        texts.append(expected.text)
        # 2 layers of keys and values, 2 heads of 8 numbers, 4 bytes each.
        entries = {"context_tokens": len(tokens), "entries": kept, "bytes": kept * 2 * 2 * 2 * 8 * 4}
        assert row == given | entries | {
            "index": number,
            "given_index": given["index"],
            "completion": expected.text,
            "finish_reason": expected.finish_reason,
            "completion_tokens": len(expected.token_ids),
            "reward": float(bool(expected.text) and ord(expected.text[0]) % 2 == 0),
        }
    assert len(set(texts)) > 2
    said = capsys.readouterr().err.splitlines()[-1]
    mean = sum(row["reward"] for row in found) / 7
    assert said.startswith(f"7 rows: {sum(row['context_tokens'] for row in found)} tokens of contexts as ")
    assert said.endswith(f"accuracy {mean:.1%}")


def test_rows_are_printed_without_an_output(model, rows, capsys):
    main(["compress", f"--model={model}", f"--input={rows}", "--compressor=sink_window", "--limit=2"])
    printed = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["index"] for row in printed] == [0, 1]
    assert all("reward" not in row for row in printed)


def right_if_known(prompts: list[str], completions: list[str], answer: list[str]) -> list[float]:
    return [float(int(text) + 1) for text in answer]


def test_a_verifier_gets_the_columns_that_it_takes(model, rows):
    found: list[dict[str, Any]] = []
    options = CompressOptions(
        model=model,
        compressor="truncation",
        input=rows,
        sampling=GREEDY,
        verifier=f"{__name__}.right_if_known",
        limit=2,
    )
    assert compress_rows(options, found.append)["accuracy"] == 1.5
    assert [row["reward"] for row in found] == [1.0, 2.0]


def test_a_context_that_is_kept_whole_is_the_plain_prompt(model, rows):
    found: list[dict[str, Any]] = []
    options = CompressOptions(
        model=model,
        compressor={"class_path": "attention_eviction", "init_args": {"ratio": 1}},
        input=rows,
        sampling=GREEDY,
    )
    summary = compress_rows(options, found.append)
    plain = LocalEngine.from_pretrained(model).generate([row["context"] + row["prompt"] for row in ROWS], 1, GREEDY)
    assert [row["completion"] for row in found] == [group[0].text for group in plain]
    assert summary["ratio"] == 1.0
    assert "accuracy" not in summary


def test_stage_of_a_pipeline(model, rows, tmp_path):
    stage = {
        "kind": "compress",
        "model": model,
        "compressor": {"class_path": "Truncation", "init_args": {"ratio": 2}},
        "input": rows,
        "verifier": VERIFIER,
        "sampling": {"max_new_tokens": 4, "temperature": 0.0},
    }
    file = tmp_path / "pipeline.yaml"
    written = {"run_dir": str(tmp_path / "run"), "stages": {"short": stage}}
    file.write_text(yaml.safe_dump(written))
    main(["pipeline", "--config", str(file)])
    record = json.loads((tmp_path / "run/manifest.json").read_text())["stages"]["short"]
    found = rows_of(tmp_path / "run/short/compressed.jsonl")
    assert record["metrics"]["rows"] == len(found) == 7
    assert record["metrics"]["accuracy"] == pytest.approx(sum(row["reward"] for row in found) / 7)
    assert set(record["inputs"]) >= {model, rows}
    accuracy = f"accuracy {record['metrics']['accuracy']:.1%}"
    page = (tmp_path / "run/report.html").read_text()
    assert f"7 contexts, {record['metrics']['ratio']:.3g} tokens per entry that is kept, {accuracy}" in page

    # Unchanged it is not run again; with other rows it is.
    main(["pipeline", "--config", str(file)])
    assert not json.loads((tmp_path / "run/manifest.json").read_text())["stages"]["short"]["ran"]
    Path(rows).write_text("".join(json.dumps(row) + "\n" for row in ROWS[:3]))
    main(["pipeline", "--config", str(file)])
    assert len(rows_of(tmp_path / "run/short/compressed.jsonl")) == 3


def test_names_of_compressors():
    assert compressor_spec("sink-window", {"sinks": 2}) == {"class_path": "SinkWindow", "init_args": {"sinks": 2}}
    assert compressor_spec("attention")["class_path"] == "AttentionEviction"
    assert compressor_spec("runs/compressor")["init_args"] == {"compressor": "runs/compressor"}
    assert build_compressor({"class_path": "text_summary"}, tiny_model("llama"), char_tokenizer()).ratio == 4


@pytest.mark.parametrize(
    ("further", "message"),
    [
        (["--compressor=trunkation"], "there is no compressor 'trunkation'; did you mean 'truncation'?"),
        (["--compressor=mcts"], "there is no compressor 'mcts'"),
        (
            ["--compressor=truncation", "--compressor.sinks=4"],
            "compress: compressor Truncation has no option 'sinks': it has ratio",
        ),
        (["--compressor=truncation", "--compressor.ratio=0"], "ratio is 0; it must be a whole number of at least 1"),
        (
            ["--compressor=runs/c", "--compressor.ratio=8"],
            "a learned compressor has its own options: leave out 'ratio'",
        ),
        (
            ["--compressor=truncation", "--columns.context=document"],
            "no column 'document' for columns={'context': 'document'}",
        ),
        (["--compressor=truncation", "--limit=0"], "limit is 0; it must be a whole number of at least 1"),
        (["--compressor=truncation", "--sampling.seed=1"], "sampling.seed is 1: write seed"),
        (["--compressor=truncation", "--columns={prompt: number, old: prompt}"], "prompt is 5; it must be a text"),
    ],
)
def test_errors(model, tmp_path, capsys, further, message):
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps({"context": "a=1", "prompt": "a?", "number": 5}) + "\n")
    output = tmp_path / "out.jsonl"
    given = ["compress", f"--model={model}", f"--input={file}", f"--output={output}"]
    assert message in refused(capsys, *given, *further)[1]
    assert not output.exists()


def test_an_output_that_exists_stays(model, rows, tmp_path, capsys):
    output = tmp_path / "out.jsonl"
    output.write_text("mine")
    given = ["compress", f"--model={model}", f"--input={rows}", f"--output={output}", "--compressor=truncation"]
    assert f"output {str(output)!r} already exists: remove it, or write to another file" in refused(capsys, *given)[1]
    assert output.read_text() == "mine"
