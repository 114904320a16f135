"""The plan of a run: what is said of stages that are finished, changed, waiting or forced; nothing is written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from transformers import AutoConfig, AutoModelForCausalLM

from rlhf_lightning.cli import main
from rlhf_lightning.pipeline import load_pipeline
from rlhf_lightning.pipeline.dry_run import plan_pipeline
from rlhf_lightning.utils.files import content_hash
from rlhf_lightning.utils.messages import UsageError

from ..planning.test_presets import MODELS, folder, planned

NANO = "configs/models/nano"


@pytest.fixture
def written(tmp_path: Path) -> dict[str, Any]:
    trainer = {"accelerator": "cpu", "max_steps": 1, "logger": False}
    sft = {
        "kind": "fit",
        "model": {"class_path": "SFTModule", "init_args": {"model": NANO, "init": "random"}},
        "data": {
            "class_path": "SFTDataModule",
            "init_args": {"train": "sums:demonstrations?rows=40", "global_batch_size": 4},
        },
        "trainer": trainer,
    }
    pairs = {
        "kind": "sample",
        "model": "${outputs.sft.model}",
        "prompts": "sums:prompts?rows=30",
        "num_samples": 3,
        "rows": ["samples"],
        "sampling": {"max_new_tokens": 2},
    }
    dpo = {
        "kind": "fit",
        "model": {"class_path": "DPOModule", "init_args": {"model": "${round.model}"}},
        "data": {"class_path": "PreferenceDataModule", "init_args": {"train": "sums:preference?rows=8"}},
        "trainer": trainer,
    }
    loop = {"kind": "rounds", "model": "${outputs.sft.model}", "rounds": 1, "body": {"dpo": dpo}}
    return {"run_dir": str(tmp_path / "run"), "stages": {"sft": sft, "pairs": pairs, "loop": loop}}


def plans(written: dict[str, Any], tmp_path: Path, *overrides: str, force: tuple[str, ...] = ()) -> dict[str, Any]:
    file = tmp_path / "pipeline.yaml"
    file.write_text(yaml.safe_dump(written, sort_keys=False))
    return {found.name: found for found in plan_pipeline(load_pipeline(file, overrides), force)}


def test_samples_of_stages_that_draw_several_for_a_prompt(tmp_path):
    common = {"model": "m", "prompts": "sums:prompts?rows=30"}
    play = {"kind": "self-play", "opponents": ["a", "b", "a"], "trial": 10, "num_samples": 2, **common}
    stages = {"drafts": {"kind": "refine", "revisions": 3, **common}, "play": play}
    found = plans({"run_dir": str(tmp_path / "run"), "stages": stages}, tmp_path)
    # An answer and three revisions; ten prompts by three players and twenty by two, twice each.
    assert found["drafts"].facts[0] == "30 prompts, up to 120 drafts, up to 90 critiques"
    assert found["play"].facts[0] == "30 prompts, 140 samples"
    # There is no model m.
    assert all(one.facts[1].startswith("size not known (") for one in found.values())


def test_a_run_that_has_not_begun(written, tmp_path, capsys):
    found = plans(written, tmp_path)
    assert [(one.runs, one.why) for one in found.values()] == [
        (True, "not run before"),
        (True, "not run before (after sft)"),
        (True, "not run before (after sft)"),
    ]
    weights = f"{AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(NANO)).num_parameters():,} parameters"
    assert weights in found["sft"].facts
    assert "40 rows" in found["sft"].facts
    assert any("s of arithmetic" in fact for fact in found["sft"].facts)
    assert found["pairs"].facts[0] == "30 prompts, 90 samples"
    assert weights in found["pairs"].facts
    again = plans(written, tmp_path, "stages.pairs.replay.share=0.5")["pairs"].facts
    assert [fact for fact in again if "earlier rounds" in fact] == [
        "up to 0.5 rows of earlier rounds for each new one, from 1,000 that are kept"
    ]
    (dpo,) = found["loop"].body
    assert weights in dpo.facts  # of a model that there is not yet
    assert "8 rows" in dpo.facts
    assert dpo.why == "in every round"

    main(["pipeline", "--config", str(tmp_path / "pipeline.yaml"), "--dry-run"])
    out = capsys.readouterr().out.splitlines()
    assert out[0] == "sft (fit): runs, not run before"
    assert out[-3] == "    dpo (fit): runs, in every round"
    assert out[-1].startswith("in all: 3 of 3 stages run; ")
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_what_is_finished_and_what_has_changed(written, tmp_path):
    file = tmp_path / "pipeline.yaml"
    file.write_text(yaml.safe_dump(written, sort_keys=False))
    main(["pipeline", "--config", str(file)])
    before = content_hash(tmp_path / "run")

    def why(*overrides: str, force: tuple[str, ...] = ()) -> list[str]:
        return [one.why for one in plans(written, tmp_path, *overrides, force=force).values()]

    same = "finished before and unchanged"
    assert why() == [same] * 3
    assert why("stages.sft.trainer.max_steps=2") == [
        "trainer changed",
        "its inputs are new (after sft)",
        "its inputs are new (after sft)",
    ]
    assert why("stages.pairs.num_samples=2") == [same, "num_samples changed", same]
    assert why("stages.loop.body.dpo.model.init_args.beta=0.2") == [same, same, "body, first changed"]
    assert why(force=("pairs",)) == [same, "forced", same]
    found = plans(written, tmp_path, force=("sft",))
    assert any(fact.endswith("s in an earlier run") for fact in found["sft"].facts)
    assert content_hash(tmp_path / "run") == before
    (tmp_path / "run/pairs/samples.jsonl").write_text("")
    assert why() == [same, "samples.jsonl is missing or changed", same]


def test_a_stage_for_a_device_that_is_not_here(written, tmp_path):
    written["stages"] = {"sft": written["stages"]["sft"]}
    written["stages"]["sft"]["trainer"] = {"accelerator": "tpu", "precision": "bf16-true", "max_steps": 1}
    found = plans(written, tmp_path)["sft"]
    assert found.facts[0].startswith("accelerator 'tpu' is not here (")
    assert any(fact.endswith("GiB") for fact in found.facts)

    # Mistakes of the trainer are found all the same.
    written["stages"]["sft"]["trainer"]["max_stepps"] = 1
    with pytest.raises(UsageError, match="max_stepps"):
        plans(written, tmp_path)


@pytest.mark.parametrize("preset", MODELS)
def test_presets(written, tmp_path, preset):
    # The config of the preset's model alone: no weights, no tokenizer.
    sft = written["stages"]["sft"]
    sft["config"] = ["configs/sft/default.yaml", f"configs/presets/{preset}.yaml"]
    sft["model"] = {"init_args": {"model": folder(preset, tmp_path)}}
    sft["trainer"] = {"max_steps": 1, "logger": False, "callbacks": []}
    sft["data"] = {"init_args": {"train": "sums:demonstrations?rows=40"}}
    written["stages"] = {"sft": sft}
    found = plans(written, tmp_path)["sft"]
    assert "40 rows" in found.facts
    assert f"{MODELS[preset][1]:,} parameters" in found.facts
    assert found.memory == planned(preset, tmp_path).total
    assert "time not known" in found.facts
    # Only a graphics card is missing here, and processes that a stage does not have.
    assert all("accelerator 'gpu'" in fact for fact in found.facts if "is not here" in fact)
    sharded = preset == "fsdp2_70b"
    assert any("trainer.devices make 8 processes" in fact for fact in found.facts) == sharded
    assert any(fact.endswith("GiB on one device, unsharded") for fact in found.facts) == sharded
