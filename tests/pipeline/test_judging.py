"""The evaluate, gate, export and label-steps stages: which model passes, and what stands in the record."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from markupsafe import escape
from safetensors.torch import load_file

from rlhf_lightning.cli import main
from rlhf_lightning.evaluation import Report, evaluate, own_samples
from rlhf_lightning.evaluation.answers import read_prompts
from rlhf_lightning.inference import LocalEngine, SamplingParams
from rlhf_lightning.pipeline import judging
from rlhf_lightning.pipeline.judging import (
    Judge,
    check_judging,
    check_suite,
    copy_model,
    criteria_of,
    run_evaluate,
    run_gate,
    validator_of,
)
from rlhf_lightning.pipeline.stages import EvaluateStage, GateStage
from rlhf_lightning.utils.files import MARKER, content_hash
from rlhf_lightning.utils.folders import recover

from ..helpers import Killed, killed_after, save_tiny_model

EVEN = f"{__name__}.first_is_even"


def first_is_even(prompts: list[str], completions: list[str], **columns: Any) -> list[float]:
    return [float(bool(text) and ord(text[0]) % 2 == 0) for text in completions]


@pytest.fixture
def suite(tmp_path: Path) -> dict[str, Any]:
    file = tmp_path / "prompts.jsonl"
    file.write_text("".join(json.dumps({"prompt": f"{n}+{n}=?"}) + "\n" for n in range(24)))
    task = {"name": "even", "prompts": str(file), "verifier": EVEN, "sampling": {"max_new_tokens": 2}}
    return {"name": "small", "tasks": [task]}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("models")
    return [str(save_tiny_model(folder / str(seed), seed=seed)) for seed in (0, 1)]


def test_the_gate_passes_the_model_that_a_paired_test_accepts(models, suite, tmp_path):
    criteria = criteria_of({})
    judge = Judge(suite, criteria, tmp_path / "evaluation", 0, "float32", models[0])
    decision, report = judge.decide(models[0], models[1])
    scores = {name: report.result(name, "even").scores for name in ("accepted", "candidate")}
    difference = sum(scores["candidate"].values()) / 24 - sum(scores["accepted"].values()) / 24
    assert decision.difference == pytest.approx(difference)
    better, worse = (models[1], models[0]) if difference > 0 else (models[0], models[1])
    assert abs(difference) > 0.2  # random models differ on such a question

    said: list[str] = []
    for number, (candidate, accepted, expected) in enumerate(
        [(better, worse, better), (worse, better, better), (better, better, better)]
    ):
        folder = tmp_path / str(number)
        folder.mkdir()
        stage = GateStage(model=candidate, accepted=accepted, suite=suite)
        metrics = run_gate(stage, folder, 0, "float32", said.append)
        assert metrics["accepted"] == (1.0 if number == 0 else 0.0)
        assert content_hash(folder / "model/model.safetensors") == content_hash(Path(expected) / "model.safetensors")
        written = json.loads((folder / "decision.json").read_text())
        assert written["verdict"] == ("accept" if number == 0 else "reject")
        assert metrics["difference"] == written["difference"]
    assert said[-1].startswith("rejected: not shown to be better")


def test_the_divergence_from_the_start_is_a_criterion(models, suite, tmp_path):
    """A model that is the start has none; two random models differ by much."""
    suite["tasks"][0]["limit"] = 2
    for candidate, verdict in ((models[0], "accept"), (models[1], "reject")):
        criteria = criteria_of({"accept": "not_worse", "threshold": 1.0, "max_kl": 0.01})
        judge = Judge(suite, criteria, tmp_path / "evaluation", 0, "float32", models[0])
        decision, _ = judge.decide(models[0], candidate)
        assert decision.verdict == verdict
        assert decision.kl is not None
        assert (decision.kl < 1e-6) == (verdict == "accept")


def test_drift_is_that_of_the_candidate_from_the_start(models, suite, tmp_path):
    """KL(candidate || start) on the candidate's samples, summed over the vocabulary by hand."""
    suite["tasks"][0] |= {"limit": 3, "sampling": {"max_new_tokens": 4}}
    judge = Judge(suite, criteria_of(ALWAYS | {"max_kl": 9.0}), tmp_path / "e", 0, "float32", models[0])
    found, _ = judge.decide(*models)
    new, old = (LocalEngine.from_pretrained(place, dtype="float32") for place in (models[1], models[0]))
    prompts = read_prompts(suite["tasks"][0]["prompts"], new.tokenizer, limit=3)
    total, count = 0.0, 0
    for row in own_samples(new, prompts, sampling=SamplingParams(max_new_tokens=4, seed=0)):
        prompt, tokens = row.root.tokens.tolist(), row.root.children[0].tokens.tolist()
        with torch.no_grad():
            p, q = (e.model(torch.tensor([prompt + tokens])).logits[0].log_softmax(-1) for e in (new, old))
        for at in range(len(prompt) - 1, len(prompt) + len(tokens) - 1):
            total, count = total + float((p[at].exp() * (p[at] - q[at])).sum()), count + 1
    assert found.kl == pytest.approx(total / count, rel=1e-4)


def test_a_round_is_tested_against_the_start_as_well(models, suite, tmp_path):
    """The candidate is the accepted model, which is worse than the start."""
    better, worse = sorted(models, key=lambda place: _accuracy(place, suite), reverse=True)
    for accepted, verdict in ((worse, "reject"), (better, "accept")):
        judge = Judge(suite, criteria_of({"accept": "not_worse"}), tmp_path / verdict, 0, "float32", better)
        found, _ = judge.decide(accepted, accepted)
        assert found.verdict == verdict
        assert found.reason.startswith("worse than the model at the start" if verdict == "reject" else "not shown")


def _accuracy(place, suite):
    return evaluate({"model": place}, suite).results[0].accuracy.value


def test_a_candidate_that_says_nothing_is_infinitely_far_from_the_start(models, suite, tmp_path, monkeypatch):
    suite["tasks"][0]["limit"] = 2
    monkeypatch.setattr(judging, "own_samples", lambda *args, **kwargs: [])
    stage = GateStage(model=models[1], accepted=models[0], suite=suite, criteria=ALWAYS | {"max_kl": 9.0})
    assert run_gate(stage, tmp_path, 0, "float32", lambda line: None)["accepted"] == 0.0
    written = json.loads((tmp_path / "decision.json").read_text(), parse_constant=pytest.fail)
    assert written["kl"] is None
    assert written["reason"] == "its divergence from the start is inf nats per token, above max_kl=9.0"


def test_a_model_that_is_too_large_or_too_slow_does_not_pass(models, suite, tmp_path):
    """The bytes are those of the file's tensors in the type of the weights, and of the rotary frequencies."""
    stored = load_file(Path(models[1]) / "model.safetensors")
    config = json.loads((Path(models[1]) / "config.json").read_text())
    frequencies = 2 * 4 * (config["head_dim"] // 2)  # two buffers in float32
    bytes_of = sum(4 * tensor.numel() for tensor in stored.values()) + frequencies
    for limit, passes in ((bytes_of, 1.0), (bytes_of - 1, 0.0)):
        folder = tmp_path / str(limit)
        folder.mkdir()
        criteria = ALWAYS | {"max_memory_gb": limit / 1e9}
        stage = GateStage(model=models[1], accepted=models[0], suite=suite, criteria=criteria)
        assert run_gate(stage, folder, 0, "float32", lambda line: None)["accepted"] == passes
        written = json.loads((folder / "decision.json").read_text())
        assert written["memory_gb"] == pytest.approx(bytes_of / 1e9, rel=1e-12)
    assert written["reason"].startswith("its weights take 7.85e-05 GB, above max_memory_gb=")
    # Keys and values of all key-value heads, in every layer.
    of_token = 4 * 2 * config["num_hidden_layers"] * config["num_key_value_heads"] * config["head_dim"]
    for limit, verdict in ((bytes_of + 100 * of_token, "accept"), (bytes_of + 100 * of_token - 1, "reject")):
        with_cache = criteria_of(ALWAYS | {"max_memory_gb": limit / 1e9, "cache_tokens": 100})
        assert Judge(suite, with_cache, tmp_path / "c", 0, "float32", models[0]).decide(*models)[0].verdict == verdict
    half = Judge(suite, criteria_of(criteria), tmp_path / "e", 0, "bfloat16", models[0])
    assert half.decide(models[0], models[1])[0].verdict == "accept"

    # The time is that of the answers that the evaluation keeps, and not measured again.
    taken = Report.read(folder / "evaluation").result("candidate", "even").token_seconds
    for limit, verdict in ((1e9, "accept"), (1e-9, "reject")):
        criteria = criteria_of(ALWAYS | {"max_token_ms": limit})
        decision, _ = Judge(suite, criteria, folder / "evaluation", 0, "float32", models[0]).decide(*models)
        assert (decision.verdict, decision.token_ms) == (verdict, 1e3 * taken)


ALWAYS: dict[str, Any] = {"accept": "not_worse", "threshold": 1.0}


def test_a_model_that_the_test_accepts_must_pass_the_validators(models, suite, tmp_path):
    """Random models have some accuracy: at least 0, never 1."""
    task = {**suite["tasks"][0], "name": "all even"}
    strict = {"class_path": "Verdicts", "init_args": {"task": task, "min_accuracy": 1.0}}
    lenient = {"class_path": "Verdicts", "init_args": {"task": task, "min_accuracy": 0.0}}
    for number, (checks, passes) in enumerate([([lenient], True), ([lenient, strict], False)]):
        folder = tmp_path / str(number)
        folder.mkdir()
        stage = GateStage(
            model=models[1], accepted=models[0], suite=suite, validators=checks, criteria=ALWAYS | {"patience": 2}
        )
        said: list[str] = []
        assert run_gate(stage, folder, 0, "float32", said.append)["accepted"] == passes
        written = json.loads((folder / "decision.json").read_text())
        assert [finding["passed"] for finding in written["validation"]["findings"]] == [True, False][: len(checks)]
        assert written["verdict"] == ("accept" if passes else "reject")
        assert content_hash(folder / "model/model.safetensors") == content_hash(
            Path(models[passes]) / "model.safetensors"
        )
    assert written["reason"].startswith("verdicts of all even: ")
    assert said[-1] == f"rejected: {written['reason']}"
    # Patience counts these rejections as well.
    patient, strictly = criteria_of(ALWAYS | {"patience": 2}), validator_of([strict])
    judge = Judge(suite, patient, tmp_path / "e", 0, "float32", models[0], validator=strictly)
    assert judge.decide(models[0], models[1], num_rejected=1)[0].verdict == "stop"


@pytest.mark.parametrize(
    ("written", "message"),
    [
        ([{"class_path": "Robustnes"}], "there is no check 'Robustnes'; write one of Verdicts, Robustness"),
        ([{"class_path": "Verdicts", "init_args": {"taks": {}}}], "check has no option 'taks'; did you mean 'task'?"),
        ([3], "a check is 3; it must have the method run"),
    ],
)
def test_mistakes_in_validators(written, message):
    with pytest.raises(ValueError, match=message):
        validator_of(written)


def test_models_are_evaluated_together(models, suite, tmp_path):
    stage = EvaluateStage(models={"one": models[0], "two": models[1]}, suite=suite)
    metrics = run_evaluate(stage, tmp_path, 0, "float32", lambda line: None)
    report = Report.read(tmp_path / "evaluation")
    assert metrics == {
        f"accuracy/{name}/even": sum(report.result(name, "even").scores.values()) / 24 for name in ("one", "two")
    }
    assert (tmp_path / "evaluation/report.html").is_file()


@pytest.mark.parametrize(
    ("written", "message"),
    [
        ({"patiense": 1}, "criteria has no option 'patiense'; did you mean 'patience'?"),
        ({"level": 0.7}, r"level is 0.7; it must be in \(0, 0.5\)"),
        ({"on_reject": "retry"}, "on_reject is 'retry'"),
    ],
)
def test_mistakes_in_criteria(written, message):
    with pytest.raises(ValueError, match=message):
        criteria_of(written)


@pytest.mark.parametrize("name", ["min_length", "max_length"])
def test_limits_of_answers_need_answers(suite, tmp_path, name):
    (tmp_path / "pairs.jsonl").write_text(json.dumps({"prompt": "a", "chosen": "b", "rejected": "c"}) + "\n")
    pairs = {"kind": "preferences", "name": "pairs", "rows": str(tmp_path / "pairs.jsonl")}
    assert check_judging({"name": "both", "tasks": [pairs, *suite["tasks"]]}, {name: 5}, []).name == "both"
    with pytest.raises(ValueError, match=rf"^criteria.{name} is 5, and no task of the suite 'pairs' measures it: add"):
        check_judging({"name": "pairs", "tasks": [pairs]}, {name: 5}, [])


@pytest.mark.parametrize("limit", ["max_token_ms", "max_kl"])
def test_a_limit_of_time_or_drift_needs_tokens(suite, limit, tmp_path, capsys):
    (tmp_path / "pairs.jsonl").write_text(json.dumps({"prompt": "a", "chosen": "b", "rejected": "c"}) + "\n")
    pairs = {"kind": "preferences", "name": "pairs", "rows": str(tmp_path / "pairs.jsonl")}
    assert check_judging({"name": "both", "tasks": [pairs, *suite["tasks"]]}, {limit: 5}, []).name == "both"
    alone = {"name": "pairs", "tasks": [pairs]}
    message = rf"^criteria.{limit} is 5, and no task of the suite 'pairs' samples"
    with pytest.raises(ValueError, match=message):
        check_judging(alone, {limit: 5}, [])
    judge = Judge(alone, criteria_of({limit: 5}), tmp_path / "evaluation", 0, "float32", "none")
    with pytest.raises(ValueError, match=message):
        judge.decide("none", "other")
    stages = {"test": {"kind": "gate", "model": str(tmp_path), "accepted": str(tmp_path), "suite": alone}}
    config = tmp_path / "pipeline.yaml"
    stages["test"]["criteria"] = {limit: 5}
    config.write_text(yaml.safe_dump({"run_dir": str(tmp_path / "run"), "stages": stages}))
    with pytest.raises(SystemExit):
        main(["pipeline", "--config", str(config), "--dry-run"])
    assert message[1:] in capsys.readouterr().err


def test_mistakes_in_a_suite(suite, models, tmp_path):
    with pytest.raises(ValueError, match="has no tasks"):
        check_suite({"name": "empty", "tasks": []})
    suite["tasks"][0]["verifier"] = "nowhere.right"
    with pytest.raises(ValueError, match=r"verifier 'nowhere\.right' cannot be imported"):
        check_suite(suite)
    with pytest.raises(ValueError, match="accepted is 'org/model', which is no folder"):
        run_gate(GateStage(model=models[0], accepted="org/model", suite=suite), tmp_path, 0, "float32", print)


def test_a_copy_is_whole_and_is_the_package_s(models, tmp_path):
    target = tmp_path / "stage/model"
    target.parent.mkdir()
    copy_model(models[0], target)
    again = content_hash(target)
    assert {path.name for path in target.iterdir()} == {path.name for path in Path(models[0]).iterdir()} | {MARKER}
    copy_model(models[1], target)
    assert content_hash(target) != again
    copy_model(models[0], target)
    assert content_hash(target) == again
    assert [path.name for path in target.parent.iterdir()] == ["model"]


def test_a_copy_that_is_killed_leaves_the_model_that_it_replaces(models, tmp_path):
    for moment in range(100):
        target = tmp_path / str(moment) / "model"
        copy_model(models[0], target)
        old = content_hash(target / "model.safetensors")
        try:
            with killed_after(moment):
                copy_model(models[1], target)
            killed = False
        except Killed:
            killed = True
        recover(target)
        new = content_hash(Path(models[1]) / "model.safetensors")
        assert content_hash(target / "model.safetensors") in (old, new)
        assert {path.name for path in target.iterdir()} == {path.name for path in Path(models[0]).iterdir()} | {MARKER}
        if not killed:
            break
    assert not killed
    assert moment > 5


@pytest.mark.slow
def test_stages_that_label_evaluate_and_export(models, suite, tmp_path):
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"prompt": f"{n}+{n}=?", "answer": "2"}) + "\n" for n in range(4)))
    suite["tasks"][0]["limit"] = 4
    stages = {
        "labels": {
            "kind": "label-steps",
            "model": models[0],
            "prompts": str(rows),
            "verifier": EVEN,
            "num_solutions": 6,
            "num_completions": 2,
            "step_separator": "a",
            "sampling": {"max_new_tokens": 24},
        },
        "choice": {"kind": "gate", "model": models[1], "accepted": models[0], "suite": suite},
        "both": {"kind": "evaluate", "models": {"a": models[0], "b": "${outputs.choice.model}"}, "suite": suite},
        "file": {"kind": "export", "model": "${outputs.choice.model}", "type": "f32", "check_prompts": ["1+1="]},
    }
    file = tmp_path / "pipeline.yaml"
    file.write_text(yaml.safe_dump({"run_dir": str(tmp_path / "run"), "stages": stages}, sort_keys=False))
    main(["pipeline", "--config", str(file)])
    records = json.loads((tmp_path / "run/manifest.json").read_text())["stages"]
    assert {name: record["status"] for name, record in records.items()} == dict.fromkeys(stages, "finished")
    labelled = [json.loads(line) for line in (tmp_path / "run/labels/steps.jsonl").read_text().splitlines()]
    assert len(labelled) == records["labels"]["metrics"]["solutions"] > 0
    assert (tmp_path / "run/file/model.gguf").read_bytes()[:4] == b"GGUF"
    page = (tmp_path / "run/report.html").read_text()
    assert 'href="both/evaluation/report.html"' in page
    assert "of greedy tokens as before" in page
    reason = json.loads((tmp_path / "run/choice/decision.json").read_text())["reason"]
    assert f"<p>Reason: {escape(reason)}.</p>" in page
    main(["pipeline", "--config", str(file)])
    again = json.loads((tmp_path / "run/manifest.json").read_text())["stages"]
    assert not any(record["ran"] for record in again.values())
