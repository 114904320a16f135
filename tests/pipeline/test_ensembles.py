"""Several models as one through every door that takes a model for sampling: the same answers as in Python."""

from __future__ import annotations

import io
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rlhf_lightning.cli import main
from rlhf_lightning.evaluation import evaluate
from rlhf_lightning.evaluation.command import EvaluateOptions
from rlhf_lightning.generation import ChatOptions, GenerateOptions, generate_rows
from rlhf_lightning.inference import EnsemblePolicy, SamplingParams, derive_seed, generate
from rlhf_lightning.inference.policies import policy_spec
from rlhf_lightning.labeling.command import LabelOptions
from rlhf_lightning.pipeline import load_pipeline
from rlhf_lightning.pipeline.dry_run import plan_lines
from rlhf_lightning.pipeline.runner import run_pipeline
from rlhf_lightning.self_improvement import model_hash
from rlhf_lightning.utils.files import content_hash
from rlhf_lightning.utils.messages import UsageError

from ..helpers import save_tiny_model

PROMPTS = ["1+1=", "2+3=", "4+4="]
GREEDY: dict[str, Any] = {"temperature": 0.0, "max_new_tokens": 8, "stop_token_ids": [1, *range(40, 64)]}
WRITTEN: dict[str, Any] = {"combine": "geometric", "weights": [1.0, 3.0]}
VERIFIER = f"{__name__}.odd_length"


def odd_length(prompts: list[Any], completions: list[str], **columns: Any) -> list[float]:
    return [float(len(text) % 2) for text in completions]


class OwnPolicy(EnsemblePolicy):
    """A user's class."""


@pytest.fixture
def folders(tmp_path: Path) -> list[str]:
    return [str(save_tiny_model(tmp_path / f"model {n}", arch, seed=n)) for n, arch in ((1, "llama"), (2, "qwen3"))]


@pytest.fixture
def prompts(tmp_path: Path) -> str:
    file = tmp_path / "prompts.jsonl"
    file.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in PROMPTS))
    return str(file)


FORMS: dict[str, Callable[[list[str]], Any]] = {
    "list": lambda folders: folders,
    "class path": lambda folders: {"class_path": "EnsemblePolicy", "init_args": {"models": folders, **WRITTEN}},
}


def made(spec: Any) -> EnsemblePolicy:
    """The ensemble, made in Python."""
    return EnsemblePolicy(spec) if isinstance(spec, list) else EnsemblePolicy(spec["init_args"]["models"], **WRITTEN)


def directly(spec: Any, prompts: list[Any], num_samples: int = 1, **options: Any) -> list[list[str]]:
    """Its answers."""
    params = options.pop("params", SamplingParams(**GREEDY))
    return [[sample.text for sample in group] for group in made(spec).generate(prompts, num_samples, params, **options)]


def rows(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def of_samples(folder: Path) -> list[str]:
    """The first sample of each prompt."""
    found: dict[str, str] = {}
    for row in rows(folder / "samples.jsonl"):
        found.setdefault(row["prompt"], row["completion"])
    return [found[prompt] for prompt in PROMPTS]


def of_evaluation(folder: Path) -> list[str]:
    results = json.loads((folder / "results.json").read_text())["results"]
    (found,) = (result for result in results if result["model"] == "both")
    return [prompt["samples"][0]["text"] for prompt in found["prompts"]]


SUITE: dict[str, Any] = {"name": "odd", "tasks": [{"name": "odd", "verifier": VERIFIER, "sampling": GREEDY}]}


def suite_of(prompts: str) -> dict[str, Any]:
    return {**SUITE, "tasks": [{**task, "prompts": prompts} for task in SUITE["tasks"]]}


# Commands.


def by_generate(spec: Any, prompts: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    output, sampling = folder / "out.jsonl", [f"--sampling.{name}={value}" for name, value in GREEDY.items()]
    main(["generate", f"--model={json.dumps(spec)}", f"--prompts={prompts}", f"--output={output}", *sampling])
    return [row["completion"] for row in rows(output)]


def by_chat(spec: Any, prompts: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    said = "\n/reset\n".join(PROMPTS)
    monkeypatch.setattr(sys, "stdin", io.StringIO(said))
    monkeypatch.setattr(sys, "stdout", shown := io.StringIO())
    monkeypatch.setattr(sys, "stderr", told := io.StringIO())
    main(["chat", f"--model={json.dumps(spec)}", *(f"--sampling.{name}={value}" for name, value in GREEDY.items())])
    asked = [f"<user>{prompt}\n<assistant>" for prompt in PROMPTS]
    groups = made(spec).generate(asked, 1, SamplingParams(**GREEDY))
    # A token of all models is one.
    new, read = sum(len(group[0].token_ids) for group in groups), sum(map(len, asked))
    assert re.search(rf"3 answers: prompts {read} tokens .*, new {new} tokens", told.getvalue())
    return shown.getvalue().splitlines()


def by_evaluate(spec: Any, prompts: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    (folder / "suite.yaml").write_text(json.dumps(suite_of(prompts)))
    single = policy_spec(spec)["init_args"]["models"][0]
    models = json.dumps({"single": single, "both": spec})
    main(["evaluate", f"--models={models}", f"--suite={folder / 'suite.yaml'}", f"--output={folder / 'report'}"])
    return of_evaluation(folder / "report")


def by_label_steps(spec: Any, prompts: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    output, sampling = folder / "steps.jsonl", [f"--sampling.{name}={value}" for name, value in GREEDY.items()]
    counts = ["--num_solutions=1", "--num_completions=1", f"--verifier={VERIFIER}", f"--output={output}"]
    main(["label-steps", f"--model={json.dumps(spec)}", f"--prompts={prompts}", *counts, *sampling])
    return ["\n".join(row["completions"]) for row in rows(output)]


def by_python(spec: Any, prompts: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    return generate(spec, PROMPTS, **GREEDY)


COMMANDS = {
    "generate": by_generate,
    "chat": by_chat,
    "evaluate": by_evaluate,
    "label-steps": by_label_steps,
    "Python": by_python,
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("door", COMMANDS)
def test_commands(door, form, folders, prompts, tmp_path, monkeypatch):
    spec = FORMS[form](folders)
    asked = [f"<user>{prompt}\n<assistant>" for prompt in PROMPTS] if door == "chat" else PROMPTS
    expected = [text for (text,) in directly(spec, asked)]
    assert COMMANDS[door](spec, prompts, tmp_path, monkeypatch) == expected
    # The control: they are not those of one of its models.
    assert all(expected != [text for (text,) in directly([folder], asked)] for folder in folders)


# Stages.

STAGES: dict[str, tuple[dict[str, Any], Callable[[Path], list[str]]]] = {
    "sample": ({"rows": "samples", "num_samples": 1}, of_samples),
    "refine": (
        {"rows": "samples", "revisions": 1, "critique": "{prompt}{answer}?", "revision": "{prompt}{answer}{critique}!"},
        of_samples,
    ),
    "self-play": ({"rows": "samples"}, of_samples),
    "generate": ({}, lambda folder: [row["completion"] for row in rows(folder / "generated.jsonl")]),
    "label-steps": (
        {"num_solutions": 1, "num_completions": 1},
        lambda folder: ["\n".join(row["completions"]) for row in rows(folder / "steps.jsonl")],
    ),
    "evaluate": ({}, lambda folder: of_evaluation(folder / "evaluation")),
}


def pipeline(folder: Path, **stage: Any) -> Any:
    file = folder / "run.yaml"
    file.write_text(json.dumps({"run_dir": str(folder / "run"), "stages": {"door": stage}}))
    return load_pipeline(file)


def stage_of(kind: str, spec: Any, prompts: str) -> dict[str, Any]:
    if kind == "evaluate":
        single = policy_spec(spec)["init_args"]["models"][0]
        return {"kind": kind, "models": {"single": single, "both": spec}, "suite": suite_of(prompts)}
    opponents = {"opponents": [policy_spec(spec)["init_args"]["models"][0], spec]} if kind == "self-play" else {}
    verifier = {} if kind == "generate" else {"verifier": VERIFIER}
    common = {"kind": kind, "model": spec, "prompts": prompts, "sampling": GREEDY}
    return common | opponents | verifier | STAGES[kind][0]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", STAGES)
def test_stages_answer_again_when_one_of_the_models_has_changed(kind, form, folders, prompts, tmp_path):
    spec, read, place = FORMS[form](folders), STAGES[kind][1], tmp_path / "run" / "door"
    run = pipeline(tmp_path, **stage_of(kind, spec, prompts))
    before = [text for (text,) in directly(spec, PROMPTS)]
    assert run_pipeline(run, say=lambda line: None).stages["door"]["ran"]
    assert read(place) == before
    assert not run_pipeline(run, say=lambda line: None).stages["door"]["ran"]

    # One member's weights are others: nothing of before is taken for the new ensemble's.
    save_tiny_model(folders[1], "qwen3", seed=5)
    assert any(f"{folders[1]} changed" in line for line in plan_lines(run))
    assert run_pipeline(run, say=lambda line: None).stages["door"]["ran"]
    after = [text for (text,) in directly(spec, PROMPTS)]
    assert read(place) == after != before


def test_an_opponent_may_be_several_models(folders, prompts, tmp_path):
    spec = FORMS["class path"](folders)
    stage = stage_of("self-play", spec, prompts) | {"model": folders[0], "opponents": [folders[1], spec]}
    run_pipeline(pipeline(tmp_path, **stage), say=lambda line: None)
    found = rows(tmp_path / "run" / "door" / "samples.jsonl")
    answers = [[row["completion"] for row in found if row["prompt"] == prompt] for prompt in PROMPTS]
    players = [directly([folders[0]], PROMPTS), directly([folders[1]], PROMPTS), directly(spec, PROMPTS)]
    assert answers == [[player[n][0] for player in players] for n in range(len(PROMPTS))]
    league = json.loads((tmp_path / "run" / "door" / "league.json").read_text())
    assert [one["place"] for one in league["opponents"]] == [
        folders[1],
        f"{folders[0]} + {folders[1]}, combine=geometric, weights=[1.0, 3.0]",
    ]


def test_new_prompts_are_written_and_solved_by_several_models(folders, prompts, tmp_path):
    spec, solver = folders, FORMS["class path"](folders)
    drawn = {"temperature": 1.0, "max_new_tokens": 3}
    stage = {"model": spec, "solver": solver, "prompts": prompts, "writing": GREEDY, "sampling": drawn}
    options = {"number": 1, "num_examples": 1, "template": "{examples}", "num_samples": 8, "max_overlap": 1.0}
    run_pipeline(pipeline(tmp_path, kind="challenge", verifier=VERIFIER, **stage, **options), say=lambda line: None)
    (row,) = rows(tmp_path / "run" / "door" / "prompts.jsonl")
    asked = [f"Task: {prompt}" for prompt in PROMPTS]
    assert [row["prompt"]] in directly(spec, asked)
    seeds = [[derive_seed(derive_seed(0, "solve"), 0, sample) for sample in range(8)]]
    (texts,) = directly(solver, [row["prompt"]], 8, params=SamplingParams(**drawn), seeds=seeds)
    assert row["pass_rate"] == sum(odd_length([], texts)) / 8
    assert 0 < row["pass_rate"] < 1


# Specs of an ensemble.


def test_the_hash_is_of_all_models_and_of_how_they_are_combined(folders, prompts, tmp_path):
    plain, weighted = FORMS["list"](folders), FORMS["class path"](folders)
    hashes = [content_hash(Path(folder)) for folder in folders]
    assert model_hash(plain) == f"{hashes[0]} + {hashes[1]}"
    assert model_hash(weighted) == f"{hashes[0]} + {hashes[1]}, combine=geometric, weights=[1.0, 3.0]"
    assert model_hash(policy_spec(plain)) == model_hash(plain)
    own = {"class_path": f"{__name__}.OwnPolicy", "init_args": {"models": folders, "max_batch_tokens": 9}}
    assert model_hash(own) == f"{hashes[0]} + {hashes[1]}, class_path={__name__}.OwnPolicy"
    run_pipeline(pipeline(tmp_path, **stage_of("sample", weighted, prompts)), say=lambda line: None)
    found = rows(tmp_path / "run" / "door" / "samples.jsonl")
    assert {row["provenance"]["model"] for row in found} == {model_hash(weighted)}


def test_kept_results_of_commands_are_of_these_models_combined_so(folders, prompts, tmp_path):
    def answers(spec: Any) -> list[str]:
        evaluate({"both": spec}, suite_of(prompts), output=tmp_path / "report")
        return of_evaluation(tmp_path / "report")

    options = {"prompts": prompts, "output": str(tmp_path / "out.jsonl"), "sampling": SamplingParams(**GREEDY)}
    specs = [form(folders) for form in FORMS.values()]
    for spec in specs:
        assert answers(spec) == [text for (text,) in directly(spec, PROMPTS)]
    assert len(list((tmp_path / "report" / "parts").iterdir())) == 2
    answers(policy_spec(folders))  # the same, written in full
    assert len(list((tmp_path / "report" / "parts").iterdir())) == 2
    generate_rows(GenerateOptions(model=folders, **options))
    with pytest.raises(ValueError, match="model"):
        generate_rows(GenerateOptions(model=specs[1], **options))

    save_tiny_model(folders[1], "qwen3", seed=5)
    for spec in specs:
        assert answers(spec) == [text for (text,) in directly(spec, PROMPTS)]
    assert len(list((tmp_path / "report" / "parts").iterdir())) == 4
    with pytest.raises(ValueError, match="files"):
        generate_rows(GenerateOptions(model=folders, **options))


def test_a_class_of_one_s_own(folders):
    own = {"class_path": f"{__name__}.OwnPolicy", "init_args": {"models": folders}}
    assert generate(own, PROMPTS, **GREEDY) == [text for (text,) in directly(folders, PROMPTS)]


# Where it makes no sense.


BOTH = ["runs/a", "runs/b"]


def full(**options: Any) -> dict[str, Any]:
    return {"class_path": "EnsemblePolicy", "init_args": {"models": BOTH, **options}}


PASSED_ON = "is an ensemble of 'runs/a' and 'runs/b', and what is accepted is passed on as one folder: merge its models"


@pytest.mark.parametrize(
    ("stage", "message"),
    [
        ({"kind": "gate", "model": BOTH, "accepted": "m"}, f"model {PASSED_ON}"),
        ({"kind": "gate", "model": "m", "accepted": BOTH}, f"accepted {PASSED_ON}"),
        (
            {"kind": "rounds", "model": BOTH, "body": {"fit": {"kind": "fit", "config": "c.yaml"}}},
            f"model {PASSED_ON}",
        ),
        ({"kind": "export", "model": BOTH}, "and a GGUF file holds one: merge its models first"),
        ({"kind": "compress", "model": BOTH, "compressor": "truncation", "input": "r"}, "and a compressor is of one"),
        ({"kind": "sample", "model": BOTH, "server": {"url": "http://x"}}, "and a server samples from one: name one"),
        ({"kind": "generate", "model": BOTH, "server": {"url": "http://x"}}, "and a server samples from one"),
        ({"kind": "generate", "model": BOTH, "adapter": "x"}, "model is an ensemble: list the adapter's folder in it"),
        ({"kind": "generate", "model": BOTH, "speculation": "ngram"}, "an ensemble draws token by token: leave it out"),
        ({"kind": "generate", "model": BOTH, "cache": "static"}, "each model of an ensemble has a dynamic one"),
        ({"kind": "label-steps", "model": BOTH, "url": "http://x", "tokenizer": "t"}, "an ensemble has that of its"),
        ({"kind": "label-steps", "model": BOTH, "url": "http://x"}, "--url is of a server, which has one by that name"),
        ({"kind": "refine", "model": []}, "model combines the models []: list at least one folder or hub id"),
        ({"kind": "refine", "model": {"models": BOTH}}, "write a folder or hub id, a list of them, or class_path"),
        ({"kind": "challenge", "model": "m", "solver": 3}, "solver is 3: write a folder or hub id"),
        ({"kind": "self-play", "model": "m", "opponents": [[""]]}, "an opponent combines the models ['']"),
        ({"kind": "sample", "model": {"class_path": "LocalEngine"}}, "'LocalEngine' is not a dotted path"),
        (
            {"kind": "sample", "model": {"class_path": "rlhf_lightning.inference.RemoteEngine"}},
            "which is no EnsemblePolicy: a search is named by strategy, a server by server",
        ),
        (
            {"kind": "sample", "model": full(weight=[])},
            "init_args of model has no key 'weight'; did you mean 'weights'?",
        ),
        (
            {"kind": "sample", "model": full(dtype="x")},
            "init_args of model has 'dtype', which where the ensemble is used says: leave it out",
        ),
        (
            {"kind": "sample", "model": full(weights=[1])},
            "weights has 1 numbers for 2 models",
        ),
        (
            {"kind": "evaluate", "models": {"both": {"class_path": "EnsemblePolicy", "args": {}}}},
            "model 'both' has the key 'args': write class_path and init_args",
        ),
    ],
)
def test_refused_before_anything_runs(stage, message, prompts, tmp_path):
    needs = {"prompts": prompts} if stage["kind"] not in ("gate", "rounds", "export", "compress", "evaluate") else {}
    suite = {"suite": suite_of(prompts)} if stage["kind"] in ("gate", "evaluate") else {}
    with pytest.raises((ValueError, UsageError), match=re.escape(message)) as raised:
        run_pipeline(pipeline(tmp_path, **stage, **needs, **suite), say=lambda line: None)
    assert "\n" not in str(raised.value)
    assert not (tmp_path / "run").exists()


def test_refused_by_commands(prompts, tmp_path):
    pairs = {"name": "s", "tasks": [{"kind": "preferences", "name": "pairs", "rows": [{"prompt": "p"}]}]}
    with pytest.raises(ValueError, match="model 'both' is an ensemble of 'runs/a' and 'runs/b', and task 'pairs' has"):
        evaluate({"both": BOTH}, pairs)
    with pytest.raises(ValueError, match=re.escape("models has ['runs/a', 'runs/b'] without a name: write a mapping")):
        evaluate(["runs/c", BOTH], suite_of(prompts))  # type: ignore[list-item]
    with pytest.raises(ValueError, match=re.escape("models is [[a, b], c]: give an ensemble a name, as in '{sft: A,")):
        EvaluateOptions(models="[[a, b], c]", suite="s", output="o").named()
    with pytest.raises(ValueError, match="cache is 'int8', and each model of an ensemble has a dynamic one"):
        ChatOptions(model=BOTH, cache="int8").check()
    ChatOptions(model=BOTH).check()
    with pytest.raises(ValueError, match="there is no folder"):
        evaluate({"both": [str(tmp_path / "none"), "x"]}, suite_of(prompts))
    LabelOptions(prompts=prompts, output=str(tmp_path / "x"), model=BOTH).check()
