"""``rlhf-lightning generate``: its rows against engines called by hand, what interrupts it, and what it refuses."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rlhf_lightning.cli import main
from rlhf_lightning.generation import GenerateOptions, generate_rows, rows
from rlhf_lightning.generation.output import Output
from rlhf_lightning.inference import BestOfN, Budget, LocalEngine, SamplingParams, VerifierScorer, derive_seed

from ..helpers import save_tiny_model
from ..test_cli import refused
from .verifiers import letters

PROMPTS = [{"prompt": f"{n}+{m}=", "answer": str(n)} for n in range(3) for m in (1, 1, 27)]
SAMPLING = ["--sampling.max_new_tokens=9", "--sampling.top_k=20"]
PARAMS = SamplingParams(max_new_tokens=9, top_k=20)
REPOSITORY = Path(__file__).parents[2]


@pytest.fixture
def model(tiny_model_folder: Callable[[str], Path]) -> str:
    return str(tiny_model_folder("llama"))


@pytest.fixture
def prompts(tmp_path: Path) -> str:
    return written(tmp_path / "prompts.jsonl", PROMPTS)


def written(file: Path, found: list[dict[str, Any]]) -> str:
    file.write_text("".join(json.dumps(row) + "\n" for row in found))
    return str(file)


def rows_of(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def timeless(file: Path) -> list[dict[str, Any]]:
    return [{name: value for name, value in row.items() if name != "seconds"} for row in rows_of(file)]


def run(model: str, prompts: str, output: Path, *further: str) -> list[dict[str, Any]]:
    main(["generate", f"--model={model}", f"--prompts={prompts}", f"--output={output}", *SAMPLING, *further])
    return rows_of(output)


def test_rows_are_those_of_samples_made_alone(model, prompts, tmp_path, capsys):
    found = run(model, prompts, tmp_path / "out.jsonl", "--num_samples=2", "--seed=3", "--prompts_at_once=4")
    engine = LocalEngine.from_pretrained(model)
    lengths = []
    for number, row in enumerate(found):
        index, sample = divmod(number, 2)
        alone = engine.generate([PROMPTS[index]["prompt"]], 1, PARAMS, seeds=[[derive_seed(3, index, sample)]])[0][0]
        lengths.append(len(alone.token_ids))
        assert row.pop("seconds") > 0
        assert row == PROMPTS[index] | {
            "index": index,
            "sample": sample,
            "completion": alone.text,
            "finish_reason": alone.finish_reason,
            "prompt_tokens": len(PROMPTS[index]["prompt"]),
            "completion_tokens": lengths[-1],
            "tokens": lengths[-1],
        }
    assert len(found) == 18
    assert len({row["completion"] for row in found}) > 9

    # Equal prompts of a part are computed once: 0+1, 0+27, 1+1; 1+1, 1+27, 2+1; 2+27.
    summary = json.loads((tmp_path / "out.summary.json").read_text())
    assert summary["telemetry"]["prompt_tokens"] == (4 + 5 + 4) + (4 + 5 + 4) + 5
    assert summary["telemetry"]["new_tokens"] == summary["tokens"] == sum(lengths)
    assert summary["status"] == "finished"
    assert summary["cut_off"] == sum(row["finish_reason"] == "length" for row in found)
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert said.startswith("18 answers to 9 prompts in ")
    assert f"new {sum(lengths):,} tokens (" in said
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.jsonl", "out.summary.json", "prompts.jsonl"]


def interrupt_after(monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    """Ctrl-C when so many rows are written."""
    append, left = Output.append, [count]

    def append_some(self: Output, row: dict[str, Any]) -> None:
        append(self, row)
        left[0] -= 1
        if not left[0]:
            raise KeyboardInterrupt

    monkeypatch.setattr(Output, "append", append_some)


@pytest.mark.parametrize(
    "strategy", [[], ["--strategy=best_of_n", "--strategy.n=2", f"--scorer={letters.__module__}.letters"]]
)
def test_an_interrupted_run_continues(model, prompts, tmp_path, monkeypatch, capsys, strategy):
    whole, output = tmp_path / "whole.jsonl", tmp_path / "out.jsonl"
    run(model, prompts, whole, "--num_samples=2", *strategy)
    written_by_whole = json.loads((tmp_path / "whole.summary.json").read_text())
    for count in (5, 6):
        with monkeypatch.context() as patched:
            interrupt_after(patched, count)
            with pytest.raises(SystemExit) as exit_info:
                run(model, prompts, output, "--num_samples=2", *strategy)
        assert exit_info.value.code == 130
        assert f"what is finished is in {output}: the same command continues" in capsys.readouterr().err
        # A process that is killed may leave the beginning of a line.
        with output.open("ab") as file:
            file.write(b'{"index": 8, "sample": 1, "compl')
    assert len(output.read_text().splitlines()) == 12
    monkeypatch.setattr(rows.RowMaker, "_seed", remember := Seeds(rows.RowMaker._seed))
    run(model, prompts, output, "--num_samples=2", "--prompts_at_once=2", *strategy)
    assert len(remember.asked) == 18 - 11
    assert timeless(output) == timeless(whole)
    summary = json.loads((tmp_path / "out.summary.json").read_text())
    assert summary["tokens"] == written_by_whole["tokens"]
    # Samples that were begun and lost are paid for as well.
    assert summary["telemetry"]["new_tokens"] >= written_by_whole["telemetry"]["new_tokens"]

    # Once more: nothing is done, and nothing loaded.
    before = output.read_bytes(), (tmp_path / "out.summary.json").read_bytes()
    monkeypatch.setattr(GenerateOptions, "engine", None)
    run(model, prompts, output, "--num_samples=2", *strategy)
    assert (output.read_bytes(), (tmp_path / "out.summary.json").read_bytes()) == before


class Seeds:
    """Remembers whose seeds were asked for."""

    def __init__(self, inner: Callable[..., int]) -> None:
        self.inner, self.asked = inner, []

    def __get__(self, instance: Any, owner: Any) -> Callable[..., int]:
        def ask(key: tuple[int, int]) -> int:
            self.asked.append(key)
            return self.inner(instance, key)

        return ask


def test_a_changed_command_is_refused(model, prompts, tmp_path, capsys):
    output = tmp_path / "out.jsonl"
    run(model, prompts, output)
    before = output.read_bytes(), (tmp_path / "out.summary.json").read_bytes()
    capsys.readouterr()
    command = ["generate", f"--model={model}", f"--prompts={prompts}", f"--output={output}", *SAMPLING]
    code, said = refused(capsys, *command, "--seed=1", "--sampling.temperature=0.5")
    assert code == 1
    assert said == (
        f"output '{output}' was begun with different sampling and seed: continue with the same, write to another file, "
        "or move it away"
    )
    with Path(prompts).open("a") as file:
        file.write('{"prompt": "7+7=", "answer": "4"}\n')
    assert "was begun with different files: continue" in refused(capsys, *command)[1]
    assert (output.read_bytes(), (tmp_path / "out.summary.json").read_bytes()) == before

    # Options that affect no row may change, and a summary without its rows is in nobody's way.
    output.unlink()
    assert len(run(model, prompts, output, "--prompts_at_once=3", "--max_batch_tokens=40", "--speculation=ngram")) == 10


def test_files_of_others_stay(model, prompts, tmp_path, capsys):
    output = tmp_path / "out.jsonl"
    command = ["generate", f"--model={model}", f"--prompts={prompts}", f"--output={output}"]
    output.write_text("mine\n")
    assert "exists and was not written by generate" in refused(capsys, *command)[1]
    output.unlink()
    (tmp_path / "out.summary.json").write_text('{"mine": 1}')
    assert "out.summary.json' exists and was not written by generate" in refused(capsys, *command)[1]
    assert (tmp_path / "out.summary.json").read_text() == '{"mine": 1}'
    assert not output.exists()


def test_a_damaged_line_is_not_passed_over(model, prompts, tmp_path, capsys):
    output = tmp_path / "out.jsonl"
    run(model, prompts, output)
    lines = output.read_text().splitlines(keepends=True)
    output.write_text("".join([*lines[:3], "nonsense\n", *lines[4:]]))
    damaged = output.read_bytes()
    _, said = refused(capsys, "generate", f"--model={model}", f"--prompts={prompts}", f"--output={output}", *SAMPLING)
    assert said.startswith(f"line 4 of '{output}' is damaged or no row of this run")
    assert output.read_bytes() == damaged


def test_a_strategy_chooses(model, prompts, tmp_path):
    scorer = f"--scorer={letters.__module__}.letters"
    options = ["--strategy", "BestOfN", "--strategy.n=4", "--strategy.budget.tokens", "30", scorer, "--candidates=true"]
    found = run(model, prompts, tmp_path / "out.jsonl", *options)
    engine = LocalEngine.from_pretrained(model)
    strategy = BestOfN(engine, scorer=VerifierScorer(letters), n=4, budget=Budget(tokens=30))
    spent = 0
    for index, row in enumerate(found):
        columns = {"answer": [PROMPTS[index]["answer"]]}
        text = PROMPTS[index]["prompt"]
        alone = strategy.search([text], [derive_seed(0, index, 0)], sampling=PARAMS, columns=columns)[0]
        spent += alone.tokens
        assert (row["completion"], row["score"], row["tokens"]) == (alone.text, alone.score, alone.tokens)
        assert [c["text"] for c in row["candidates"]] == [c.text for c in alone.candidates]
        assert row["score"] == max(c["score"] for c in row["candidates"])
        assert (row["stopped_by"], row["expansions"], row["scorer_tokens"]) == (alone.stopped_by, alone.expansions, 0)
    summary = json.loads((tmp_path / "out.summary.json").read_text())
    assert summary["telemetry"]["new_tokens"] == summary["tokens"] == spent
    assert summary["telemetry"]["expansions"] == sum(row["expansions"] for row in found)
    assert summary["mean_score"] == pytest.approx(sum(row["score"] for row in found) / len(found))


def test_a_file_may_hold_the_strategy(model, prompts, tmp_path):
    config = tmp_path / "search.yaml"
    spec = {"class_path": "mcts", "init_args": {"simulations": 3, "actions": 2, "step_separator": "1"}}
    scorer = {"class_path": "TextScorer", "init_args": {"term": "length"}}
    config.write_text(json.dumps({"strategy": spec, "scorer": scorer, "sampling": {"max_new_tokens": 7}}))
    output = tmp_path / "out.jsonl"
    command = ["generate", f"--config={config}", f"--model={model}", f"--prompts={prompts}", "--limit=2"]
    main([*command, f"--output={output}", "--strategy.simulations=2"])
    origin = json.loads((tmp_path / "out.summary.json").read_text())["origin"]
    assert origin["strategy"]["class_path"] == "MCTS"
    options = origin["strategy"]["init_args"]
    assert (options["simulations"], options["actions"], options["scorer"]["init_args"]) == (2, 2, {"term": "length"})
    assert [row["score"] == len(row["completion"]) for row in rows_of(output)] == [True, True]


def test_every_kind_of_file_and_chats(model, tmp_path, capsys):
    parquet = pytest.importorskip("pyarrow.parquet")
    import pyarrow

    table = [{"prompt": "1+1=", "completion": "2"}, {"prompt": "2+2=", "completion": "4"}]
    plain = run(model, written(tmp_path / "a.jsonl", table), tmp_path / "a.out")
    (tmp_path / "b.json").write_text(json.dumps(table))
    with (tmp_path / "c.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, ["question", "completion"])
        writer.writeheader()
        writer.writerows({"question": row["prompt"], "completion": row["completion"]} for row in table)
    parquet.write_table(pyarrow.Table.from_pylist(table), tmp_path / "d.parquet")
    for name, further in (("b.json", []), ("c.csv", ["--columns={prompt: question}"]), ("d.parquet", [])):
        found = run(model, str(tmp_path / name), tmp_path / f"{name}.out", *further)
        assert [row["completion"] for row in found] == [row["completion"] for row in plain]
    # A column with the name of one of the row's own is kept.
    assert [row["given_completion"] for row in plain] == ["2", "4"]

    chat = [
        {"messages": [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": "?"}]}
        for row in table
    ]
    found = run(model, written(tmp_path / "e.jsonl", chat), tmp_path / "e.out")
    as_text = run(model, str(tmp_path / "b.json"), tmp_path / "f.out", "--chat=true")
    assert [row["prompt"] for row in found] == [row["messages"][:1] for row in chat]
    assert [row["completion"] for row in found] == [row["completion"] for row in as_text]
    assert [row["prompt_tokens"] for row in found] == [len("<user>1+1=\n<assistant>")] * 2
    assert [row["completion"] for row in found] != [row["completion"] for row in plain]


def test_without_an_output_answers_are_printed(model, prompts, tmp_path, capsys):
    expected = run(model, prompts, tmp_path / "out.jsonl")
    capsys.readouterr()
    main(["generate", f"--model={model}", f"--prompts={prompts}", *SAMPLING])
    shown = sorted((json.loads(line) for line in capsys.readouterr().out.splitlines()), key=lambda row: row["index"])
    for row in (*shown, *expected):
        del row["seconds"]
    assert shown == expected
    main(["generate", f"--model={model}", "--prompt=0+1=", *SAMPLING])
    captured = capsys.readouterr()
    assert captured.out == expected[0]["completion"] + "\n"
    assert captured.err.strip().splitlines()[-1].startswith("1 answers to 1 prompts in ")


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--prompts=p"], "no model given"),
        (["--model=m"], "one of prompts (a file) and prompt (a text) must be given"),
        (["--model=m", "--prompts=p", "--prompt=x"], "one of prompts (a file) and prompt (a text) must be given"),
        (["--model=m", "--prompts=p", "--num_sample=2"],
         "generate: no option 'num_sample'; did you mean 'num_samples'?"),
        (["--model=m", "--prompts=p", "--num_samples=0"], "num_samples is 0; it must be a whole number of at least 1"),
        (["--model=m", "--prompts=p", "--strategy=mtcs"], "there is no strategy 'mtcs'; did you mean 'mcts'?"),
        (["--model=m", "--prompts=p", "--strategy=mcts", "--strategy.simulation=2"],
         "strategy MCTS has no option 'simulation'; did you mean 'simulations'?"),
        (["--model=m", "--prompts=p", "--strategy=mcts", "--strategy.budget.token=2"],
         "budget Budget has no option 'token'; did you mean 'tokens'?"),
        (["--model=m", "--prompts=p", "--strategy=mcts", "--strategy.budget.tokens=0"],
         "budget.tokens is 0; it must be a whole number of at least 1"),
        (["--model=m", "--prompts=p", "--strategy.n=2"],
         "--strategy.n is an option of a strategy: give --strategy as well"),
        (["--model=m", "--prompts=p", "--scorer=LikelihoodScorer"], "no strategy chooses by it"),
        (["--model=m", "--prompts=p", "--strategy=best_of_n", "--scorer=TextScorr"], "did you mean 'TextScorer'?"),
        (["--model=m", "--prompts=p", "--strategy=best_of_n", "--scorer=TextScorer", "--scorer.trem=length"],
         "scorer TextScorer has no option 'trem'; did you mean 'term'?"),
        (["--model=m", "--prompts=p", "--strategy=majority_vote", "--strategy.sampling.top_k=2"], "write sampling"),
        (["--model=m", "--prompts=p", "--strategy=best_of_n", "--strategy.scorer=LikelihoodScorer",
          "--scorer=LikelihoodScorer"], "and the strategy has the scorer 'LikelihoodScorer': leave one of them out"),
        (["--model=m", "--prompts=p", "--strategy=best_of_n"], "strategy BestOfN needs the option 'scorer': give it"),
        (["--model=m", "--prompts=p", "--strategy=best_of_n", "--scorer=TextScorer"],
         "scorer TextScorer needs the option 'term': give it"),
        (["--model=m", "--prompts=p", "--num_samples=2", "--sampling.temperature=0"], "makes all of a prompt's"),
        (["--model=m", "--prompts=p", "--sampling.seed=2"], "sampling.seed is 2: write seed"),
        (["--model=m", "--prompts=p", "--candidates=true"], "candidates are found by a strategy"),
        (["--model=m", "--prompts=p", "--cache=pages"], "cache: 'pages' is not allowed"),
        (["--model=m", "--prompts=p", "--speculation=ngrams"], "speculation"),
        (["--model=m", "--prompts=p", "--server={modle: x}"], "server has no key 'modle'; did you mean 'model'?"),
        (["--model=m", "--prompts=p", "--strategy=mcts", "--strategy.simulations"], "has no value"),
        (["--model=m", "--prompt=p", "--candidates"], "generate: --candidates has no value: write --candidates=VALUE"),
    ],
)  # fmt: skip
def test_mistakes(args, message, capsys):
    _, said = refused(capsys, "generate", *args)
    assert message in said
    assert len(said) < 400


def test_a_prompt_without_room_ends_the_run_before_it_begins(model, tmp_path, capsys):
    prompts = written(tmp_path / "prompts.jsonl", [{"prompt": "1+1="}, {"prompt": "1" * 128}])
    output = tmp_path / "out.jsonl"
    _, said = refused(capsys, "generate", f"--model={model}", f"--prompts={prompts}", f"--output={output}")
    assert said.endswith(
        "prompts.jsonl:2: the prompt has 128 tokens, and the model has room for 127 before an answer: shorten or "
        "remove it"
    )
    assert [path.name for path in tmp_path.iterdir()] == ["prompts.jsonl"]


def test_an_adapter_on_a_model(model, tmp_path, prompts):
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_pretrained(model)
    adapted = get_peft_model(base, LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False))
    adapted.save_pretrained(tmp_path / "adapter")
    found = run(model, prompts, tmp_path / "out.jsonl", f"--adapter={tmp_path / 'adapter'}")
    merged = save_tiny_model(tmp_path / "merged")
    adapted.merge_and_unload().save_pretrained(merged)
    expected = run(str(merged), prompts, tmp_path / "merged.jsonl")
    assert [row["completion"] for row in found] == [row["completion"] for row in expected]
    plain = run(model, prompts, tmp_path / "plain.jsonl")
    assert [row["completion"] for row in found] != [row["completion"] for row in plain]


def test_rows_go_to_one_place(model, prompts):
    with pytest.raises(ValueError, match="rows go to one place"):
        generate_rows(GenerateOptions(model=model, prompts=prompts))


# Processes.

LONG = [*SAMPLING, "--sampling.max_new_tokens=100", "--sampling.min_new_tokens=100", "--prompts_at_once=8"]


def started(*args: str, launcher: tuple[str, ...] = ()) -> subprocess.Popen[str]:
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "HF_HUB_OFFLINE": "1"}
    return subprocess.Popen(
        [sys.executable, *(launcher or ("-m",)), "rlhf_lightning", "generate", *args],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
        # A shell lets what it starts in the background ignore Ctrl-C, and this is inherited.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )


@pytest.mark.slow
def test_ctrl_c_leaves_what_is_finished(model, tmp_path):
    """200 prompts, interrupted twice by a signal at any moment, and once killed."""
    prompts = written(tmp_path / "prompts.jsonl", [{"prompt": f"{n}*{n}="} for n in range(200)])
    output = tmp_path / "out.jsonl"
    command = [f"--model={model}", f"--prompts={prompts}", *LONG, f"--output={output}"]
    seen: set[int] = set()
    for number, sent in ((20, signal.SIGINT), (60, signal.SIGINT), (100, signal.SIGKILL)):
        process = started(*command)
        while not output.exists() or output.read_bytes().count(b"\n") < number:
            assert process.poll() is None, process.communicate()
            time.sleep(0.02)
        process.send_signal(sent)
        _, said = process.communicate(timeout=60)
        assert process.returncode == (130 if sent == signal.SIGINT else -signal.SIGKILL), said
        kept = output.read_bytes()
        kept = kept[: kept.rfind(b"\n") + 1]
        found = [json.loads(line)["index"] for line in kept.splitlines()]
        assert number <= len(found) == len(set(found)) < 200
        assert seen <= set(found)
        seen = set(found)
        if sent == signal.SIGINT:
            assert said.strip().splitlines()[-1].startswith("interrupted; what is finished is in ")
            assert "Traceback" not in said
    process = started(*command)
    _, said = process.communicate(timeout=120)
    assert process.returncode == 0, said
    assert [row["index"] for row in rows_of(output)] == list(range(200))
    # The lines are those of one run.
    main(["generate", *command[:-1], f"--output={tmp_path / 'whole.jsonl'}"])
    assert timeless(output) == timeless(tmp_path / "whole.jsonl")


@pytest.mark.slow
def test_ranks_share_the_prompts(model, prompts, tmp_path):
    launcher = ("-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone", "-m")
    output = tmp_path / "out.jsonl"
    command = [f"--model={model}", f"--prompts={prompts}", *SAMPLING, "--num_samples=2", f"--output={output}"]
    # Two processes continue the rows of one.
    with pytest.MonkeyPatch.context() as patched:
        interrupt_after(patched, 3)
        with pytest.raises(SystemExit):
            main(["generate", *command])
    process = started(*command, launcher=launcher)
    _, said = process.communicate(timeout=120)
    assert process.returncode == 0, said
    main(["generate", *command[:-1], f"--output={tmp_path / 'whole.jsonl'}"])
    assert timeless(output) == timeless(tmp_path / "whole.jsonl")
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(
        ["out.jsonl", "out.summary.json", "prompts.jsonl", "whole.jsonl", "whole.summary.json"]
    )
    assert said.count("18 answers to 9 prompts in ") == 1
    process = started(*command[:-1], launcher=launcher)
    _, said = process.communicate(timeout=120)
    assert process.returncode == 1
    assert "2 processes cannot print rows in order: give an output" in said
