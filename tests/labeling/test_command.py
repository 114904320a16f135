"""``rlhf-lightning label-steps``: its rows, what it says of mistakes, and how it resumes after an interruption."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from rlhf_lightning.cli import main
from rlhf_lightning.datamodules import StepwiseDataModule
from rlhf_lightning.inference import Completion
from rlhf_lightning.labeling import command
from rlhf_lightning.labeling.command import LabelOptions, label_prompts

from ..helpers import char_tokenizer
from ..inference.served import completion, serve
from ..test_cli import refused

TOKENIZER = char_tokenizer()
PROBLEMS = [{"prompt": f"{n}+1=?", "answer": str(n + 1)} for n in range(5)]


def rows_of(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


class Scripted:
    """Solves ``n+1=?`` in two steps; the first is ``so``, right in every second solution.

    After the prefix with ``so`` one completion in four is right; solutions 2 and 3 repeat 0 and 1, and the last of five
    is cut off.
    """

    def __init__(self, fail_at: int | None = None) -> None:
        self.calls = 0
        self.prompts: list[str] = []
        self.fail_at = fail_at

    def generate(self, prompts, num_samples=1, sampling=None, *, seeds=None):
        self.calls += 1
        if self.calls == self.fail_at:
            raise KeyboardInterrupt
        texts = [TOKENIZER.decode(ids) for ids in prompts]
        self.prompts += texts
        return [[self.sample(text, number) for number in range(num_samples)] for text in texts]

    def sample(self, text: str, number: int) -> Completion:
        right = int(text.split("+")[0]) + 1
        if text.endswith("so\n"):
            return Completion([], f"#{right if number % 4 == 0 else 0}", [], "stop")
        answer = right if number % 2 == 0 else 0
        return Completion([], f"so\n#{answer}", [], "length" if number == 4 else "stop")


@pytest.fixture
def problems(tmp_path):
    file = tmp_path / "problems.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in PROBLEMS))
    return str(file)


@pytest.fixture
def scripted(monkeypatch, tiny_model_folder, problems, tmp_path):
    """Runs the command with a scripted engine, two prompts at once."""
    monkeypatch.setattr(command, "_PROMPTS_AT_ONCE", 2)

    def run(engine: Scripted, *further: str) -> Path:
        monkeypatch.setattr(command, "_engine", lambda options, tokenizer: engine)
        output = tmp_path / "out/steps.jsonl"
        options = ["--num_solutions=5", "--num_completions=8", f"--output={output}", f"--prompts={problems}"]
        main(["label-steps", f"--model={tiny_model_folder()}", *options, *further])
        return output

    return run


def test_labels_are_the_ones_of_the_script(scripted, capsys):
    engine = Scripted()
    found = rows_of(scripted(engine))
    # Of five solutions two repeat others and one is cut off; the first step of the others is saved by 2 of 8.
    assert found == [
        {**row, "completions": ["so", f"#{answer}"], "labels": [0.25, float(answer == int(row["answer"]))]}
        for row in PROBLEMS
        for answer in (int(row["answer"]), 0)
    ]
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].endswith("2 of 5 prompts: 4 solutions labelled")
    assert lines[-2] == (
        "10 solutions of 5 prompts in 20 steps: mean label 0.38, 50% right; skipped: 5 cut off, 10 duplicates"
    )
    assert engine.prompts[:4] == ["0+1=?", "1+1=?", "0+1=?so\n", "0+1=?so\n"]


def test_hard_labels_and_skipping(scripted):
    assert [row["labels"] for row in rows_of(scripted(Scripted(), "--labels=hard"))] == [[1.0, 1.0], [1.0, 0.0]] * 5


def test_an_interrupted_run_continues_where_it_was(scripted, capsys):
    first = Scripted(fail_at=4)  # in the labels of the second pair of prompts
    with pytest.raises(SystemExit) as exit_info:
        scripted(first)
    assert exit_info.value.code == 130
    assert "interrupted: the same command resumes" in capsys.readouterr().err
    second = Scripted()
    output = scripted(second)
    assert {text.split("+")[0] for text in second.prompts} == {"2", "3", "4"}
    assert sorted(path.name for path in output.parent.iterdir()) == ["steps.jsonl"]
    whole = output.read_text()
    output.unlink()
    assert scripted(Scripted()).read_text() == whole


def test_a_line_that_was_cut_off_is_done_again(scripted, tmp_path):
    with pytest.raises(SystemExit):
        scripted(Scripted(fail_at=5))
    journal = tmp_path / "out/.steps.jsonl.journal"
    assert not (tmp_path / "out/steps.jsonl").exists()
    kept = journal.read_bytes()
    assert kept.count(b"\n") == 3
    journal.write_bytes(kept[:-20])
    second = Scripted()
    assert len(rows_of(scripted(second))) == 10
    assert {text.split("+")[0] for text in second.prompts} == {"2", "3", "4"}


def test_a_run_does_not_continue_with_other_settings(scripted, capsys, tmp_path):
    with pytest.raises(SystemExit):
        scripted(Scripted(fail_at=3))
    capsys.readouterr()
    with pytest.raises(SystemExit) as exit_info:
        scripted(Scripted(), "--labels=hard", "--seed=1")
    assert exit_info.value.code == 1
    said = capsys.readouterr().err
    assert "was started with different labels and seed: resume with the same" in said
    with (tmp_path / "problems.jsonl").open("a") as file:
        file.write(json.dumps({"prompt": "7+1=?", "answer": "8"}) + "\n")
    with pytest.raises(SystemExit):
        scripted(Scripted())
    assert "was started with different files" in capsys.readouterr().err
    scripted(Scripted(), f"--output={tmp_path / 'another.jsonl'}")
    assert len(rows_of(tmp_path / "another.jsonl")) == 12


def test_solutions_that_the_rows_bring(tiny_model_folder, tmp_path):
    source = tmp_path / "solved.jsonl"
    solved = [
        {"prompt": "1+2=?", "completion": "so\n#3", "answer": "3"},
        {"prompt": "2+2=?", "completions": ["#5"], "answer": "4", "labels": [7]},
        {"prompt": "2+3=?", "completion": "#5", "answer": None},
    ]
    source.write_text("".join(json.dumps(row) + "\n" for row in solved))
    options = LabelOptions(
        str(source), str(tmp_path / "steps.jsonl"), str(tiny_model_folder()), num_solutions=0, num_completions=2
    )
    found = label_prompts(options, say=lambda line: None)
    first, second = rows_of(tmp_path / "steps.jsonl")
    assert (first["completions"], first["labels"][-1]) == (["so", "#3"], 1.0)
    assert second == {"prompt": "2+2=?", "completions": ["#5"], "answer": "4", "labels": [0.0]}
    assert (found["solutions"], found["without verdict"], found["right"]) == (2, 1, 0.5)


LONG = "9" * 130  # the model has 128 positions


def test_what_is_too_long_costs_itself_alone(scripted, tmp_path, problems, capsys):
    """Prompts and the rows' own solutions beyond the model's positions are counted; with error, nothing is lost."""
    whole = rows_of(scripted(Scripted()))
    rows = [*PROBLEMS[:3], {"prompt": f"{LONG}+1=?", "answer": "0"}, *PROBLEMS[3:]]
    Path(problems).write_text("".join(json.dumps(row) + "\n" for row in rows))
    output = tmp_path / "out/steps.jsonl"
    output.unlink()
    first, second = Limited(), Limited()
    with pytest.raises(SystemExit) as exit_info:
        scripted(first, "--on_too_long=error")
    assert exit_info.value.code == 1
    assert "problems.jsonl:4 is too long: its prompt has 134 tokens, and at most 127 can" in capsys.readouterr().err
    assert not output.exists()
    assert rows_of(scripted(second)) == whole
    assert {text.split("+")[0] for text in second.prompts} == {"2", "3", "4"}, "what was done is kept"
    assert capsys.readouterr().out.splitlines()[-2].endswith("skipped: 1 too long, 5 cut off, 10 duplicates")


class Limited(Scripted):
    """An engine that says how much it takes."""

    def longest_prompt(self, sampling: Any) -> int:
        return 127


def test_solutions_of_the_rows_that_are_too_long(tiny_model_folder, tmp_path):
    source, output = tmp_path / "solved.jsonl", tmp_path / "steps.jsonl"
    solved = [
        {"prompt": "1+2=?", "completion": "so\n#3", "answer": "3"},
        {"prompt": "2+2=?", "completions": [LONG, "#4"], "answer": "4"},
        {"prompt": "2+3=?", "completions": ["so", LONG], "answer": "5"},  # nothing is completed after its last step
    ]
    source.write_text("".join(json.dumps(row) + "\n" for row in solved))
    options = LabelOptions(str(source), str(output), str(tiny_model_folder()), num_solutions=0, num_completions=1)
    found = label_prompts(options, say=lambda line: None)
    assert [row["prompt"] for row in rows_of(output)] == ["1+2=?", "2+3=?"]
    assert (found["prompts"], found["solutions"], found["too long"]) == (3, 2, 1)


def test_the_embedded_task_from_end_to_end(tiny_model_folder, tmp_path, capsys):
    def run(name: str) -> Path:
        output = tmp_path / name
        args = ["--prompts=sums:prompts?rows=6&terms=3", f"--output={output}", f"--model={tiny_model_folder()}"]
        sizes = [
            "--num_solutions=3",
            "--num_completions=2",
            "--sampling.max_new_tokens=90",
            "--step_separator=\\n",
        ]
        main(["label-steps", *args, *sizes, "--seed=3"])
        return output

    output = run("steps.jsonl")
    found = rows_of(output)
    assert len(found) >= 3
    assert all(row.keys() == {"prompt", "answer", "completions", "labels"} for row in found)
    assert all(label in (0.0, 0.5, 1.0) for row in found for label in row["labels"])
    data = StepwiseDataModule(train=str(output), tokenizer=TOKENIZER, global_batch_size=64, shuffle=False)
    data.setup("fit")
    (batch,) = data.train_dataloader()
    for row, example in zip(found, batch, strict=True):
        assert example.fields["labels"] == row["labels"]
        assert TOKENIZER.decode(example.root.tokens) == row["prompt"]
        (steps,) = example.root.children
        assert TOKENIZER.decode(steps.tokens) == "".join(f"{step}\n" for step in row["completions"])
        assert steps.weights.sum() == len(row["labels"])
    assert run("again.jsonl").read_text() == output.read_text()
    assert "skipped: " in capsys.readouterr().out


def test_a_server_instead_of_a_model(tiny_model_folder, tmp_path):
    def answer(path, body, number):
        if path == "/v1/models":
            return {"data": [{"id": "served"}]}
        text = TOKENIZER.decode(body["prompt"])
        return completion("#3" if text.endswith("so\n") else "so\n#4")

    source = tmp_path / "problems.jsonl"
    source.write_text(json.dumps({"prompt": "1+2=?", "answer": "3"}) + "\n")
    output = tmp_path / "steps.jsonl"
    with serve(answer) as served:
        args = [f"--url={served.url}", f"--tokenizer={tiny_model_folder()}", f"--prompts={source}"]
        main(["label-steps", *args, f"--output={output}", "--num_solutions=2", "--num_completions=3"])
    assert rows_of(output) == [{"prompt": "1+2=?", "answer": "3", "completions": ["so", "#4"], "labels": [1.0, 0.0]}]
    prompts = [TOKENIZER.decode(body["prompt"]) for body in served.bodies]
    assert sorted(prompts) == ["1+2=?"] * 2 + ["1+2=?so\n"] * 3
    assert {body["model"] for body in served.bodies} == {"served"}


@pytest.mark.parametrize(
    ("args", "code", "message"),
    [
        ([], 2, "label-steps: no prompts and no output given: pass --config"),
        (["--num_solution=3"], 2, "label-steps: no option 'num_solution'; did you mean 'num_solutions'?"),
        (["--sampling.temprature=3"], 2, "no option 'sampling.temprature'; did you mean 'sampling.temperature'?"),
        (["--labels=sof"], 2, "did you mean 'soft'?"),
        (["--num_solutions=many"], 2, "num_solutions: 'many' is not allowed: expected int"),
        (["--sampling.temperature=-1"], 1, "temperature=-1.0 is not allowed"),
        (["--model=m", "--num_solutions=-1"], 1, "num_solutions is -1; it must be at least 0"),
        (["--model=m", "--max_length=0"], 1, "max_length is 0; it must be at least 1"),
        (["--on_too_long=cut"], 2, "on_too_long: 'cut' is not allowed: expected one of drop, error"),
        (["--model=m", "--num_completions=0"], 1, "num_completions is 0; it must be at least 1"),
        (["--model=m", "--sampling.seed=3"], 1, "sampling.seed is 3: write --seed"),
        (["--model=m", "--step_separator="], 1, "step_separator is ''"),
        (["--model=m", "--verifier=nowhere.fn"], 1, "verifier 'nowhere.fn' cannot be imported"),
        (["--model=nowhere"], 1, "nowhere"),
        (["--url=http://127.0.0.1:1"], 1, "--url alone gives no tokenizer: pass --tokenizer"),
        (["--url=http://127.0.0.1:1", "--model=qwen"], 1, "--model=qwen is a name that the server knows, and no token"),
        (["--limit=3"], 1, "no model for the solutions is given: pass --model with a folder, or --url"),
    ],
)
def test_mistakes(capsys, tmp_path, monkeypatch, problems, args, code, message):
    monkeypatch.chdir(tmp_path)
    given = [f"--prompts={problems}", "--output=out/steps.jsonl"] if args else []
    found, said = refused(capsys, "label-steps", *given, *args)
    assert message in said
    assert found == code
    assert not (tmp_path / "out").exists()


def test_a_file_is_not_written_over(capsys, tmp_path, problems):
    (tmp_path / "steps.jsonl").write_text("mine\n")
    args = [f"--prompts={problems}", f"--output={tmp_path / 'steps.jsonl'}", "--model=m"]
    code, said = refused(capsys, "label-steps", *args)
    assert (code, "already exists: remove it" in said) == (1, True)
    assert (tmp_path / "steps.jsonl").read_text() == "mine\n"


def test_nothing_to_label(capsys, tmp_path, tiny_model_folder, problems):
    args = [f"--prompts={problems}", f"--output={tmp_path / 'steps.jsonl'}", f"--model={tiny_model_folder()}"]
    code, said = refused(capsys, "label-steps", *args, "--sampling.max_new_tokens=1", "--sampling.top_k=1")
    assert code == 1
    assert "no solution of 5 prompts could be labelled (20 cut off): raise sampling.max_new_tokens" in said
    assert sorted(path.name for path in tmp_path.iterdir()) == ["problems.jsonl"]


def test_options_from_a_file(capsys, tmp_path, problems):
    file = tmp_path / "mine.yaml"
    file.write_text(f"prompts: {problems}\noutput: {tmp_path}/x.jsonl\nmodel: nowhere\nsampling:\n  top_p: 0.5\n")
    with pytest.raises(SystemExit) as exit_info:
        main(["label-steps", "--config", str(file), "--print_config"])
    assert exit_info.value.code == 0
    assert "top_p: 0.5" in capsys.readouterr().out
