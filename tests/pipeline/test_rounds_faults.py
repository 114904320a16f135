"""Rounds in which nothing is right, the verifier raises or the judge answers nonsense, as a user starts them."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

from rlhf_lightning.cli import main
from rlhf_lightning.utils.files import content_hash

from .rounds_files import contents, first_is_even, write_rounds

# Rounds in which something fails.
BROKEN: set[int] = set()


class Verifier:
    """Right if the first character is even; nothing is right, or it raises, in some rounds."""

    def __init__(self, round: int, fails: str) -> None:
        self.round, self.fails = round, fails

    def __call__(self, prompts: list[str], completions: list[str], **columns: Any) -> list[float]:
        if self.round not in BROKEN:
            return first_is_even(prompts, completions)
        if self.fails == "raises":
            raise ConnectionError("no connection")
        return [0.0] * len(completions)


class Babbling:
    """An engine that says whether a text begins with an even character, or nonsense in some rounds."""

    def __init__(self, round: int) -> None:
        self.round = round

    def generate(self, prompts: Sequence[str], num_samples: int = 1, sampling: Any = None) -> list[list[Any]]:
        found = ["yes" if first_is_even([""], [text])[0] else "no" for text in prompts]
        if self.round in BROKEN:
            found = ["banana" for _ in prompts]
        return [[SimpleNamespace(text=text)] * num_samples for text in found]


def judged(cls: str) -> dict[str, Any]:
    judge = {"class_path": f"{__name__}.Babbling", "init_args": {"round": "${round.number}"}}
    given: dict[str, Any] = {"question": "{completion}{prompt}{statement}"}
    if cls == "ConstitutionReward":
        given |= {"principles": [{"name": "even", "statement": "It is even."}], "judge": judge}
    else:
        given |= {"aspects": {"even": "It is even."}, "judges": {"one": judge}}
    return {"class_path": f"rlhf_lightning.rewards.{cls}", "init_args": given}


def verifier(fails: str) -> dict[str, Any]:
    return {"class_path": f"{__name__}.Verifier", "init_args": {"round": "${round.number}", "fails": fails}}


@pytest.fixture(autouse=True)
def _nothing_is_broken() -> Any:
    BROKEN.clear()
    yield
    BROKEN.clear()


def started(written: dict[str, Any], tmp_path: Path) -> list[dict[str, Any]]:
    """Runs a pipeline; returns the record of its rounds."""
    file = tmp_path / "pipeline.yaml"
    file.write_text(yaml.safe_dump(written, sort_keys=False))
    main(["pipeline", "--config", str(file)])
    record = Path(written["run_dir"]) / "loop/rounds.jsonl"
    return [json.loads(line) for line in record.read_text().splitlines()]


def rounds_of(model: Path, tmp_path: Path, scored_by: dict[str, Any]) -> dict[str, Any]:
    written = write_rounds(str(model), tmp_path)
    written["stages"]["loop"]["body"]["own"]["verifier"] = scored_by
    return written


def test_rounds_in_which_nothing_is_right_end_with_their_start(tiny_model_folder, tmp_path):
    written = rounds_of(tiny_model_folder(), tmp_path, verifier("is never right"))
    loop = written["stages"]["loop"]
    loop |= {"rounds": 3, "criteria": loop["criteria"] | {"patience": 2}}
    BROKEN.update((1, 2, 3))
    records = started(written, tmp_path)
    assert [record["verdict"] for record in records] == ["reject", "stop"]
    start = content_hash(Path(loop["model"]))
    assert {record["start"] for record in records} == {start}
    folder = tmp_path / "run/loop"
    for file in Path(loop["model"]).iterdir():
        assert (folder / "model" / file.name).read_bytes() == file.read_bytes()
    for number, record in enumerate(records, start=1):
        assert record["reason"] == (
            "stage 'own': no prompt gave a row of kind 'demonstrations' (mean reward 0.00): raise num_samples or "
            "sampling.temperature, change what is kept, or sample from another model"
        )
        assert not list((folder / f"rounds/{number}").rglob("demonstrations.jsonl"))
        assert not (folder / f"rounds/{number}/train/model").exists()
    manifest = json.loads((tmp_path / "run/manifest.json").read_text())["stages"]["loop"]
    assert manifest["metrics"] == {"rounds": 2.0, "accepted": 0.0}
    assert "no prompt gave a row" in (tmp_path / "run/report.html").read_text()

    # It is finished, and nothing runs again.
    started(written, tmp_path)
    assert not json.loads((tmp_path / "run/manifest.json").read_text())["stages"]["loop"]["ran"]


@pytest.mark.slow
def test_a_round_after_one_in_which_nothing_is_right_starts_where_that_one_did(tiny_model_folder, tmp_path):
    written = rounds_of(tiny_model_folder(), tmp_path, verifier("is never right"))
    BROKEN.add(1)
    first, second = started(written, tmp_path)
    assert first["verdict"] == "reject"
    assert second["start"] == first["start"] == content_hash(Path(written["stages"]["loop"]["model"]))
    assert second["model"] == content_hash(tmp_path / "run/loop/rounds/2/train/model")
    rows = (tmp_path / "run/loop/rounds/2/own/demonstrations.jsonl").read_text().splitlines()
    assert {json.loads(row)["provenance"].get("model", first["start"]) for row in rows} == {first["start"]}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("scored_by", "reason"),
    [
        (verifier("raises"), r"failed on all of 96 samples: .*no connection"),
        (
            judged("ConstitutionReward"),
            r"failed on all of 96 samples: .*'even': the judge wrote 'banana': neither yes nor no nor a number",
        ),
    ],
    ids=["verifier", "judge"],
)
def test_what_fails_in_the_second_round_ends_the_run_and_the_same_command_continues(
    tiny_model_folder, tmp_path, capsys, scored_by, reason
):
    written = rounds_of(tiny_model_folder(), tmp_path, scored_by)
    started(written, tmp_path)
    whole = contents(tmp_path / "run/loop")
    assert all(whole.values())

    written["run_dir"] = str(tmp_path / "broken")
    BROKEN.add(2)
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        started(written, tmp_path)
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert ended.value.code not in (0, None)
    assert re.search(rf"stage 'loop': stage 'own': .*{reason}", said), said
    folder = tmp_path / "broken/loop"
    assert (folder / "rounds.jsonl").read_text().splitlines() == (
        tmp_path / "run/loop/rounds.jsonl"
    ).read_text().splitlines()[:1]
    assert not list((folder / "rounds/2").rglob("demonstrations.jsonl"))
    assert not (folder / "model").exists()

    # After the repair, the loop continues as if it had never failed.
    BROKEN.clear()
    started(written, tmp_path)
    assert contents(folder) == whole


def test_a_panel_without_a_readable_verdict_rejects_the_round(tiny_model_folder, tmp_path):
    written = rounds_of(tiny_model_folder(), tmp_path, judged("JudgePanel"))
    written["stages"]["loop"]["rounds"] = 1
    BROKEN.add(1)
    (record,) = started(written, tmp_path)
    assert record["verdict"] == "reject"
    assert "(none of 96 samples has a score): raise num_samples" in record["reason"]


class Sometimes(Babbling):
    """Answers nonsense about texts that begin with the same characters."""

    def generate(self, prompts: Sequence[str], num_samples: int = 1, sampling: Any = None) -> list[list[Any]]:
        found = super().generate(prompts, num_samples, sampling)
        odd = [SimpleNamespace(text="banana")]
        return [odd if text and ord(text[0]) % 3 == 0 else one for text, one in zip(prompts, found, strict=True)]


def test_samples_that_the_judge_answered_nonsense_about_are_in_no_row(tiny_model_folder, tmp_path):
    spec = judged("ConstitutionReward")
    spec["init_args"]["judge"]["class_path"] = f"{__name__}.Sometimes"
    written = rounds_of(tiny_model_folder(), tmp_path, spec)
    loop = written["stages"]["loop"]
    loop["rounds"] = 1
    loop["body"]["own"] |= {"rows": ["samples", "demonstrations", "pairs"], "keep": None}
    del loop["body"]["own"]["seed_rows"], loop["body"]["own"]["seed_ratio"]
    started(written, tmp_path)
    place = tmp_path / "run/loop/rounds/1/own"
    samples, demonstrations, pairs = (
        [json.loads(line) for line in (place / f"{kind}.jsonl").read_text().splitlines()]
        for kind in ("samples", "demonstrations", "pairs")
    )
    expected = []
    for row in samples:
        text = row["completion"]
        # An empty text is judged by the first character of the prompt, which follows in the question.
        first = ord((text or row["prompt"])[0])
        expected.append(None if first % 3 == 0 else float(first % 2 == 0))
    assert [row["score"] for row in samples] == expected
    assert None in expected
    assert pairs
    assert all(ord(row[name][0]) % 3 for row in pairs for name in ("chosen", "rejected"))
    right = [row for row in samples if row["score"] == 1 and row["ended"] and row["completion"]]
    made, kept = ({(row["prompt"], row["completion"]) for row in rows} for rows in (demonstrations, right))
    assert made == kept
    assert made
