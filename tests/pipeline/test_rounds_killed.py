"""Rounds that are killed at random moments: the same bytes as undisturbed ones, no row lost or repeated."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import signal
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import yaml

from rlhf_lightning.inference import derive_seed
from rlhf_lightning.utils.files import content_hash

from ..self_improvement.naive_replay import naive_replay
from . import rounds_worker
from .rounds_files import write_rounds

KILLS = int(os.environ.get("RLHF_LIGHTNING_KILLS", "10"))
ROUNDS, PROMPTS, SAMPLES, TRIAL = 3, 12, 8, 4


def killed_rounds(model: str, tmp_path: Path) -> dict[str, Any]:
    """Rounds with two stages that write rows, with replay: one of accepted rounds, one of all; and two that train."""
    written = write_rounds(model, tmp_path)
    loop = written["stages"]["loop"]
    own, train = loop["body"]["own"], loop["body"]["train"]
    play = own | {"kind": "self-play", "opponents": "${round.earlier}", "trial": TRIAL, "num_samples": 4}
    play |= {"replay": {"capacity": 9, "share": 1.0, "priority": "frontier", "rejected": True}}
    own = {name: value for name, value in own.items() if not name.startswith("seed_")}
    own |= {"rows": ["pairs", "samples"], "replay": {"share": 0.5}}
    pairs = {"class_path": "PreferenceDataModule", "init_args": {"train": "${outputs.own.pairs}"}}
    dpo = train | {"model": train["model"] | {"class_path": "DPOModule"}, "data": pairs}
    sft = json.loads(
        json.dumps(train).replace("${round.model}", "${outputs.dpo.model}").replace("outputs.own", "outputs.play")
    )
    loop |= {"rounds": ROUNDS, "body": {"own": own, "play": play, "dpo": dpo, "sft": sft}}
    return written


def contents(folder: Path) -> dict[str, str | None]:
    """Hashes of all rows, buffers, tables and models of a loop."""
    places = [path for stage in ("own", "play") for path in folder.glob(f"rounds/*/{stage}/*.jsonl")]
    places += [*folder.glob("rounds/*/*/model"), folder / "model", folder / "rounds.jsonl"]
    tables = folder.glob("rounds/*/play/league.json")  # with the folders of models
    return {str(place.relative_to(folder)): content_hash(place) for place in places} | {
        str(place.relative_to(folder)): place.read_text().replace(str(folder), "") for place in tables
    }


def lines(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def check_rows(folder: Path) -> None:
    """Each sample is there once, each row of samples once, and what comes back is what a naive computation draws."""
    records = lines(folder / "rounds.jsonl")
    accepted: dict[int, Any] = {}
    back = 0
    for number, record in enumerate(records, start=1):
        place, seed = folder / f"rounds/{number}", record["seed"]
        samples = lines(place / "own/samples.jsonl")
        found = [(row["prompt"], row["provenance"]["seed"]) for row in samples]
        assert found == [(f"{n}+{n}=?", derive_seed(seed, n, s)) for n in range(PROMPTS) for s in range(SAMPLES)]
        rows = lines(place / "own/pairs.jsonl")
        now = [row for row in rows if "round" not in row["provenance"]]
        solved = Counter((row["prompt"], row["score"]) for row in samples if row["ended"] and row["completion"])
        both = [f"{n}+{n}=?" for n in range(PROMPTS) if all(solved[f"{n}+{n}=?", score] for score in (0.0, 1.0))]
        assert [row["prompt"] for row in now] == both
        assert rows == [*now, *naive_replay(accepted, now, number=number, seed=seed, capacity=1000, share=0.5)]
        back += len(rows) - len(now)
        if record["verdict"] == "accept":
            accepted[number] = [(row, 1.0) for row in now]

        # Every player of the league has answered its prompts once.
        league = json.loads((place / "play/league.json").read_text())
        answers = lines(place / "play/samples.jsonl")
        keys = Counter((row["prompt"], row["provenance"]["seed"]) for row in answers)
        assert set(keys.values()) == {1}
        per_player = Counter(row["provenance"]["model"] for row in answers)
        expected = Counter({league["model"]: 4 * PROMPTS})
        for opponent in league["opponents"]:
            expected[opponent["model"]] += 4 * (TRIAL + opponent["prompts"])
        assert per_player == expected
    assert len(records) == ROUNDS
    assert back > 0 or not accepted.keys() - {ROUNDS}


@pytest.mark.slow
@pytest.mark.timeout(120 + 30 * KILLS)
def test_a_loop_that_is_killed_ends_with_the_same_bytes(tiny_model_folder, tmp_path):
    """At random moments, also while a file is written; ``RLHF_LIGHTNING_KILLS`` tells how often."""
    written = killed_rounds(str(tiny_model_folder()), tmp_path)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([rounds_worker.__name__])
    chance = random.Random(KILLS)

    def start(name: str) -> Any:
        written["run_dir"] = str(tmp_path / name)
        file = tmp_path / f"{name}.yaml"
        file.write_text(yaml.safe_dump(written, sort_keys=False))
        process = context.Process(target=rounds_worker.run, args=(str(file), str(tmp_path / f"{name}.log")))
        process.start()
        return process

    def finished(name: str) -> dict[str, str | None]:
        process = start(name)
        process.join()
        assert process.exitcode == 0, (tmp_path / f"{name}.log").read_text()
        return contents(tmp_path / name / "loop")

    finished("warm")  # the first process also waits for what all of them import
    began = time.monotonic()
    whole = finished("whole")
    seconds = time.monotonic() - began
    assert len(whole) > 2 + 6 * ROUNDS
    assert all(whole.values())
    check_rows(tmp_path / "whole/loop")

    # A loop that is not hit again ends; the next one is hit.
    loops, kills = 1, 0
    while kills < KILLS:
        process = start(f"killed-{loops}")
        process.join(chance.uniform(0.05, 0.7) * seconds)
        process.kill()
        process.join()
        kills += process.exitcode == -signal.SIGKILL
        if process.exitcode != -signal.SIGKILL:
            assert finished(f"killed-{loops}") == whole
            loops += 1
    assert finished(f"killed-{loops}") == whole
