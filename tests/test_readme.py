"""The documents are true: the README runs from top to bottom in an empty folder; names and values exist."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import lightning
import pytest
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

import rlhf_lightning
from rlhf_lightning import callbacks, core, datamodules, metrics, modules
from rlhf_lightning.cli import main
from rlhf_lightning.rl import on_policy_module

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
DOCUMENTS = ("README.md", "METHODS.md", "CONTRIBUTING.md", "CHANGELOG.md", "docs/design.md")

# In place of the model that the README names; what makes commands quicker changes nothing that they are about.
MODEL = "Qwen/Qwen3-0.6B"
QUICKLY = ["--trainer.accelerator=cpu", "--trainer.logger=false", "--trainer.enable_progress_bar=false"]
# Two processes would be started by the command that pytest was started with.
ONLY_PARSED = "--trainer.devices=2"


class Block(NamedTuple):
    language: str
    line: int
    text: str


def blocks() -> list[Block]:
    found = re.finditer(r"^```(\w+)\n(.*?)^```$", README, flags=re.MULTILINE | re.DOTALL)
    return [Block(match[1], README[: match.start()].count("\n") + 2, match[2]) for match in found]


def commands(script: str) -> tuple[dict[str, str], list[list[str]]]:
    """The files that a block of shell writes, and its other commands, comments and line continuations undone."""
    files = dict(re.findall(r"^cat > (\S+) <<'END'\n(.*?)^END$", script, flags=re.MULTILINE | re.DOTALL))
    script = re.sub(r"^cat > .*?^END$", "", script, flags=re.MULTILINE | re.DOTALL)
    lines = script.replace("\\\n", " ").splitlines()
    return files, [words for line in lines if (words := shlex.split(line, comments=True))]


def run(words: list[str]) -> None:
    assert words[0] == "rlhf-lightning"
    if words[1] != "fit":
        main(words[1:])
    elif ONLY_PARSED in words or "--print_config" in words:
        with pytest.raises(SystemExit) as exit_info:
            main([*words[1:], "--print_config"])
        assert exit_info.value.code == 0
    else:
        main([*words[1:], *QUICKLY])


def test_readme_from_top_to_bottom(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_model_folder: Callable[[str], Path]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_MODE", "disabled")
    model = str(tiny_model_folder("qwen3"))
    # A config file has to be there before the command that the README shows ahead of it.
    for block in blocks():
        if block.language == "yaml":
            name = re.match(r"# ([\w.]+)", block.text)
            assert name, f"README.md:{block.line}: a file without its name in the first line"
            Path(name[1]).write_text(block.text.replace(MODEL, model))
    done = {"bash": 0, "python": 0, "yaml": 0, "text": 0}
    for block in blocks():
        where = f"README.md:{block.line}"
        done[block.language] += 1
        if block.language == "python":
            # Line numbers of a traceback are then those of the README.
            code = compile("\n" * (block.line - 1) + block.text, where, "exec")
            exec(code, {"__name__": "__main__"})
        elif block.language == "bash":
            files, found = commands(block.text)
            for name, content in files.items():
                Path(name).write_text(content)
            for words in found:
                if words[0] == "make":
                    assert f"\n{words[1]}:" in (ROOT / "Makefile").read_text(), f"{where}: no target {words[1]!r}"
                elif not words[0].startswith("MODEL="):
                    run([word.replace("$MODEL", model) for word in words])
    # Output, in a block of text, is compared by the tests of what prints it.
    assert min(done[language] for language in ("bash", "python", "yaml")) >= 2
    for folder in ("runs/sft/model", "runs/dpo/model", "runs/mine/sft/model", "aligned"):
        AutoModelForCausalLM.from_pretrained(folder)
    AutoModelForSequenceClassification.from_pretrained("runs/reward/model")
    assert Path("runs/mine/dpo/model/adapter_model.safetensors").is_file()
    assert Path("runs/mine/report.html").is_file()


@pytest.mark.parametrize("document", DOCUMENTS)
def test_what_documents_name_is_there(document: str) -> None:
    text = (ROOT / document).read_text()
    folders = "configs|tests|benchmarks|examples|rlhf_lightning|datamodules|callbacks"
    for path in re.findall(rf"`((?:{folders})/[\w./]*)`", text):
        if "/x" not in path and "_x" not in path:  # the method that CONTRIBUTING adds
            assert (ROOT / path).exists(), f"{document} names {path}"
    for path in re.findall(r"--config (configs/\S+?\.yaml)", text):
        assert (ROOT / path).is_file(), f"{document} names {path}"
    places = (
        rlhf_lightning,
        core,
        modules,
        on_policy_module,
        datamodules,
        callbacks,
        metrics,
        lightning,
    )
    for name in re.findall(r"`(\w+(?:Module|Export|Accuracy|Logger|Guard|Sync|Schedule))`", text):
        assert any(hasattr(place, name) for place in places), f"{document} names {name}"


def test_every_method_and_datamodule_is_in_the_readme_and_in_methods() -> None:
    names = [name for name in rlhf_lightning.__all__ if name.endswith("Module")]
    names += [name for name in datamodules.__all__ if name.endswith("DataModule") and name != "ExampleDataModule"]
    for name in names:
        assert f"`{name}`" in README
        assert f"`{name}`" in (ROOT / "METHODS.md").read_text()


@pytest.mark.parametrize("document", DOCUMENTS)
def test_equal_bits_are_promised_on_cpus_alone(document: str) -> None:
    """Kernels of CUDA add up in any order."""
    text = re.sub(r"\n\s*\n|\n\s*[-|] ", ". ", (ROOT / document).read_text())
    sentences = re.split(r"(?<=\.)\s+", " ".join(text.split()))
    promises = [s for s in sentences if re.search(r"\b(the|same|equal) bits\b|\bbit for bit\b|\bbit-?(exact|wise)", s)]
    assert [sentence for sentence in promises if "on CPUs" not in sentence and "On CPUs" not in sentence] == []
    if document == "README.md":
        assert any("on CUDA" in sentence and "rounding" in sentence for sentence in promises)


GROUP = {
    "rewards": ["rlhf_lightning.rewards.exact_answer"],
    "num_generations": 2,
    "max_completion_length": 6,
}
RECALL = "recall:demonstrations?length=24&facts=2&rows=8"
BEAM = {"class_path": "beam", "init_args": {"max_step_tokens": 3}}
CASES: list[tuple[str, str, str, dict[str, Any]]] = [
    ("SFTModule", "SFTDataModule", "demonstrations", {}),
    ("SFTModule", "SFTDataModule", "demonstrations", {"loss_type": "dft"}),
    ("RewardModule", "PreferenceDataModule", "preference", {}),
    ("RewardModule", "PreferenceDataModule", "preference", {"num_models": 2}),
    ("ProcessRewardModule", "StepwiseDataModule", "stepwise", {}),
    ("ProcessRewardModule", "StepwiseDataModule", "stepwise", {"outcome_head": True, "boundaries": "learned"}),
    ("DPOModule", "PreferenceDataModule", "preference", {}),
    ("SimPOModule", "PreferenceDataModule", "preference", {}),
    ("SimPOModule", "PreferenceDataModule", "preference", {"loss_type": "orpo", "beta": 0.1}),
    ("KTOModule", "UnpairedDataModule", "unpaired", {}),
    ("ContextCompressionModule", "ContextDataModule", RECALL, {"segment_length": 8}),
    ("ContextCompressionModule", "ContextDataModule", RECALL, {"segment_length": 8, "kl_coef": 1.0,
     "autoencoding_coef": 1.0}),
    ("GRPOModule", "PromptDataModule", "prompts", GROUP),
    ("GRPOModule", "PromptDataModule", "prompts", {**GROUP, "dynamic_sampling": 1, "beta": 0.1}
     | {"sampling": {"top_k": 5}, "off_policy": {"correction": "token_truncate"}}),
    ("GRPOModule", "PromptDataModule", "prompts", {**GROUP, "tree": {"rollouts": ["samples", BEAM]}}
     | {"off_policy": {"correction": "token_truncate", "replay_capacity": 8}}),
    ("PPOModule", "PromptDataModule", "prompts", GROUP),
    ("PPOModule", "PromptDataModule", "prompts", {**GROUP, "tree": {"rollouts": ["samples", BEAM]}}
     | {"off_policy": {"correction": "token_truncate"}}),
]  # fmt: skip


def logged_names(module: str) -> list[tuple[set[str], set[str]]]:
    """What METHODS.md says that a module logs: in every stage, and in training also; (always, at times) each."""
    rows = {}
    for line in (ROOT / "METHODS.md").read_text().partition("## What is logged")[2].splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if len(cells) == 3:
            rows[cells[0].strip("`")] = cells[1:]
    found = []
    for column, cell in enumerate(rows[module]):
        cell += rows["all"][column]
        if other := re.search(r"as `(\w+)`", cell):
            cell += rows[other[1]][column]
        names = set(re.findall(r"`([a-z_0-9]+(?:/[a-z_<>]+)*)`", cell))
        always = set(re.findall(r"`([a-z_0-9]+(?:/[a-z_<>]+)*)`", re.sub(r"\[[^]]*\]", "", cell)))
        found.append((always, names - always))
    return found


@pytest.mark.parametrize(("module", "datamodule", "contract", "options"), CASES)
def test_what_is_logged_is_in_methods(
    module: str,
    datamodule: str,
    contract: str,
    options: dict[str, Any],
    tmp_path: Path,
    tiny_model_folder: Callable[[str], Path],
) -> None:
    task = contract if ":" in contract else f"sums:{contract}?terms=2&high=9&rows=8"
    data = getattr(datamodules, datamodule)(train=task, val=f"{task}&split=validation", global_batch_size=4)
    trainer = lightning.Trainer(
        accelerator="cpu",
        max_steps=1,
        limit_train_batches=1,
        log_every_n_steps=1,
        logger=callbacks.JSONLLogger(str(tmp_path / "history.jsonl")),
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(getattr(rlhf_lightning, module)(str(tiny_model_folder("qwen3")), **options), data)
    logged = {name for line in (tmp_path / "history.jsonl").read_text().splitlines() for name in json.loads(line)}
    logged = {name.replace("exact_answer", "<name>") for name in logged if "/" in name}
    (always, at_times), (train_always, train_at_times) = logged_names(module)
    for stage, known, allowed in (
        ("train", always | train_always, at_times | train_at_times),
        ("val", always, at_times),
    ):
        names = {name.partition("/")[2] for name in logged if name.startswith(f"{stage}/")}
        assert known <= names <= known | allowed
