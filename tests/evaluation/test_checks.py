"""Mistakes in suites are found before anything is sampled; what fails later is named and costs no finished sample."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from rlhf_lightning import cli
from rlhf_lightning.evaluation import Suite, Task, evaluate, read_history, run_task
from rlhf_lightning.evaluation.checks import check_suite
from rlhf_lightning.utils.files import content_hash

from ..helpers import save_tiny_model
from .scripted import ScriptedEngine

ROWS = [{"prompt": f"1+{n}=", "answer": str(n + 1)} for n in range(4)]
HERE = __name__


def write(folder: Path, rows: list[dict[str, Any]], name: str = "rows.jsonl") -> str:
    (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(folder / name)


def engine() -> ScriptedEngine:
    return ScriptedEngine({row["prompt"]: [f"#{row['answer']}"] for row in ROWS})


class Judging:
    """A judge that fails."""

    def __call__(self, questions: Any) -> Any:
        raise RuntimeError("judge down")


class Lists:
    """A judge that answers with a list at first, and then always no: neither answer is better."""

    def __call__(self, questions: Any) -> Any:
        return [[0.5], *[0.0] * (len(questions) - 1)]


def odd_fails(prompts: Any, completions: list[str], answer: list[str]) -> list[float]:
    return [1 / (int(text) % 2 == 0) for text in answer]


def fails(prompts: Any, completions: list[str], **columns: Any) -> list[float]:
    raise KeyError("answer")


MISTAKES: list[tuple[dict[str, Any], str]] = [
    ({"prompts": "nofile.jsonl"}, "task 'late': no file, folder or dataset 'nofile.jsonl'"),
    ({"strategy": "best_of_m"}, "task 'late': there is no strategy 'best_of_m'"),
    ({"strategy": {"class_path": "BestOfN", "init_args": {"m": 3}}}, "task 'late': "),
    ({"section": "part"}, "the section of task 'late' is the column 'part': its prompts have answer"),
    ({"scorer": "nowhere.score"}, "task 'late': verifier 'nowhere.score' cannot be imported"),
    ({"verifier": "nowhere.right"}, "task 'late': verifier 'nowhere.right' cannot be imported"),
    ({"win_rate": {"judge": "no/such/judge"}}, "task 'late': judge: there is no folder"),
    ({"win_rate": {"judge": {"class_path": f"{HERE}.Judging", "init_args": {"a": 1}}}}, "task 'late': judge "),
    ({"columns": {"prompt": "question"}}, "question"),
    (
        {"verifier": {"class_path": "rlhf_lightning.rewards.RewardModelReward", "init_args": {"model": "no/such/rm"}}},
        "task 'late': verifier RewardModelReward: there is no folder",
    ),
]


@pytest.mark.parametrize(("change", "message"), MISTAKES)
def test_a_mistake_in_the_last_task_costs_no_sample(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    prompts, asked = write(tmp_path, ROWS), engine()
    tasks = [{"name": "first", "prompts": prompts}, {"name": "late", "prompts": prompts} | change]
    with pytest.raises(ValueError, match=re.escape(message)) as raised:
        evaluate({"a": asked}, {"tasks": tasks}, output=tmp_path / "out")
    assert "\n" not in str(raised.value)
    assert asked.calls == []
    assert not (tmp_path / "out").exists()
    with pytest.raises(ValueError, match=re.escape(message)):
        check_suite({"tasks": tasks})


def test_what_a_stage_will_write_is_not_looked_for(tmp_path: Path) -> None:
    """And hides no other mistake of the suite."""
    later = {"name": "late", "prompts": f"{tmp_path}/run/own/rows.jsonl", "scorer": "no.score"}
    with pytest.raises(ValueError, match=r"rows\.jsonl"):
        check_suite({"tasks": [{key: value for key, value in later.items() if key != "scorer"}]})
    with pytest.raises(ValueError, match=r"task 'late': verifier 'no\.score'"):
        check_suite({"tasks": [later]}, [f"{tmp_path}/run/own/"])
    del later["scorer"]
    assert check_suite({"tasks": [later]}, [f"{tmp_path}/run/own/"]).tasks[0].name == "late"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"success": "x"}, "success of task 'sums' is 'x'; it must be a finite number"),
        ({"success": None}, "success of task 'sums' is None"),
        ({"success": True}, "success of task 'sums' is True"),
        ({"votes": "no"}, "votes of task 'sums' is 'no'; it must be true or false"),
        ({"sampling": 4}, "sampling of task 'sums' is 4; it must be a mapping"),
        ({"sampling": {"temperature": "hot"}}, "sampling of task 'sums' is {'temperature': 'hot'}"),
        ({"sampling": {"top_p": 3.0}}, "sampling of task 'sums' is {'top_p': 3.0}"),
        ({"columns": ["a"]}, "columns of task 'sums' is ['a']; it must be a mapping of names"),
        ({"columns": {"prompt": 3}}, "columns of task 'sums' is {'prompt': 3}"),
        ({"section": 3}, "section of task 'sums' is 3; it must be the name of a column"),
        ({"chat_template_kwargs": "no"}, "chat_template_kwargs of task 'sums' is 'no'"),
        ({"num_samples": 1100}, "num_samples of task 'sums' is 1100; maj@k and best@k take at most 1000"),
        ({"num_samples": 1100, "votes": False, "scorer": "a.b"}, "num_samples of task 'sums' is 1100"),
        ({"kind": "first_errors", "threshold": "x"}, "threshold is x"),
        ({"kind": "first_errors", "chat": "no"}, "chat of task 'sums' is 'no'; it must be true or false"),
        ({"kind": "preferences", "sections": []}, "sections of task 'sums' is []; it must be a mapping"),
    ],
)
def test_options_of_other_types(options: dict[str, Any], message: str) -> None:
    source = "rows" if "kind" in options else "prompts"
    with pytest.raises(ValueError, match=re.escape(message)) as raised:
        Suite.read({"tasks": [{"name": "sums", source: "x"} | options]})
    assert "\n" not in str(raised.value)


def test_many_samples_without_votes() -> None:
    assert Task(name="sums", prompts="x", num_samples=1100, votes=False).ks[-1] == 1100


def test_rows_of_the_last_task_are_read_first(tmp_path: Path) -> None:
    rows = write(tmp_path, [{"prompt": "a", "chosen": "b", "rejected": "c"}, {"prompt": "a", "chosen": "b"}])
    asked = engine()
    tasks = [{"name": "first", "prompts": write(tmp_path, ROWS, "p.jsonl")}]
    with pytest.raises(ValueError, match=r"task 'pairs': .*rows\.jsonl:2"):
        evaluate({"a": asked}, {"tasks": [*tasks, {"kind": "preferences", "name": "pairs", "rows": rows}]})
    assert asked.calls == []


def test_files_of_suites_are_named(tmp_path: Path) -> None:
    file = tmp_path / "suite.yaml"
    file.write_text("name: a\ntasks:\n- {name: b, prompts: x, votes: true, votes: false}\n")
    with pytest.raises(ValueError, match=rf"^{re.escape(str(file))}: .*found the key 'votes' twice"):
        Suite.read(file)
    file.write_bytes(b"name: \xff\xfe")
    with pytest.raises(ValueError, match=rf"^{re.escape(str(file))}: "):
        Suite.read(file)


@pytest.mark.parametrize("damage", ['{"a\x00', "[1]", '{"prompts": 3}', ""])
def test_a_damaged_result_is_named(damage: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, out = str(save_tiny_model(tmp_path / "m", "llama")), tmp_path / "out"
    suite = tmp_path / "suite.yaml"
    suite.write_text(json.dumps({"tasks": [{"name": "a", "prompts": write(tmp_path, ROWS), "limit": 2}]}))
    evaluate([model], suite, output=out)
    (part,) = (out / "parts").iterdir()
    part.write_text(damage)
    with pytest.raises(SystemExit):
        cli.main(["evaluate", f"--models={model}", f"--suite={suite}", f"--output={out}"])
    said = capsys.readouterr().err.splitlines()[-1]
    assert f"the kept result '{part}' is damaged (" in said
    assert said.endswith("restore it, or delete it: it is then computed again")
    assert part.read_text() == damage


def test_samples_on_which_a_verifier_fails_have_no_verdict(tmp_path: Path) -> None:
    task = Task(name="sums", prompts=write(tmp_path, ROWS))
    with pytest.warns(UserWarning, match="failed on 2 of 4 answers of 'sft', which have none: ZeroDivisionError"):
        found = run_task(task, engine(), model="sft", verifier=odd_fails)
    assert list(found.scores.values()) == [1.0, 1.0]
    assert (found.metrics["prompts"], found.metrics["without_verdict"]) == (2, 2)


def test_a_verifier_that_always_fails_is_named_and_finished_tasks_stay(tmp_path: Path) -> None:
    model, out, prompts = str(save_tiny_model(tmp_path / "m", "llama")), tmp_path / "out", write(tmp_path, ROWS)
    tasks = [{"name": "one", "prompts": prompts}, {"name": "two", "prompts": prompts, "verifier": f"{HERE}.fails"}]
    message = "^the verifier of task 'two' failed on all of 4 answers of 'm': KeyError: 'answer'; correct it, or the"
    with pytest.raises(ValueError, match=message):
        evaluate([model], {"tasks": tasks}, output=out)
    assert len([*(out / "parts").iterdir()]) == 1


def test_a_judge_that_fails_is_named_and_answers_stay(tmp_path: Path) -> None:
    models = [str(save_tiny_model(tmp_path / name, "llama", seed=n)) for n, name in enumerate("ab")]
    judge = {"judge": {"class_path": f"{HERE}.Judging"}}
    task = {"name": "sums", "prompts": write(tmp_path, ROWS), "win_rate": judge}
    message = "^win rate of 'b' on task 'sums': the judge failed: RuntimeError: judge down$"
    with pytest.raises(ValueError, match=message):
        evaluate(models, {"tasks": [task]}, output=tmp_path / "out")
    assert len([*(tmp_path / "out/parts").iterdir()]) == 2


def test_a_list_is_no_verdict(tmp_path: Path) -> None:
    wrong = ScriptedEngine({row["prompt"]: ["#9"] for row in ROWS})
    task = {"name": "sums", "prompts": write(tmp_path, ROWS), "win_rate": {"judge": {"class_path": f"{HERE}.Lists"}}}
    (found,) = evaluate({"right": engine(), "wrong": wrong}, {"tasks": [task]}).wins
    assert (found.rate.undecided, found.rate.ties) == (1, 3)


def test_rows_that_a_reward_fails_on_are_named(tmp_path: Path) -> None:
    rows = write(tmp_path, [{"prompt": "a", "chosen": "b", "rejected": "c"}])
    suite = {"tasks": [{"kind": "preferences", "name": "pairs", "rows": rows}]}
    with pytest.raises(ValueError, match=r"^task 'pairs', scored by 'mine': KeyError: 'answer'$"):
        evaluate({"mine": fails}, suite)


def test_prompts_that_do_not_fit_have_no_verdict_and_are_named(tmp_path: Path) -> None:
    """The tiny model's tokens are characters; others have the samples that they have without the long row."""
    model = str(save_tiny_model(tmp_path / "m", "llama", max_position_embeddings=32))
    rows = [*ROWS[:2], {"prompt": "1" * 40, "answer": "1"}, *ROWS[2:]]
    task = {"name": "sums", "prompts": write(tmp_path, rows), "num_samples": 2, "sampling": {"max_new_tokens": 4}}
    message = r"^1 of 5 prompts of task 'sums' do not fit model 'm' and have no verdict: it has room for 31 tokens"
    with pytest.warns(UserWarning, match=message + r" before an answer, and .*rows\.jsonl:3 has 4\d$"):
        report = evaluate([model], {"tasks": [task]}, output=tmp_path / "out")
    (found,) = report.results
    assert (found.metrics["prompts"], found.metrics["without_verdict"]) == (4, 1)
    assert [len(prompt.samples) for prompt in found.prompts] == [2, 2, 0, 2, 2]
    assert "(the prompt leaves no room for an answer)" in (tmp_path / "out/report.html").read_text()
    rows[2] = {"prompt": "1+1=", "answer": "2"}
    task["prompts"] = write(tmp_path, rows, "short.jsonl")
    (whole,) = evaluate([model], {"tasks": [task]}).results
    texts = [[[sample.text for sample in prompt.samples] for prompt in result.prompts] for result in (found, whole)]
    assert [*texts[0][:2], *texts[0][3:]] == [*texts[1][:2], *texts[1][3:]]


def test_a_task_that_does_not_fit_at_all_is_found_first(tmp_path: Path) -> None:
    model, asked = str(save_tiny_model(tmp_path / "m", "llama", max_position_embeddings=32)), engine()
    long = write(tmp_path, [{"prompt": "1" * 50, "answer": "1"}, {"prompt": "1" * 40, "answer": "1"}], "long.jsonl")
    tasks = [{"name": "sums", "prompts": write(tmp_path, ROWS)}, {"name": "long", "prompts": long, "limit": 2}]
    asked.answers = {**asked.answers, "1" * 40: ["#1"], "1" * 50: ["#1"]}
    message = r"^no prompt of task 'long' fits model 'm', which has room for 31 tokens before an answer: the shortest, "
    with pytest.raises(ValueError, match=message + r".*long\.jsonl:2, has 4\d"):
        evaluate({"other": asked, "m": model}, {"tasks": tasks})
    assert asked.calls == []


def test_the_history_tells_models_apart(tmp_path: Path) -> None:
    models = [save_tiny_model(tmp_path / name, "llama", seed=n) for n, name in enumerate("ab")]
    suite = {"tasks": [{"name": "sums", "prompts": write(tmp_path, ROWS), "sampling": {"max_new_tokens": 4}}]}
    for model in models:
        evaluate({"candidate": model}, suite, output=tmp_path / "out")
    hashes = [entry.model_hash for entry in read_history(tmp_path / "out")]
    assert hashes == [content_hash(model) for model in models]
    # Lines of earlier releases have none.
    file = tmp_path / "out/history.jsonl"
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    del lines[0]["model_hash"]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert [entry.model_hash for entry in read_history(file)] == [None, hashes[1]]
