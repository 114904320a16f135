"""Labels of one model, of all prompts that fit; a damaged file is named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from rlhf_lightning.inference import LocalEngine, SamplingParams
from rlhf_lightning.labeling import command
from rlhf_lightning.labeling.command import LabelOptions, label_prompts
from rlhf_lightning.labeling.step_labels import label_steps as label_rows
from rlhf_lightning.pipeline.manifest import Manifest
from rlhf_lightning.utils.files import json_line

from ..helpers import char_tokenizer, tiny_model
from ..inference.served import completion, serve
from ..labeling.test_command import LONG, PROBLEMS, Scripted, rows_of

TOKENIZER = char_tokenizer()


@pytest.fixture
def label(tmp_path: Path, tiny_model_folder: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Labels steps of problems, two prompts at once, with a scripted engine or a server."""
    monkeypatch.setattr(command, "_PROMPTS_AT_ONCE", 2)
    folder = str(tiny_model_folder())

    def run(problems: list[dict[str, Any]], engine: Any = None, url: str | None = None) -> list[dict[str, Any]]:
        source, output = tmp_path / "problems.jsonl", tmp_path / "steps.jsonl"
        source.write_text("".join(json.dumps(row) + "\n" for row in problems))
        if engine is not None:
            monkeypatch.setattr(command, "_engine", lambda options, tokenizer: engine)
        options = LabelOptions(
            str(source), str(output), None if url else folder, url, tokenizer=folder, num_solutions=2, num_completions=2
        )
        label_prompts(options, say=lambda line: None)
        return rows_of(output)

    return run


@pytest.mark.parametrize("shape", ["all of a part", "all of two parts", "all"])
def test_prompts_that_are_too_long_cost_themselves_alone(shape: str, label: Any) -> None:
    class Limited(Scripted):
        def longest_prompt(self, sampling: Any) -> int:
            return 127

        def generate(self, prompts: Any, *arguments: Any, seeds: Any = None, **named: Any) -> Any:
            # The checks of an engine of this process.
            return LocalEngine.generate(local, [], *arguments, seeds=seeds) if not prompts else super().generate(
                prompts, *arguments, seeds=seeds, **named
            )  # fmt: skip

    local = LocalEngine(tiny_model("qwen3"), TOKENIZER)
    long = [{"prompt": f"{LONG}+{n}=?", "answer": "0"} for n in range(4 if "two" in shape else 2)]
    if shape == "all":
        with pytest.raises(ValueError, match=r"no solution of 2 prompts could be labelled \(2 too long\)"):
            label(long, Limited())
        return
    rows = label([*PROBLEMS[:2], *long, *PROBLEMS[2:]], Limited())
    assert {row["prompt"] for row in rows} == {row["prompt"] for row in PROBLEMS}


def test_an_engine_takes_no_prompts_with_no_seeds() -> None:
    params = SamplingParams(max_new_tokens=1)
    assert LocalEngine(tiny_model("qwen3"), TOKENIZER).generate([], 3, params, seeds=[]) == []


def test_labels_of_two_models_are_not_mixed(label: Any) -> None:
    served_now: dict[str, Any] = {"id": "first", "root": "a"}

    def answer(path: str, body: Any, number: int) -> Any:
        if path == "/v1/models":
            return {"data": [{**served_now, "created": number}]}
        text = TOKENIZER.decode(body["prompt"])
        if text.startswith("2+") and served_now["id"] == "first" and served_now["root"] == "a" and stops:
            from ..inference.served import Answer

            return Answer(400, {"error": "no"})
        return completion("#3" if text.endswith("so\n") else "so\n#4")

    stops = True
    with serve(answer) as served:
        with pytest.raises(ValueError, match="refuses"):
            label(PROBLEMS, url=served.url)
        stops = False
        for changed in ({"id": "second", "root": "a"}, {"id": "first", "root": "b"}):
            served_now.update(changed)
            with pytest.raises(ValueError, match="was started with different served model: resume with the same"):
                label(PROBLEMS, url=served.url)
        served_now.update({"id": "first", "root": "a"})
        before = len(served.bodies)
        assert len(label(PROBLEMS, url=served.url)) >= 3
    assert not any(TOKENIZER.decode(body["prompt"]).startswith("0+") for body in served.bodies[before:])


def test_halves_of_characters_end_nothing(label: Any, tmp_path: Path) -> None:
    def answer(path: str, body: Any, number: int) -> Any:
        return {"data": [{"id": "m"}]} if path == "/v1/models" else completion("so\ud800\n#1")

    with serve(answer) as served:
        rows = label(PROBLEMS[:1], url=served.url)
    assert rows[0]["completions"] == ["so\N{REPLACEMENT CHARACTER}", "#1"]

    class Halves(Scripted):
        def sample(self, text: str, number: int) -> Any:
            found = super().sample(text, number)
            return type(found)([], found.text.replace("so", "\udc00"), [], found.finish_reason)

    (tmp_path / "steps.jsonl").unlink()
    rows = label(PROBLEMS[:1], Halves())
    assert rows[0]["completions"][0] == "\N{REPLACEMENT CHARACTER}"


def test_halves_of_characters_in_a_row_can_be_written() -> None:
    rows = [{"prompt": "1+1=?", "completions": ["\ud800", "#2"], "answer": "2", "note": "\udc00"}]
    found = next(label_rows(rows, Scripted(), TOKENIZER, lambda prompts, completions, **columns: [1.0] * len(prompts)))
    assert found["completions"] == ["\N{REPLACEMENT CHARACTER}", "#2"]
    line = json_line(found)
    assert json.loads(line.encode("utf-8")) == found


def _begun(label: Any, tmp_path: Path) -> Path:
    """A journal with two parts, of three."""
    with pytest.raises(KeyboardInterrupt):
        label(PROBLEMS, Scripted(fail_at=5))
    journal = tmp_path / ".steps.jsonl.journal"
    assert len(journal.read_bytes().splitlines()) == 3
    return journal


@pytest.mark.parametrize("tail", [b"", b"\0" * 4096, b"\0" * 99 + b"\n", b'{"prompts": 2, "ro', b"\0\0\n\0"])
def test_what_a_crash_leaves_at_the_end_is_done_again(tail: bytes, label: Any, tmp_path: Path) -> None:
    journal = _begun(label, tmp_path)
    journal.write_bytes(journal.read_bytes() + tail)
    engine = Scripted()
    rows = label(PROBLEMS, engine)
    assert {row["prompt"] for row in rows} == {row["prompt"] for row in PROBLEMS}
    assert {text[0] for text in engine.prompts} == {"4"}


@pytest.mark.parametrize(
    "damage", [lambda lines: [b"\0" * 9, *lines[1:]], lambda lines: [lines[0], b"[1]", lines[2]],
               lambda lines: [lines[0], b'{"prompts": 2}', lines[2]], lambda lines: [b"\xff\xfe", lines[1]],
               lambda lines: [b"[]", lines[1]], lambda lines: [lines[0], b"[" * 10**5, lines[2]]],
)  # fmt: skip
def test_a_damaged_journal_is_named_and_kept(damage: Any, label: Any, tmp_path: Path) -> None:
    journal = _begun(label, tmp_path)
    journal.write_bytes(b"\n".join(damage(journal.read_bytes().splitlines())) + b"\n")
    before = journal.read_bytes()
    with pytest.raises(
        ValueError, match=r"^line [12] of '.*/\.steps\.jsonl\.journal' is damaged .*: cut the file before"
    ):
        label(PROBLEMS, Scripted())
    assert journal.read_bytes() == before


@pytest.mark.parametrize(
    "content",
    [b"", b"\0" * 64, b"{", b"[]", b'{"stages": []}', b'{"stages": {"sft": 1}}', b"{}", b"\xff", b"[" * 10**5],
)
def test_a_damaged_record_of_a_run_is_named_and_kept(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "manifest.json"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"^the manifest '.*/manifest\.json' is damaged \(.*\): restore it, or delete"):
        Manifest(path)
    assert path.read_bytes() == content
