"""Bad rewards and prompts give one line, or are counted as samples; nothing is lost."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from rlhf_lightning import ProcessRewardModule
from rlhf_lightning.cli import main

from ..helpers import save_tiny_model
from .test_bad_input import written

HERE = "tests.integration.test_bad_rollouts"
EXACT = "rlhf_lightning.rewards.exact_answer"
LEARNED = "rlhf_lightning.rewards.learned"
ROWS = [{"prompt": f"{n}+{n}=", "answer": str(2 * n)} for n in range(4)]

pytestmark = pytest.mark.filterwarnings("ignore")


def good(completions: Sequence[str]) -> list[float]:
    return [float(len(set(text))) for text in completions]


def too_few(completions: Sequence[str]) -> list[float]:
    return good(completions)[1:]


def not_a_number(completions: Sequence[str]) -> list[float]:
    return [float("nan"), *good(completions)[1:]]


def a_word(completions: Sequence[str]) -> list[Any]:
    return ["good", *good(completions)[1:]]


def a_text(completions: Sequence[str]) -> Any:
    return "good"


def broken(completions: Sequence[str]) -> list[float]:
    raise RuntimeError("the server\nis away")


def steps_of_another_number(completions: Sequence[str]) -> list[Any]:
    return [[0.5] * (len([step for step in text.split("\n") if step]) + (n == 0)) for n, text in enumerate(completions)]


@pytest.fixture
def arguments(tiny_model_folder: Callable[..., Path], tmp_path: Path) -> Callable[..., list[str]]:
    """The command line of two iterations, which exports the model at the end."""

    def build(*extra: str, rows: Any = None, method: str = "GRPOModule", model: Any = None) -> list[str]:
        export = [{"class_path": "ModelExport", "init_args": {"folder": str(tmp_path / "out/model")}}]
        return [
            "fit",
            f"--model={method}",
            f"--model.model={model or tiny_model_folder()}",
            "--model.num_generations=2",
            "--model.max_completion_length=8",
            "--data=PromptDataModule",
            f"--data.train={written(tmp_path / 'prompts.jsonl', rows or ROWS)}",
            "--data.global_batch_size=2",
            f"--trainer.callbacks={json.dumps(export)}",
            f"--trainer.default_root_dir={tmp_path / 'out'}",
            "--trainer.accelerator=cpu",
            "--trainer.max_epochs=1",
            "--trainer.logger=false",
            "--trainer.enable_checkpointing=false",
            "--trainer.enable_progress_bar=false",
            "--trainer.enable_model_summary=false",
            *extra,
        ]

    return build


@pytest.fixture
def refused(arguments: Callable[..., list[str]], tmp_path: Path, capsys: Any) -> Callable[..., str]:
    """Runs ``fit``, and returns the one line that it said after checking that nothing was left."""

    def run(*extra: str, **given: Any) -> str:
        with pytest.raises(SystemExit) as exit_info:
            main(arguments(*extra, **given))
        assert exit_info.value.code in (1, 2)
        assert not (tmp_path / "out/model").exists()
        lines = capsys.readouterr().err.strip().splitlines()
        assert not any("Traceback" in line for line in lines)
        assert lines[-1].startswith("rlhf-lightning: ")
        assert sum(line.startswith("rlhf-lightning: ") for line in lines) == 1
        return str(lines[-1])

    return run


def rewards(*specs: Any) -> str:
    return f"--model.rewards={json.dumps(specs)}"


BAD = {
    "too_few": "reward 'too_few' returned 3 values for 4 completions: return one each",
    "not_a_number": "reward 'not_a_number' returned nan (float) for sample 0: return a finite number, or None",
    "a_word": "reward 'a_word' returned 'good' (str) for sample 0: return a finite number, or None",
    "a_text": "reward 'a_text' returned 'good' (str): return a list of one number or None per completion",
}


def with_methods(*names: str) -> list[Any]:
    """All names with GRPO, and the first with PPO as fast: both have the same set of rewards."""
    fast = [(name, "GRPOModule") for name in names] + [(names[0], "PPOModule")]
    return [*fast, *(pytest.param(name, "PPOModule", marks=pytest.mark.slow) for name in names[1:])]


@pytest.mark.parametrize(("name", "method"), with_methods(*BAD))
def test_what_is_no_reward(name: str, method: str, refused: Callable[..., str]) -> None:
    assert BAD[name] in refused(rewards(f"{HERE}.{name}"), method=method)


@pytest.mark.parametrize(("name", "method"), with_methods("broken", *BAD))
def test_what_fails_is_counted(
    name: str, method: str, arguments: Callable[..., list[str]], tmp_path: Path, caplog: Any
) -> None:
    """Asked to skip it, or where the function raises: the run continues with the other reward, and is exported."""
    log = tmp_path / "history.jsonl"
    logger = {"class_path": "rlhf_lightning.callbacks.JSONLLogger", "init_args": {"path": str(log)}}
    extra = [] if name == "broken" else ["--model.on_bad_reward=skip"]
    main(
        arguments(
            rewards(f"{HERE}.{name}", f"{HERE}.good"),
            *extra,
            f"--trainer.logger={json.dumps(logger)}",
            "--trainer.log_every_n_steps=1",
            method=method,
        )
    )
    assert (tmp_path / "out/model/model.safetensors").is_file()
    seen = [json.loads(line) for line in log.read_text().splitlines()]
    lost = [row[f"train/rewards/{name}/failures"] for row in seen if f"train/rewards/{name}/failures" in row]
    assert len(lost) == 2
    # Alone with a sample, a function that always errs about the first one errs about all.
    assert set(lost) == {1.0 if name in ("not_a_number", "a_word") else 4.0}
    assert all(row["train/rewards/good/failures"] == 0 for row in seen if "train/rewards/good/failures" in row)
    reported = [record.getMessage() for record in caplog.records if f"reward '{name}' failed" in record.getMessage()]
    assert len(reported) == 1
    assert "\n" not in reported[0]


def test_a_missing_answer(refused: Callable[..., str]) -> None:
    rows = [{"prompt": row["prompt"], "solution": row["answer"]} for row in ROWS]
    said = refused(rewards(EXACT), rows=rows)
    assert "reward 'exact_answer' needs the column 'answer': the rows have completion_ids, prompt_ids, solution" in said


def test_a_prompt_that_leaves_no_room(refused: Callable[..., str]) -> None:
    said = refused(rewards(EXACT), rows=[*ROWS[:3], {"prompt": "1" * 125, "answer": "1"}], method="PPOModule")
    assert "prompts.jsonl:4 has 125 tokens" in said
    assert "max_completion_length=8 they exceed the model's 128 positions" in said
    assert "set the datamodule's max_length to 120" in said


def test_a_prompt_above_every_budget(arguments: Callable[..., list[str]], tmp_path: Path) -> None:
    """Budgets are for memory: a prompt that exceeds them runs alone."""
    main(
        arguments(
            rewards(f"{HERE}.good"),
            "--model.micro_batch_tokens=4",
            "--model.sampling.generation_batch_tokens=4",
            rows=[*ROWS[:3], {"prompt": "1" * 100}],
        )
    )
    assert (tmp_path / "out/model/model.safetensors").is_file()


def test_a_tokenizer_that_ends_nothing(refused: Callable[..., str], tmp_path: Path) -> None:
    folder = save_tiny_model(tmp_path / "endless", "llama", eos_token_id=None)
    path = folder / "tokenizer_config.json"
    path.write_text(path.read_text().replace('"eos_token": "<eos>",', ""))
    assert "has no end-of-sequence token, without which no completion can end" in refused(rewards(EXACT), model=folder)


def test_steps_of_another_number(refused: Callable[..., str]) -> None:
    said = refused("--model.rewards=[]", f"--model.process_reward={HERE}.steps_of_another_number")
    assert "reward 'steps_of_another_number' returned [0.5" in said
    assert "steps of sample 0: return a list with one finite number per step, or None if unscorable" in said


def test_a_folder_that_holds_no_reward_model(
    refused: Callable[..., str], tiny_model_folder: Callable[..., Path], tmp_path: Path
) -> None:
    folder = str(tiny_model_folder())
    spec = {"class_path": f"{LEARNED}.RewardModelReward", "init_args": {"model": folder}}
    assert "holds no reward model but a LlamaForCausalLM" in refused(rewards(spec))
    spec["init_args"] = {"model": str(tmp_path / "nowhere")}
    assert "there is no folder" in refused(rewards(spec))
    spec["init_args"] = {"folder": folder}
    assert "the init_args of reward" in refused(rewards(spec))
    spec = {"class_path": f"{LEARNED}.ProcessModelSteps", "init_args": {"model": folder}}
    said = refused("--model.rewards=[]", f"--model.process_reward={json.dumps(spec)}")
    assert "holds no model that ProcessRewardModule exported" in said
    module = ProcessRewardModule(folder)
    module.save_pretrained(str(tmp_path / "prm"))
    spec = {"class_path": f"{LEARNED}.RewardModelReward", "init_args": {"model": str(tmp_path / "prm")}}
    assert "holds a process_reward model, no reward model" in refused(rewards(spec))


def test_no_rewards_at_all(refused: Callable[..., str]) -> None:
    assert "rewards is empty; give at least one" in refused("--model.rewards=[]")
