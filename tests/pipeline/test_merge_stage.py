"""The stage ``merge``, and soups that are chosen by what validation measures."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from rlhf_lightning.cli import main
from rlhf_lightning.merging.options import expand
from rlhf_lightning.pipeline import load_pipeline
from rlhf_lightning.pipeline.merge_stage import validation_metric
from rlhf_lightning.pipeline.runner import run_pipeline
from rlhf_lightning.utils.messages import UsageError

from ..helpers import save_tiny_model

ROWS = [{"prompt": f"{a}+{b}=", "completion": str(a + b)} for a in range(4) for b in range(3)]


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A base that knows the rows, four models around it (two on opposite sides, one far off), and a config."""
    place = tmp_path_factory.mktemp("soup")
    learn(save_tiny_model(place / "base"))
    start = load_file(place / "base" / "model.safetensors")
    for number, (seed, size) in enumerate(((1, 0.03), (1, -0.03), (2, 0.5), (3, 0.03)), start=8):
        folder = place / f"model-{number}"
        shutil.copytree(place / "base", folder)
        generator = torch.Generator().manual_seed(seed)
        moved = {name: w + size * torch.randn(w.shape, generator=generator) for name, w in start.items()}
        save_file(moved, folder / "model.safetensors", metadata={"format": "pt"})
    (place / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    (place / "sft.yaml").write_text(
        f"""
model: {{class_path: rlhf_lightning.SFTModule, init_args: {{model: nowhere}}}}
data: {{class_path: rlhf_lightning.datamodules.SFTDataModule, init_args: {{val: {place / "rows.jsonl"}}}}}
trainer: {{accelerator: cpu, precision: 32-true}}
"""
    )
    return place


def learn(folder: Path) -> None:
    """Fits the model to the rows, which are of one length."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    texts = [tokenizer.encode(row["prompt"] + row["completion"], add_special_tokens=False) for row in ROWS]
    ids = torch.tensor([[*tokens, tokenizer.eos_token_id] for tokens in texts])
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    for _ in range(60):
        optimizer.zero_grad()
        model(ids, labels=ids.where(torch.arange(ids.shape[1]) >= 4, -100)).loss.backward()
        optimizer.step()
    model.save_pretrained(folder)


def naive_loss(folder: Path) -> float:
    """The mean negative log-likelihood of the completions' tokens, one row at a time."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    total, count = 0.0, 0
    for row in ROWS:
        prompt, completion = (
            tokenizer.encode(row[name], add_special_tokens=False) for name in ("prompt", "completion")
        )
        completion.append(tokenizer.eos_token_id)
        with torch.no_grad():
            logprobs = model(torch.tensor([prompt + completion])).logits[0].log_softmax(-1)
        total -= sum(float(logprobs[len(prompt) + n - 1, token]) for n, token in enumerate(completion))
        count += len(completion)
    return total / count


def test_a_soup_by_a_metric_of_validation(place, tmp_path, capsys):
    config = f"--validate=[{place / 'sft.yaml'}]"
    models = f"[{place}/model-*]"
    main(
        [
            "merge",
            "--method=greedy_soup",
            f"--models={models}",
            config,
            "--metric=val/loss",
            f"--output={tmp_path / 'soup'}",
        ]
    )
    record = json.loads((tmp_path / "soup.soup.json").read_text())
    folders = [str(place / f"model-{n}") for n in (8, 9, 10, 11)]
    losses = [naive_loss(Path(folder)) for folder in folders]
    # A log-prob in fp32 is rounded as its logits are, however small it is itself.
    assert record["values"] == pytest.approx(losses, rel=1e-5, abs=5e-7)
    assert record["mode"] == "min"

    # The soup by its definition, on means of the files' tensors.
    def loss_of(names: list[str]) -> float:
        states = [load_file(Path(name) / "model.safetensors") for name in names]
        shutil.copytree(place / "base", tmp_path / "trial", dirs_exist_ok=True)
        mean = {key: sum(state[key] for state in states) / len(states) for key in states[0]}
        save_file(mean, tmp_path / "trial" / "model.safetensors", metadata={"format": "pt"})
        return naive_loss(tmp_path / "trial")

    order = sorted(folders, key=lambda folder: losses[folders.index(folder)])
    chosen, best = order[:1], min(losses)
    for folder in order[1:]:
        value = loss_of([*chosen, folder])
        if value < best:
            chosen, best = [*chosen, folder], value
    assert record["ingredients"] == chosen
    assert len(chosen) > 1
    assert str(place / "model-10") not in chosen
    assert naive_loss(tmp_path / "soup") == pytest.approx(best, rel=1e-4)
    assert "the soup has" in capsys.readouterr().out


def test_a_callback_may_measure(place):
    config = place / "accuracy.yaml"
    config.write_text(
        """
trainer:
  callbacks:
    - class_path: rlhf_lightning.callbacks.GenerationAccuracy
      init_args:
        prompts: sums:prompts?split=validation&rows=4
        verifier: tests.pipeline.test_merge_stage.lengths
        max_new_tokens: 5
"""
    )
    configs = [str(place / "sft.yaml"), str(config)]
    found = validation_metric(place / "base", configs=configs, metric="val/accuracy")
    assert 0 <= found <= 5
    with pytest.raises(
        ValueError, match=r"metric is 'val/acc', which these configs do not measure \(measured: val/acc"
    ):
        validation_metric(place / "base", configs=configs, metric="val/acc")


def lengths(prompts, completions, **_):
    return [float(len(text)) for text in completions]


def test_patterns_are_in_the_order_of_numbers(place, monkeypatch):
    names = [str(place / f"model-{n}") for n in (8, 9, 10, 11)]
    assert expand([str(place / "base"), f"{place}/model-*"]) == [str(place / "base"), *names]
    monkeypatch.chdir(place)
    assert expand(["model-1?"]) == ["model-10", "model-11"]
    with pytest.raises(ValueError, match="no folder of a model matches 'rows"):
        expand(["rows*"])


def pipeline_of(place: Path, tmp_path: Path, stage: str) -> Path:
    file = tmp_path / "run.yaml"
    file.write_text(
        f"""
run_dir: {tmp_path / "run"}
evaluation:
  prompts: sums:prompts?split=test&rows=4
  verifier: tests.pipeline.test_merge_stage.lengths
  max_new_tokens: 5
stages:
  merged: {{kind: merge, {stage}}}
  pairs:
    kind: sample
    model: "${{outputs.merged.model}}"
    prompts: sums:prompts?split=train&rows=8
    verifier: tests.pipeline.test_merge_stage.lengths
    sampling: {{max_new_tokens: 6, temperature: 3.0, stop_token_ids: {list(range(20, 40))}}}
"""
    )
    return file


def test_a_stage_merges_is_evaluated_and_skipped(place, tmp_path):
    models = f"models: [{place / 'model-8'}, {place / 'model-9'}]"
    file = pipeline_of(place, tmp_path, f"method: ties, base: {place / 'base'}, {models}, density: 0.5")
    manifest = run_pipeline(load_pipeline(file), say=lambda line: None)
    record = manifest.stages["merged"]
    assert record["metrics"] == {"models": 2.0}
    assert record["evaluation"]["rows"] == 4
    assert {str(place / name) for name in ("base", "model-8", "model-9")} <= set(record["inputs"])
    main(["merge", "verify", str(tmp_path / "run" / "merged" / "model")])

    # The same as the command's.
    command = ["--method=ties", f"--base={place / 'base'}", f"--models=[{place / 'model-8'}, {place / 'model-9'}]"]
    main(["merge", *command, "--density=0.5", f"--output={tmp_path / 'by_command'}"])
    files = [path / "model.safetensors" for path in (tmp_path / "run" / "merged" / "model", tmp_path / "by_command")]
    assert files[0].read_bytes() == files[1].read_bytes()

    # A second start skips it; a changed option runs it again, with a model of the seed that the pipeline has.
    again = run_pipeline(load_pipeline(file), say=lambda line: None)
    assert [again.stages[name]["ran"] for name in ("merged", "pairs")] == [False, False]
    overrides = ["stages.merged.method=dare", "seed=3"]
    changed = run_pipeline(load_pipeline(file, overrides), say=lambda line: None)
    assert changed.stages["merged"]["ran"]
    merged = json.loads((tmp_path / "run" / "merged" / "model" / "merge_manifest.json").read_text())
    assert merged["options"]["seed"] == 3


def test_a_stage_makes_a_soup(place, tmp_path):
    file = pipeline_of(
        place,
        tmp_path,
        f'method: greedy_soup, models: ["{place}/model-*"], validate: [{place / "sft.yaml"}], metric: val/loss',
    )
    manifest = run_pipeline(load_pipeline(file), say=lambda line: None)
    metrics = manifest.stages["merged"]["metrics"]
    assert metrics["models"] == 4
    assert metrics["soup"] <= metrics["best_model"]
    assert (tmp_path / "run" / "merged" / "model.soup.json").is_file()
    assert str(place / "sft.yaml") in manifest.stages["merged"]["inputs"]


@pytest.mark.parametrize(
    ("stage", "message"),
    [
        ("method: ties, models: [a, b], densty: 0.5", "has no key 'densty'; did you mean 'density'?"),
        ("method: ties, models: [a, b], t: 0.5", "the method ties takes no 't'"),
        ("method: tie, models: [a, b]", "did you mean 'ties'"),
        ("method: ties", "needs 'models'"),
        ("method: ties, models: a", "models is 'a'; it must be a list of folders"),
        ("method: ties, models: [a, b], output: c", "the stage names it itself: leave it out"),
        ("method: greedy_soup, models: [a, b]", "give prompts"),
        ("method: greedy_soup, models: [a, b], validate: [x.yaml]", "give the one to choose by"),
        ("method: linear, models: [a, b], metric: val/loss", "metric is read by method greedy_soup only"),
        ("method: linear, models: ['none-*']", "no folder of a model matches 'none-*'"),
    ],
)
def test_mistakes_are_found_before_anything_runs(stage, message, place, tmp_path):
    with pytest.raises((ValueError, UsageError), match=re.escape(message)):
        run_pipeline(load_pipeline(pipeline_of(place, tmp_path, stage)), say=lambda line: None)
    assert not (tmp_path / "run" / "merged").exists()
