"""Suites, results and reports: values by hand, the same rows for every model, and clear refusals."""

from __future__ import annotations

import json
import shutil
from importlib import import_module
from pathlib import Path
from statistics import fmean, median
from types import SimpleNamespace
from typing import Any

import pytest
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from rlhf_lightning import cli
from rlhf_lightning.evaluation import (
    Suite,
    Task,
    TaskResult,
    compare,
    evaluate,
    read_history,
    run_task,
    wilson_interval,
)
from rlhf_lightning.evaluation.candidates import short_names
from rlhf_lightning.evaluation.report import Report
from rlhf_lightning.metrics.intervals import paired_bootstrap, share_interval
from rlhf_lightning.self_improvement import decide
from rlhf_lightning.utils.files import mark
from rlhf_lightning.utils.messages import UsageError

from ..helpers import char_tokenizer, save_tiny_model
from .scripted import ScriptedEngine

ROWS = [{"prompt": f"1+{n}=", "answer": str(n + 1)} for n in range(4)]


def write_rows(folder: Path, rows: list[dict[str, Any]] = ROWS) -> str:
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def engine(*texts: list[str]) -> ScriptedEngine:
    return ScriptedEngine({row["prompt"]: answers for row, answers in zip(ROWS, texts, strict=True)})


GREEDY = {"max_new_tokens": 5, "temperature": 0.0}
RIGHT, WRONG = [[f"#{n + 1}"] for n in range(4)], [["#9"]] * 4


def test_accuracy_lengths_and_truncation_of_greedy_answers(tmp_path: Path) -> None:
    task = Task(name="sums", prompts=write_rows(tmp_path))
    found = run_task(task, engine(["#1"], ["#2"], ["#7"], ["1 + 3..."]))
    assert list(found.scores.values()) == [1.0, 1.0, 0.0, 0.0]
    expected = wilson_interval(2, 4)
    assert found.accuracy == expected
    metrics = found.metrics
    assert (metrics["accuracy"], metrics["accuracy_low"]) == (0.5, expected.low)
    assert (metrics["truncated"], metrics["prompts"], metrics["without_verdict"]) == (0.25, 4, 0)
    assert (metrics["length/mean"], metrics["length/max"]) == (fmean([2, 2, 2, 5]), 5)
    assert "pass@1" not in metrics


def test_the_time_of_a_token_is_the_median_of_batches_without_verification(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three batches by a clock of ours: of 64, 64 and 2 prompts."""
    now, seconds = [0.0], iter([9.0, 1.0, 2.0])
    module = import_module("rlhf_lightning.evaluation.running")
    monkeypatch.setattr(module, "time", SimpleNamespace(perf_counter=lambda: now[0]))

    class Slow(ScriptedEngine):
        def generate(self, *args: Any, **kwargs: Any) -> Any:
            now[0] += next(seconds)
            return super().generate(*args, **kwargs)

    def verifier(prompts: Any, completions: list[str], **columns: Any) -> list[float]:
        now[0] += 100.0
        return [1.0] * len(completions)

    rows = [{"prompt": f"{n}+{n}=", "answer": "2"} for n in range(130)]
    task = Task(name="s", prompts=write_rows(tmp_path, rows))
    answers = {row["prompt"]: ["#22..." if n < 64 else "#2"] for n, row in enumerate(rows)}
    found = run_task(task, Slow(answers), verifier=verifier)
    # 64 answers of three tokens, 64 of two, and two of two.
    assert found.token_seconds == median([9 / 192, 1 / 128, 2 / 4]) == 9 / 192
    assert found.seconds == 312.0
    assert TaskResult.read(json.loads(json.dumps(found.as_dict()))) == found
    assert "token_seconds" not in found.metrics


def test_columns_with_other_names(tmp_path: Path) -> None:
    rows = [{"question": row["prompt"], "solution": row["answer"]} for row in ROWS]
    task = Task(name="s", prompts=write_rows(tmp_path, rows), columns={"prompt": "question", "answer": "solution"})
    assert list(run_task(task, engine(["#1"], ["#2"], ["#7"], ["#4"])).scores.values()) == [1.0, 1.0, 0.0, 1.0]


def test_several_samples_have_pass_and_majority_at_k(tmp_path: Path) -> None:
    task = Task(name="sums", prompts=write_rows(tmp_path), num_samples=4)
    found = run_task(task, engine(["#1"], ["#2", "#3", "#3", "#2"], ["#0", "#1", "#2", "#3"], ["#0"]))
    assert list(found.scores.values()) == [1.0, 0.5, 0.25, 0.0]
    metrics = found.metrics
    assert metrics["pass@1"] == pytest.approx(fmean([1, 1 / 2, 1 / 4, 0]))
    assert metrics["pass@2"] == pytest.approx(fmean([1, 5 / 6, 1 / 2, 0]))
    assert metrics["pass@4"] == pytest.approx(fmean([1, 1, 1, 0]))
    assert metrics["maj@4"] == pytest.approx(fmean([1, 1 / 2, 1 / 4, 0]))
    assert metrics["unique_answers"] == pytest.approx(fmean([1 / 4, 1 / 2, 1, 1 / 4]))


def test_the_best_of_several_by_a_scorer(tmp_path: Path) -> None:
    def score(prompts: Any, completions: list[str]) -> list[float | Exception]:
        return [ValueError("empty") if not text else float(len(text)) for text in completions]

    task = Task(name="sums", prompts=write_rows(tmp_path), num_samples=2, scorer="rlhf_lightning.rewards.exact_answer")
    # The longer one is right; both are equally long; the longer one is wrong; one has no score.
    found = run_task(task, engine(["#9", "so #1"], ["#2", "#9"], ["#3", "so #9"], ["#4", ""]), scorer=score)
    assert [sample.score for sample in found.prompts[0].samples] == [2.0, 5.0]
    assert found.metrics["best@1"] == 0.5
    assert found.metrics["best@2"] == pytest.approx(fmean([1, 0.5, 0]))
    assert found.metrics["pass@2"] == 1
    own = run_task(task, engine(["#9", "#1"], *RIGHT[1:]))  # by the verifier itself
    assert own.metrics["best@2"] == 1
    assert TaskResult.read(json.loads(json.dumps(own.as_dict()))) == own


def test_the_interval_of_a_share_stays_within_its_range(tmp_path: Path) -> None:
    task = Task(name="sums", prompts=write_rows(tmp_path), num_samples=2)
    low = run_task(task, engine(["#1", "#9"], *WRONG[1:])).accuracy
    high = run_task(task, engine(["#1", "#9"], *RIGHT[1:])).accuracy
    assert (low.value, high.value) == (0.125, 0.875)
    assert low == share_interval(4, 0.5, 0.25)
    assert high == share_interval(4, 3.5, 3.25)
    assert 0 < low.low < low.high < high.high < 1
    assert (high.low, high.high) == pytest.approx((1 - low.high, 1 - low.low))


def test_rows_without_a_verdict_are_counted_and_left_out(tmp_path: Path) -> None:
    rows = [*ROWS[:3], {"prompt": ROWS[3]["prompt"], "answer": None}]
    found = run_task(Task(name="sums", prompts=write_rows(tmp_path, rows)), engine(*RIGHT))
    assert (found.metrics["prompts"], found.metrics["without_verdict"], found.metrics["accuracy"]) == (3, 1, 1.0)


def test_samples_have_seeds_of_their_own_whatever_else_is_evaluated(tmp_path: Path) -> None:
    rows = write_rows(tmp_path)
    first, second = engine(*RIGHT), engine(*RIGHT)
    task = Task(name="sums", prompts=rows, num_samples=3)
    evaluate({"a": first}, Suite(name="one", tasks=(task,)), seed=5)
    tasks = (Task(name="other", prompts=rows), task)
    evaluate({"b": engine(*WRONG), "a": second}, Suite(name="two", tasks=tasks), seed=5)
    assert first.calls == second.calls[4:]
    seeds = [seed for _, row in first.calls for seed in row]
    assert len(set(seeds)) == 12


def test_models_are_compared_on_the_same_prompts(tmp_path: Path) -> None:
    suite = {"name": "small", "tasks": [{"name": "sums", "prompts": write_rows(tmp_path)}]}
    report = evaluate({"base": engine(["#1"], *WRONG[1:]), "better": engine(*RIGHT), "same": engine(*RIGHT)}, suite)
    assert [(found.model, found.baseline) for found in report.comparisons] == [("better", "base"), ("same", "base")]
    found = report.comparison("better", "sums")
    assert found is not None
    assert (found.comparison.difference, found.prompts, found.mcnemar) == (0.75, 4, 0.25)
    assert "| sums | better | 100.0% |" in report.table()
    equal = compare(report.result("better", "sums"), report.result("same", "sums"))
    assert (equal.comparison.difference, equal.comparison.p_value, equal.mcnemar) == (0.0, 1.0, 1.0)


def test_a_report_is_saved_read_and_remembered(tmp_path: Path) -> None:
    suite = {"name": "small", "tasks": [{"name": "sums", "prompts": write_rows(tmp_path), "num_samples": 2}]}
    models = {"base": engine(*WRONG), "<b>": engine(["#1", "<script>"], *RIGHT[1:])}
    out = tmp_path / "report"
    report = evaluate(models, suite, output=out, seed=2)
    assert Report.read(out) == report
    page = (out / "report.html").read_text()
    assert "&lt;b&gt;" in page
    assert "<script>" not in page
    evaluate(models, suite, output=out, seed=2)
    history = read_history(out)
    assert [(entry.model, entry.metrics["accuracy"]) for entry in history] == [("base", 0.0), ("<b>", 0.875)]
    assert [list(entry.scores.values()) for entry in history] == [[0.0] * 4, [0.5, 1.0, 1.0, 1.0]]
    assert history[1].compare(history[0], seed=2) == report.comparison("<b>", "sums")
    evaluate(models, suite, output=out, seed=3)
    assert len((out / "history.jsonl").read_text().splitlines()) == 2  # equal samples, whatever the seed: the same


def test_results_of_unchanged_models_are_not_computed_again(tmp_path: Path) -> None:
    folders = [save_tiny_model(tmp_path / name, seed=n) for n, name in enumerate(("one", "two"))]
    for folder in folders:
        char_tokenizer().save_pretrained(folder)
    task = {"name": "sums", "prompts": write_rows(tmp_path), "sampling": {"max_new_tokens": 3}}
    lines: list[str] = []
    first = evaluate(folders[:1], {"tasks": [task]}, output=tmp_path / "out", say=lines.append)
    parts = {path: path.stat().st_mtime_ns for path in (tmp_path / "out" / "parts").iterdir()}
    both = evaluate(folders, {"tasks": [task]}, output=tmp_path / "out", say=lines.append)
    assert both.results[0].prompts == first.results[0].prompts
    assert both.models == ["one", "two"]
    assert {path: path.stat().st_mtime_ns for path in parts} == parts
    assert len(list((tmp_path / "out" / "parts").iterdir())) == 2

    # Other weights in the same folder are another model.
    shutil.copytree(folders[1], folders[0], dirs_exist_ok=True)
    again = evaluate(folders[:1], {"tasks": [task]}, output=tmp_path / "out")
    assert again.results[0].prompts == both.results[1].prompts


def test_changed_prompts_and_verifiers_are_evaluated_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = save_tiny_model(tmp_path / "model")
    char_tokenizer().save_pretrained(folder)
    (tmp_path / "my_verifier.py").write_text(
        "def check(prompts, completions, **columns):\n    return [0.0] * len(prompts)\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.chdir(tmp_path)
    task = {"name": "a", "prompts": write_rows(tmp_path), "verifier": "my_verifier.check", "sampling": GREEDY}

    def parts() -> int:
        evaluate([folder], {"tasks": [task]}, output=tmp_path / "out")
        return len(list((tmp_path / "out" / "parts").iterdir()))

    assert parts() == parts() == 1
    write_rows(tmp_path, ROWS[:2])
    assert parts() == 2
    (tmp_path / "my_verifier.py").write_text(
        "def check(prompts, completions, **columns):\n    return [1.0] * len(prompts)\n"
    )
    assert parts() == 3


def test_results_of_another_version_are_computed_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = save_tiny_model(tmp_path / "model")
    char_tokenizer().save_pretrained(folder)
    task = {"name": "a", "prompts": write_rows(tmp_path), "sampling": GREEDY}

    def parts() -> int:
        evaluate([folder], {"tasks": [task]}, output=tmp_path / "out")
        return len(list((tmp_path / "out" / "parts").iterdir()))

    assert parts() == parts() == 1
    monkeypatch.setattr("rlhf_lightning.__version__", "0.0.0")
    assert parts() == 2


@pytest.mark.parametrize("torn", [False, True])
def test_an_interruption_loses_no_answered_chunk(
    torn: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """By the command: the second of two chunks is stopped, and then alone is asked; the results are the same."""
    folder = save_tiny_model(tmp_path / "model")
    char_tokenizer().save_pretrained(folder)
    task = {"name": "a", "prompts": write_rows(tmp_path), "num_samples": 2, "sampling": {"max_new_tokens": 3}}
    suite = tmp_path / "suite.yaml"
    suite.write_text(json.dumps({"tasks": [task]}))
    module = import_module("rlhf_lightning.evaluation.running")
    monkeypatch.setattr(module, "_PROMPTS_AT_ONCE", 2)
    ask, asked = module.ask_examples, []

    def counted(answering: Any, rows: Any, *args: Any, **kwargs: Any) -> Any:
        asked.append([row.row_id for row in rows])
        if len(asked) == 2:
            raise KeyboardInterrupt
        return ask(answering, rows, *args, **kwargs)

    monkeypatch.setattr(module, "ask_examples", counted)
    options = ["evaluate", "--models", str(folder), "--suite", str(suite), "--output", str(tmp_path / "out")]
    with pytest.raises(SystemExit) as stopped:
        cli.main(options)
    assert stopped.value.code == 130
    said = f"interrupted: the same command continues after the answers that are kept in {tmp_path / 'out'}"
    assert said in capsys.readouterr().err
    (journal,) = (tmp_path / "out" / "parts").iterdir()
    if torn:
        with journal.open("a") as file:
            file.write('{"prompts": [{"row_id": ')
    cli.main(options)
    assert [len(rows) for rows in asked] == [2, 2, 2]
    assert asked[1] == asked[2] != asked[0]
    assert not journal.exists()

    monkeypatch.setattr(module, "ask_examples", ask)
    again = evaluate([folder], suite, output=tmp_path / "other")
    found = Report.read(tmp_path / "out")
    assert [json.dumps(r.as_dict()["prompts"]) for r in found.results] == [
        json.dumps(r.as_dict()["prompts"]) for r in again.results
    ]
    histories = [
        [entry | {"time": 0} for entry in map(json.loads, (tmp_path / name / "history.jsonl").read_text().splitlines())]
        for name in ("out", "other")
    ]
    assert histories[0] == histories[1]


def test_estimates_at_k_have_intervals_and_paired_tests(tmp_path: Path) -> None:
    """Of 4 prompts, 3 samples each; the shares of pairs with a right one by hand: none of 3, 2 of 3, all, all."""
    few = engine(["#9", "#9", "#9"], ["#2", "#9", "#9"], ["#3", "#3", "#9"], ["#4", "#4", "#4"])
    all_right = engine(["#1"] * 3, ["#2"] * 3, ["#3"] * 3, ["#4"] * 3)
    suite = Suite(name="s", tasks=(Task(name="sums", prompts=write_rows(tmp_path), num_samples=3),))
    report = evaluate({"a": few, "b": all_right}, suite, output=tmp_path / "out")
    found = {(at_k.model, at_k.estimate): at_k for at_k in report.at_k}
    values = [0.0, 2 / 3, 1.0, 1.0]
    assert list(report.result("a", "sums").at_k["pass@2"].values()) == pytest.approx(values)
    expected = share_interval(4, sum(values), sum(v * v for v in values))
    interval = found["a", "pass@2"].interval
    assert (interval.value, interval.low, interval.high) == pytest.approx((fmean(values), expected.low, expected.high))
    assert found["a", "pass@2"].paired is None
    paired = found["b", "pass@2"].paired
    assert paired is not None
    of = paired_bootstrap([1.0] * 4, values, seed=0)
    got = paired.comparison
    assert (got.difference, got.low, got.high, got.p_value) == pytest.approx((1 / 3, of.low, of.high, of.p_value))
    assert (paired.differing, paired.mcnemar) == (2, None)
    assert found["b", "maj@3"].interval.value == 1.0

    line = next(line for line in report.table().splitlines() if line.startswith("| sums | b | pass@2 |"))
    assert f"| 100.0% | {found['b', 'pass@2'].interval.low:.1%} to 100.0% | +33.3% (" in line
    assert f"+33.3% ({got.low:+.1%} to {got.high:+.1%})" in report.page()
    written = json.loads((tmp_path / "out" / "results.json").read_text())["at_k"]
    assert [row["estimate"] for row in written if row["model"] == "b"] == [n for m, n in found if m == "b"]


def test_identical_verdicts_say_that_no_prompt_differs(tmp_path: Path) -> None:
    suite = Suite(name="s", tasks=(Task(name="sums", prompts=write_rows(tmp_path)),))
    same = evaluate({"a": engine(*RIGHT), "b": engine(*RIGHT)}, suite)
    assert "%): no prompt differs |" in same.table()
    assert "no prompt differs" in same.page()
    assert same.as_dict()["comparisons"][0]["differing"] == 0
    other = evaluate({"a": engine(*RIGHT), "b": engine(*WRONG)}, suite)
    assert "no prompt differs" not in other.table() + other.page()
    assert other.as_dict()["comparisons"][0]["differing"] == 4
    said = "; no prompt differs"
    assert decide(same.results[:1], same.results[1:]).reason.endswith(said)
    assert said not in decide(other.results[:1], other.results[1:]).reason


def test_answers_without_any_verdict_are_not_kept(tmp_path: Path) -> None:
    """A verifier that has no verdict now may have one later."""
    folder = save_tiny_model(tmp_path / "model")
    char_tokenizer().save_pretrained(folder)
    task = {"name": "a", "prompts": write_rows(tmp_path), "sampling": GREEDY, "verifier": f"{__name__}.silent"}
    with pytest.raises(ValueError, match="has no verdict for any answer of 'model'"):
        evaluate([folder], {"tasks": [task]}, output=tmp_path / "out")
    assert not list((tmp_path / "out").rglob("*.jsonl"))


def silent(prompts: Any, completions: list[str], **columns: Any) -> list[None]:
    return [None] * len(completions)


def test_adapters_are_evaluated_on_their_base(tmp_path: Path) -> None:
    base = save_tiny_model(tmp_path / "base")
    char_tokenizer().save_pretrained(base)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), LoraConfig(r=2, init_lora_weights=False))
    model.peft_config["default"].base_model_name_or_path = str(base)
    model.save_pretrained(tmp_path / "adapter")
    char_tokenizer().save_pretrained(tmp_path / "adapter")
    model.merge_and_unload().save_pretrained(tmp_path / "merged")
    char_tokenizer().save_pretrained(tmp_path / "merged")
    task = {"name": "a", "prompts": write_rows(tmp_path), "sampling": GREEDY}
    found = evaluate([tmp_path / name for name in ("base", "adapter", "merged")], {"tasks": [task]})
    texts = [[prompt.samples[0].text for prompt in result.prompts] for result in found.results]
    assert texts[1] == texts[2] != texts[0]


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = save_tiny_model(tmp_path / "model")
    char_tokenizer().save_pretrained(folder)
    suite = tmp_path / "suite.yaml"
    suite.write_text(f"name: mine\ntasks:\n  - {{name: sums, prompts: {write_rows(tmp_path)}, limit: 2}}\n")
    args = ["evaluate", "--models", f"{folder},{folder}/.", "--suite", str(suite), "--output", str(tmp_path / "out")]
    cli.main([*args[:2], str(folder), *args[3:]])
    out = capsys.readouterr().out
    assert "| sums | model | 0.0% |" in out
    assert (tmp_path / "out" / "report.html").is_file()
    with pytest.raises(SystemExit):
        cli.main([*args[:2], str(folder), "--sute", "x"])


@pytest.mark.parametrize(
    ("suite", "word"),
    [
        ({"name": "empty", "tasks": []}, "suite 'empty' has no tasks"),
        ({"tasks": [{"name": "a"}]}, "task 'a' has no prompts"),
        ({"tasks": [{"name": "a", "prompts": "x", "verifer": "y"}]}, "did you mean 'verifier'"),
        ({"tasks": [{"name": "a", "prompts": "x"}] * 2}, "two tasks named 'a'"),
        ({"tasks": [{"name": "a", "prompts": "x", "sampling": {"temperatur": 1}}]}, "did you mean 'temperature'"),
        ({"tasks": [{"name": "a", "prompts": "x", "num_samples": 0}]}, "num_samples is 0"),
        (
            {"tasks": [{"name": "a", "prompts": "x", "num_samples": 2, "sampling": {"temperature": 0.0}}]},
            "which are all equal",
        ),
    ],
)
def test_suites_that_are_refused(suite: dict[str, Any], word: str) -> None:
    with pytest.raises(ValueError, match=word):
        Suite.read(suite)


def test_a_missing_suite_names_a_near_one() -> None:
    with pytest.raises(FileNotFoundError, match=r"did you mean 'configs/suites/arithmetic\.yaml'"):
        Suite.read("configs/suites/arithmetics.yaml")


def test_a_verifier_that_raises_or_is_misspelt(tmp_path: Path) -> None:
    rows = write_rows(tmp_path)
    task = {"name": "a", "prompts": rows, "verifier": "rlhf_lightning.rewards.exact_anwser"}
    with pytest.raises(ValueError, match="exact_anwser"):
        evaluate({"a": engine(*RIGHT)}, {"tasks": [task]})
    with pytest.raises(
        ValueError, match="verifier of task 'a' failed on all of 4 answers of 'model': RuntimeError: broken"
    ):
        run_task(Task(name="a", prompts=rows), engine(*RIGHT), verifier=broken)


def broken(prompts: Any, completions: Any, **columns: Any) -> list[float]:
    raise RuntimeError("broken")


def test_no_verdict_at_all(tmp_path: Path) -> None:
    rows = write_rows(tmp_path, [{"prompt": row["prompt"], "answer": None} for row in ROWS])
    with pytest.raises(ValueError, match="no verdict for any answer"):
        run_task(Task(name="a", prompts=rows), engine(*RIGHT))


def test_a_column_that_the_verifier_reads_is_missing(tmp_path: Path) -> None:
    rows = write_rows(tmp_path, [{"prompt": row["prompt"], "solution": "1"} for row in ROWS])
    with pytest.raises(ValueError, match="task 'a' reads the column 'answer': its prompts have solution"):
        run_task(Task(name="a", prompts=rows), engine(*RIGHT))


def test_a_missing_model_is_found_before_the_others_answer(tmp_path: Path) -> None:
    first, task = engine(*RIGHT), {"name": "a", "prompts": write_rows(tmp_path)}
    with pytest.raises((ValueError, OSError), match="missing"):
        evaluate({"a": first, "b": tmp_path / "missing"}, {"tasks": [task]}, output=tmp_path / "out")
    assert first.calls == []
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("kind", ["model", "stage", "downloaded"])
def test_a_report_is_not_written_into_a_model_or_a_run(kind: str, tmp_path: Path) -> None:
    prompts, place = write_rows(tmp_path), tmp_path / "place"
    place.mkdir()
    (place / "config.json").write_text("{}") if kind == "downloaded" else mark(place, kind, ["model.safetensors"])
    before = {file.name: file.read_bytes() for file in place.iterdir()}
    with pytest.raises(ValueError, match=r"place' is the folder of a (model|stage), and a report would change it"):
        evaluate({"a": engine(*RIGHT)}, {"tasks": [{"name": "a", "prompts": prompts}]}, output=place)
    assert {file.name: file.read_bytes() for file in place.iterdir()} == before


def test_an_output_that_was_not_written_by_an_evaluation_stays(tmp_path: Path) -> None:
    (tmp_path / "results.json").write_text("mine")
    with pytest.raises(ValueError, match="already exists"):
        evaluate({"a": engine(*RIGHT)}, {"tasks": [{"name": "a", "prompts": write_rows(tmp_path)}]}, output=tmp_path)
    assert (tmp_path / "results.json").read_text() == "mine"


def test_names_of_folders() -> None:
    assert short_names(["runs/a/model", "runs/b/model", "runs/b/other/model"]) == ["a", "b", "b/other"]
    assert short_names(["x", "runs/x"]) == ["x", "runs/x"]
    with pytest.raises(ValueError, match="given twice"):
        short_names(["a/b", "a//b"])
    with pytest.raises(ValueError, match="models is 'runs/a'"):
        evaluate("runs/a", {"tasks": [{"name": "a", "prompts": "x"}]})


def test_results_are_plain_values(tmp_path: Path) -> None:
    found = run_task(Task(name="sums", prompts=write_rows(tmp_path)), engine(*RIGHT))
    assert TaskResult.read(json.loads(json.dumps(found.as_dict()))) == found


def test_the_usage_error_is_one_line() -> None:
    from rlhf_lightning.evaluation.command import run_command

    with pytest.raises(UsageError, match=r"evaluate: .*suit"):
        run_command(["--models", "a", "--suit", "b", "--output", "c"])
