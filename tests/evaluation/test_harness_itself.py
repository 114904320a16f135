"""The lm-evaluation-harness itself on local tasks: the numbers of its own model of transformers, request by request."""

from __future__ import annotations

import json
from itertools import product
from pathlib import Path
from typing import Any

import pytest

from rlhf_lightning.evaluation.harness import harness_model
from rlhf_lightning.inference import LocalEngine

from ..helpers import char_tokenizer, tiny_model
from .test_harness import with_first_token

lm_eval = pytest.importorskip("lm_eval", reason="the harness is not installed: pip install 'rlhf-lightning[harness]'")

POSITIONS = 48
ROWS = [
    {
        "question": f"what is {n}+{m}",
        "choices": [f"{n + m}", f"{n + m + 1} or more", "none"],
        "label": n % 3,
        "text": f"the sum of {n} and {m} is {n + m}. " * (n + 1),
    }
    for n, m in ((0, 4), (1, 7), (2, 2), (3, 5), (4, 9), (5, 1))
]
TASKS: dict[str, dict[str, Any]] = {
    "choices": {
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}? ",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{label}}",
        "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
    },
    "answers": {
        "output_type": "generate_until",
        "doc_to_text": "{{question}}?",
        "doc_to_target": "{{choices[0]}}",
        "generation_kwargs": {"until": ["e", "\n"], "max_gen_toks": 12, "do_sample": False},
        "metric_list": [{"metric": "exact_match"}],
    },
    "texts": {
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{text}}",
        "metric_list": [{"metric": name} for name in ("word_perplexity", "byte_perplexity", "bits_per_byte")],
    },
}


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder: Path = tmp_path_factory.mktemp("tasks")
    (folder / "rows.json").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    kwargs = {"data_files": {"test": str(folder / "rows.json")}, "cache_dir": str(folder / "cache")}
    dataset = {"dataset_path": "json", "dataset_kwargs": kwargs}
    for name, task in TASKS.items():
        shots = {} if name == "texts" else {"fewshot_split": "test"}
        written = {"task": name, "test_split": "test", **dataset, **shots, **task}
        (folder / f"{name}.yaml").write_text(json.dumps(written))
    from lm_eval.tasks import TaskManager

    return TaskManager(include_path=str(folder), include_defaults=False)


TOKENIZERS = {"plain": char_tokenizer, "with a first token": with_first_token}


SETTINGS: dict[str, dict[str, Any]] = {
    "as they are": {},
    "a shot": {"num_fewshot": 1},
    "a chat": {"num_fewshot": 1, "apply_chat_template": True},
}
FAST = [
    ("plain", "llama", "as they are"),
    ("with a first token", "gpt2", "a shot"),
    ("with a first token", "llama", "a chat"),
]
CASES = [
    case if case in FAST else pytest.param(*case, marks=pytest.mark.slow)
    for case in product(TOKENIZERS, ("llama", "gpt2"), SETTINGS)
]


@pytest.mark.parametrize(("tokens", "arch", "how"), CASES)
def test_the_numbers_are_those_of_the_harness_s_own_model(tokens, arch, how, tasks):
    from lm_eval.models.huggingface import HFLM

    settings = SETTINGS[how]
    model, tokenizer = tiny_model(arch, seed=1, max_position_embeddings=POSITIONS).eval(), TOKENIZERS[tokens]()
    model.name_or_path = "tiny"
    options = {"tasks": list(TASKS), "task_manager": tasks, "bootstrap_iters": 0, "log_samples": True, **settings}
    if "apply_chat_template" in settings:
        options["tasks"] = [name for name in TASKS if name != "texts"]
    ours = lm_eval.simple_evaluate(harness_model(LocalEngine(model, tokenizer)), **options)
    theirs = lm_eval.simple_evaluate(HFLM(pretrained=model, tokenizer=tokenizer, batch_size=2), **options)
    for name in options["tasks"]:
        found, expected = (side["results"][name] for side in (ours, theirs))
        numbers = [key for key, value in expected.items() if isinstance(value, float)]
        assert len(numbers) >= len(TASKS[name]["metric_list"])
        assert [found[key] for key in numbers] == pytest.approx([expected[key] for key in numbers], rel=1e-4)
        for own, other in zip(ours["samples"][name], theirs["samples"][name], strict=True):
            assert own["arguments"] == other["arguments"]
            assert own["resps"]
            for (answer,), (expected_answer,) in zip(own["resps"], other["resps"], strict=True):
                check(answer, expected_answer)


def check(answer: Any, expected: Any) -> None:
    """Compares texts, or log-likelihoods with whether each is greedy."""
    if isinstance(expected, list | tuple):
        assert bool(answer[1]) == bool(expected[1])
        answer, expected = answer[0], expected[0]
    assert answer == (expected if isinstance(expected, str) else pytest.approx(float(expected), rel=1e-4))
