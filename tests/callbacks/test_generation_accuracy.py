"""The accuracy that is logged against answers checked by hand, and where and when it is logged."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

import lightning
import pytest
import torch
from lightning.pytorch.plugins import Precision

from rlhf_lightning import SFTModule
from rlhf_lightning.callbacks import GenerationAccuracy, JSONLLogger, SelfImprovement
from rlhf_lightning.datamodules import SFTDataModule
from rlhf_lightning.evaluation import Suite
from rlhf_lightning.evaluation.answers import answer_prompts, load_verifier, read_prompts
from rlhf_lightning.inference import LocalEngine, SamplingParams
from rlhf_lightning.loggers import read_history
from rlhf_lightning.self_improvement.measuring import SuiteMeter
from tests.helpers import char_tokenizer, tiny_model

ROWS = [{"prompt": f"{n}+{n}=?", "answer": str(2 * n)} for n in range(6)]


def is_long(prompts: list[str], completions: list[str], **columns: Any) -> list[float]:
    """A verifier whose rewards a test can foresee: 1 for completions of more than four characters."""
    return [float(len(text) > 4) for text in completions]


def says_nothing(prompts: list[str], completions: list[str], **columns: Any) -> list[None]:
    return [None] * len(prompts)


def greedy_by_hand(model, tokenizer, prompt: str, num_tokens: int) -> str:
    tokens = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    new: list[int] = []
    with torch.no_grad():
        for _ in range(num_tokens):
            token = int(model(torch.tensor([tokens + new])).logits[0, -1].argmax())
            if token == tokenizer.eos_token_id:
                break
            new.append(token)
    return tokenizer.decode(new, skip_special_tokens=True)


@pytest.fixture
def prompts(tmp_path):
    file = tmp_path / "prompts.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return str(file)


def fit(folder, callback, history, **trainer):
    rows = [{"prompt": row["prompt"], "completion": f"#{row['answer']}"} for row in ROWS]
    module = SFTModule(str(folder))
    data = SFTDataModule(train=rows, val=rows, global_batch_size=2)
    lightning.Trainer(
        accelerator="cpu",
        logger=JSONLLogger(str(history)),
        callbacks=[callback],
        max_steps=2,
        val_check_interval=2,
        num_sanity_val_steps=1,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **trainer,
    ).fit(module, data)
    return module


def test_accuracy_is_the_mean_reward_of_greedy_completions(tiny_model_folder, prompts, tmp_path):
    folder = tiny_model_folder()
    callback = GenerationAccuracy(prompts, verifier=f"{__name__}.is_long", max_new_tokens=8)
    module = fit(folder, callback, tmp_path / "history.jsonl")
    rows = [row for row in read_history(tmp_path / "history.jsonl") if "val/accuracy" in row]
    assert [row["step"] for row in rows] == [0, 1]  # before training, and after the last of steps 0 and 1

    tokenizer = char_tokenizer()
    before = [greedy_by_hand(tiny_model("llama"), tokenizer, row["prompt"], 8) for row in ROWS]
    after = [greedy_by_hand(module.model.eval(), tokenizer, row["prompt"], 8) for row in ROWS]
    for row, texts in zip(rows, (before, after), strict=True):
        assert row["val/accuracy"] == pytest.approx(sum(len(text) > 4 for text in texts) / len(ROWS))


def test_limit_and_name_and_no_measurement_before_training(tiny_model_folder, prompts, tmp_path):
    callback = GenerationAccuracy(
        prompts, verifier=f"{__name__}.is_long", max_new_tokens=2, limit=3, name="short", before_training=False
    )
    fit(tiny_model_folder(), callback, tmp_path / "history.jsonl")
    rows = [row for row in read_history(tmp_path / "history.jsonl") if "val/short" in row]
    assert [(row["step"], row["val/short"]) for row in rows] == [(1, 0.0)]
    assert len(callback._examples) == 3


def test_ranks_share_the_prompts_out(tiny_model_folder, prompts):
    """Two ranks of one prompt list see disjoint halves; their sums make the mean of the whole."""
    module = SFTModule(str(tiny_model_folder()))
    module.configure_model()
    callback = GenerationAccuracy(prompts, verifier=f"{__name__}.is_long", max_new_tokens=8)

    class Rank:
        def __init__(self, rank: int, world: int) -> None:
            self.global_rank, self.world_size, self.global_step = rank, world, 0
            self.precision_plugin = Precision()

    whole = callback.measure(Rank(0, 1), module)
    halves = [callback.measure(Rank(rank, 2), module) for rank in range(2)]  # 3 prompts each, without a process group
    assert sum(halves) / 2 == pytest.approx(whole)


def test_a_verifier_that_says_nothing_is_refused(tiny_model_folder, prompts):
    module = SFTModule(str(tiny_model_folder()))
    module.configure_model()
    trainer = lightning.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
    callback = GenerationAccuracy(prompts, verifier=f"{__name__}.says_nothing", max_new_tokens=2)
    with pytest.raises(ValueError, match="no reward for any of the prompts"):
        callback.measure(trainer, module)


@pytest.mark.parametrize(
    ("path", "said"),
    [("nowhere.exact", "cannot be imported"), ("math.pi", "is a float"), ("exact", "cannot be imported")],
)
def test_verifiers_that_are_none(path, said):
    with pytest.raises(ValueError, match=said):
        load_verifier(path)


def test_columns_reach_the_verifier_row_by_row(tiny_model_folder, tokenizer):
    seen = {}

    def verifier(prompts, completions, **columns):
        seen.update(columns, prompts=prompts, completions=completions)
        return [float(number) for number in range(len(prompts))]

    rows = [{"prompt": "1+1=?", "answer": "2"}, {"prompt": "2+2=?", "answer": "4", "level": 3}]
    examples = read_prompts(rows, tokenizer)
    engine = LocalEngine(tiny_model("llama"), tokenizer)
    sampling = SamplingParams(max_new_tokens=3, seed=1)
    groups = answer_prompts(engine, examples, verifier, num_samples=2, sampling=sampling)
    assert seen["prompts"] == ["1+1=?", "1+1=?", "2+2=?", "2+2=?"]
    assert seen["answer"] == ["2", "2", "4", "4"]
    assert seen["level"] == [None, None, 3, 3]
    assert [[answer.reward for answer in group] for group in groups] == [[0.0, 1.0], [2.0, 3.0]]
    assert [answer.completion.text for group in groups for answer in group] == seen["completions"]


def test_limit_must_be_positive(tokenizer):
    with pytest.raises(ValueError, match="limit is 0"):
        read_prompts(ROWS, tokenizer, limit=0)


def test_a_foreign_module_is_refused(prompts):
    with pytest.raises(ValueError, match="needs a PostTrainingModule"):
        GenerationAccuracy(prompts).measure(None, lightning.LightningModule())


def test_each_tokenizer_reads_the_prompts(tiny_model_folder, prompts, tmp_path):
    """One callback for modules whose tokenizers give a character different numbers."""
    other = tmp_path / "other"
    tiny_model("llama").save_pretrained(other)
    names = char_tokenizer()
    file = json.loads(names.backend_tokenizer.to_str())
    numbers = file["model"]["vocab"]
    numbers["0"], numbers["+"] = numbers["+"], numbers["0"]
    names.save_pretrained(other)
    (other / "tokenizer.json").write_text(json.dumps(file))
    task = {"name": "long", "prompts": prompts, "verifier": f"{__name__}.is_long", "sampling": {"max_new_tokens": 2}}
    accuracy = GenerationAccuracy(prompts, verifier=f"{__name__}.is_long", max_new_tokens=2)
    meter = SuiteMeter(Suite.read({"name": "small", "tasks": [task]}), 0)
    rounds = SelfImprovement(prompts, str(tmp_path / "rounds"))
    rounds.round = 1
    trainer = SimpleNamespace(
        datamodule=None, precision_plugin=Precision(), global_rank=0, world_size=1, global_step=0, is_global_zero=True
    )
    seen = []
    for folder in (tiny_model_folder(), other):
        module = SFTModule(str(folder))
        module.configure_model()
        module._trainer = trainer
        accuracy.measure(trainer, module)
        meter.results(module, None)
        read = [accuracy._examples, meter._examples["long"], rounds._of_round(trainer, module)]
        for examples in read:
            found = [module.tokenizer.decode(example.root.tokens) for example in examples]
            assert all(row["prompt"] in text for row, text in zip(ROWS, found, strict=True))
        seen.append(read[0][0].root.tokens.tolist())
    assert seen[0] != seen[1]
