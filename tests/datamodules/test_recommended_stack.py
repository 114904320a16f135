"""The recommended datasets: rows of each one's published schema, through its fragment in ``configs/data``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import yaml
from jsonargparse import ArgumentParser

from rlhf_lightning.core.reward_rows import ratings_of
from rlhf_lightning.data.sources import is_remote
from rlhf_lightning.datamodules import ExampleDataModule, UnpairedDataModule
from rlhf_lightning.rewards.exact_answer import exact_answer
from rlhf_lightning.sequences.example import Example, Segment

from .toys import UNMARKED, chars, complaint, ids

FRAGMENTS = Path(__file__).parents[2] / "configs" / "data"


def user(text: str) -> dict[str, str]:
    return {"content": text, "role": "user"}


def assistant(text: str) -> dict[str, str]:
    return {"content": text, "role": "assistant"}


def magpie(question: str, answer: str) -> dict[str, Any]:
    return {
        "uuid": "6b9a",
        "model": "meta-llama/Meta-Llama-3-70B-Instruct",
        "gen_input_configs": {"temperature": 1.0, "top_p": 1.0, "input_generator": "llama", "seed": None},
        "instruction": question,
        "response": answer,
        "conversations": [{"from": "human", "value": question}, {"from": "gpt", "value": answer}],
        "task_category": "Math",
        "other_task_category": [],
        "difficulty": "easy",
        "input_quality": "good",
        "llama_guard_2": "safe",
        "instruct_reward": 4.5,
        "min_neighbor_distance": 0.1,
        "repeat_count": 0,
        "response_length": len(answer),
        "language": "EN",
    }


def helpsteer(prompt: str, response: str, ratings: str) -> dict[str, Any]:
    names = ("helpfulness", "correctness", "coherence", "complexity", "verbosity")
    return {"prompt": prompt, "response": response, **dict(zip(names, map(int, ratings), strict=True))}


def orca(system: str, question: str, chosen: str, rejected: str, **other: Any) -> dict[str, Any]:
    return {
        "system": system,
        "input": question,
        "chosen": chosen,
        "rejected": rejected,
        "generations": [chosen, rejected],
        "order": ["chosen", "rejected"],
        "labelling_model": "gpt-4-1106-preview",
        "labelling_prompt": [user("judge")],
        "raw_labelling_response": "9 7",
        "rating": [9.0, 7.0],
        "rationale": "better",
        "status": "unchanged",
        "original_chosen": chosen,
        "original_rejected": rejected,
        "chosen_score": 9.0,
        "in_gsm8k_train": False,
        **other,
    }


def numinamath(problem: str, solution: str) -> dict[str, Any]:
    messages = [user(problem), assistant(solution)]
    return {"source": "amc_aime", "problem": problem, "solution": solution, "messages": messages}


def simpo(prompt: Any, question: str, chosen: str, rejected: str) -> dict[str, Any]:
    return {
        "prompt_id": "f0e3",
        "prompt": prompt,
        "all_generated_responses": [chosen, rejected],
        "all_rm_scores": [0.9, 0.1],
        "chosen": [user(question), assistant(chosen)],
        "rejected": [user(question), assistant(rejected)],
    }


def binarized(prompt: str) -> dict[str, Any]:
    answers = {name: [user(prompt), assistant(name)] for name in ("chosen", "rejected")}
    return {
        "prompt": prompt,
        "prompt_id": "a1",
        **answers,
        "messages": answers["chosen"],
        "score_chosen": 8.0,
        "score_rejected": 6.5,
    }


# One row at least of what each fragment is for, and what each of its splits on the hub is called.
SCHEMAS: dict[str, tuple[list[dict[str, Any]], dict[str, str]]] = {
    "magpie_sft": ([magpie("2+2?", "4")], {"train": "train"}),
    "helpsteer2_reward": ([helpsteer("2+2?", "4", "44410")], {"train": "train", "val": "validation"}),
    "helpsteer2_pairs": (
        [helpsteer("2+2?", "4", "44410"), helpsteer("2+2?", "5", "10410")],
        {"train": "train", "val": "validation"},
    ),
    "orca_dpo": ([orca("", "2+2?", "4", "5")], {"train": "train"}),
    "numinamath_prompts": ([numinamath("2+2?", r"\boxed{4}")], {"train": "train", "val": "test"}),
    "ultrafeedback_simpo": ([simpo("2+2?", "2+2?", "4", "5")], {"train": "train", "val": "test"}),
    "kto_mix": (
        [{"prompt": [user("2+2?")], "completion": [assistant("4")], "label": True}],
        {"train": "train", "val": "test"},
    ),
    "ultrafeedback_prompts": ([binarized("2+2?")], {"train": "train_gen", "val": "test_gen"}),
}


def built(name: str, tmp_path: Path, **settings: Any) -> ExampleDataModule:
    """The datamodule of a fragment, as the command line makes it."""
    chars(UNMARKED).save_pretrained(tmp_path / "tokenizer")
    written = yaml.safe_load((FRAGMENTS / f"{name}.yaml").read_text())
    written["data"]["init_args"] |= {"tokenizer": str(tmp_path / "tokenizer"), **settings}
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(ExampleDataModule, "data")
    data: ExampleDataModule = parser.instantiate(parser.parse_object(written)).data
    return data


def read(name: str, rows: list[dict[str, Any]], tmp_path: Path) -> tuple[list[Example], ExampleDataModule]:
    """Applies a fragment to rows of a file in place of its dataset."""
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = built(name, tmp_path, train=str(path), val=None)
    return [example for batch in data.all_examples() for example in batch], data


def texts(example: Example) -> list[list[int]]:
    assert example.root.weights is None
    assert all(child.weights is not None and child.weights.all() for child in example.root.children)
    return [example.root.tokens.tolist(), *(child.tokens.tolist() for child in example.root.children)]


@pytest.mark.parametrize("name", SCHEMAS)
def test_the_hub_is_asked_for_the_right_splits(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows, splits = SCHEMAS[name]
    sources = built(name, tmp_path).sources
    assert {split for split, source in sources.items() if source is not None} == splits.keys()
    for split, wanted in splits.items():
        parts = {part: [{"nonsense": 1}] for part in ("train", "validation", "test", "train_gen", "test_prefs")}
        parts[wanted] = rows
        hub = datasets.DatasetDict({part: datasets.Dataset.from_list(parts[part]) for part in parts})
        asked: list[str] = []

        def load(dataset: str, *_: Any, hub: Any = hub, asked: list[str] = asked, **__: Any) -> datasets.DatasetDict:
            asked.append(dataset)
            return hub

        monkeypatch.setattr(datasets, "load_dataset", load)
        data = built(name, tmp_path, **{other: None for other in splits if other != split})
        assert is_remote(sources[split])
        data.setup("fit")
        assert asked == [str(sources[split]).partition("?")[0]]
        assert data.report[split]["kept"] == 1


def test_magpie(tmp_path: Path) -> None:
    [example], _ = read("magpie_sft", [magpie("2+2?", "4")], tmp_path)
    assert example.root.tokens.tolist() == ids("u:2+2?~\na:4~")
    assert example.root.weights is not None
    assert example.root.weights.tolist() == [0.0] * len("u:2+2?~\na:") + [1.0, 1.0]
    assert example.root.children == ()


def test_helpsteer2_as_ratings(tmp_path: Path) -> None:
    turns = "1+1?\n<extra_id_1>Assistant\n2\n<extra_id_1>User\nAnd 2+2?"
    rows = [helpsteer("c#", "A language.", "34421"), helpsteer(turns, "4", "44410")]
    rows.append({**rows[1], "response": "five", "verbosity": None})
    examples, _ = read("helpsteer2_reward", rows, tmp_path)
    conversation = ids("u:1+1?~\na:2~\nu:And 2+2?~\na:")
    assert [texts(example) for example in examples] == [
        [ids("u:c#~\na:"), ids("A language.~")],
        [conversation, ids("4~")],
        [conversation, ids("five~")],
    ]
    first = {"helpfulness": 3.0, "correctness": 4.0, "coherence": 4.0, "complexity": 2.0, "verbosity": 1.0}
    assert examples[0].fields == first
    assert ratings_of(examples[0], list(first)) == [3.0, 4.0, 4.0, 2.0, 1.0], "where the reward model looks"
    assert np.isnan(examples[2].fields["verbosity"])


def test_helpsteer2_as_pairs(tmp_path: Path) -> None:
    rows = [
        helpsteer("c#", "A language.", "34421"),
        helpsteer("c#", "A note.", "12311"),
        helpsteer("2+2?", "5", "00400"),
        helpsteer("2+2?", "4", "44410"),
        helpsteer("hi", "hey", "30000"),
        helpsteer("hi", "hello", "34444"),
    ]
    examples, data = read("helpsteer2_pairs", rows, tmp_path)
    assert [texts(example) for example in examples] == [
        [ids("u:c#~\na:"), ids("A language.~"), ids("A note.~")],
        [ids("u:2+2?~\na:"), ids("4~"), ids("5~")],
    ]
    assert [example.fields["margin"] for example in examples] == [2.0, 4.0]
    assert [example.row_id.rpartition("rows.jsonl:")[2] for example in examples] == ["1+2", "3+4"]
    assert data.report["train"]["rows"] == 2, "equally helpful responses are no pair"


def test_orca_pairs(tmp_path: Path) -> None:
    rows = [
        orca("Be brief.", "2+2?", "4", "5"),
        orca("", "2+2?", "4", "5", status="swapped", chosen_score=8.0),
        orca("", "2+2?", "4", "5", status="tie"),
        orca("", "2+2?", "4", "5", chosen_score=7.5),
        orca("", "2+2?", "4", "5", in_gsm8k_train=True),
        orca("", "2+2?", "4", "5", status="unchanged", rating=None, chosen_score=None),
    ]
    examples, data = read("orca_dpo", rows, tmp_path)
    assert [texts(example) for example in examples] == [
        [ids("s:Be brief.~\nu:2+2?~\na:"), ids("4~"), ids("5~")],
        [ids("u:2+2?~\na:"), ids("4~"), ids("5~")],
    ]
    assert [example.fields for example in examples] == [{}, {}]
    assert (data.report["train"]["rows"], data.report["train"]["filtered"]) == (6, 4)


def test_numinamath_prompts(tmp_path: Path) -> None:
    rows = [
        numinamath("8/2?", r"First \boxed{8}, halved: $\boxed{\frac{8}{2}}$."),
        numinamath("Prove it.", "Clearly so."),
        numinamath("2+2?", r"It is \boxed{4}"),
    ]
    examples, data = read("numinamath_prompts", rows, tmp_path)
    assert [texts(example) for example in examples] == [[ids("u:8/2?~\na:")], [ids("u:2+2?~\na:")]]
    assert examples[0].fields == {
        "source": "amc_aime",
        "prompt": [{"role": "user", "content": "8/2?"}],
        "answer": r"\frac{8}{2}",
    }
    assert data.report["train"]["filtered"] == 1
    assert exact_answer([""], [r"so \boxed{4}"], answer=[examples[1].fields["answer"]]) == [1.0]


@pytest.mark.parametrize("prompt", ["2+2?", [user("2+2?")]])
def test_ultrafeedback_pairs_of_simpo(prompt: Any, tmp_path: Path) -> None:
    [example], _ = read("ultrafeedback_simpo", [simpo(prompt, "2+2?", "4", "5")], tmp_path)
    assert texts(example) == [ids("u:2+2?~\na:"), ids("4~"), ids("5~")]
    assert "margin" not in example.fields


def test_kto_mix(tmp_path: Path) -> None:
    rows = [
        {"prompt": [user("2+2?")], "completion": [assistant("4")], "label": True},
        {"prompt": [user("1+1?"), assistant("3"), user("sure?")], "completion": [assistant("No.")], "label": False},
    ]
    examples, data = read("kto_mix", rows, tmp_path)
    assert [texts(example) for example in examples] == [
        [ids("u:2+2?~\na:"), ids("4~")],
        [ids("u:1+1?~\na:3~\nu:sure?~\na:"), ids("No.~")],
    ]
    assert [example.fields for example in examples] == [{"label": True}, {"label": False}]
    assert isinstance(data, UnpairedDataModule)
    [batch] = data.train_dataloader()
    partners = {example.root.children[0].tokens.tobytes(): child(example.root) for example in batch}
    assert partners == {np.array(ids("4~")).tobytes(): ids("No.~"), np.array(ids("No.~")).tobytes(): ids("4~")}


def child(root: Segment) -> list[int]:
    return list(root.children[1].tokens.tolist())


def test_ultrafeedback_prompts(tmp_path: Path) -> None:
    [example], _ = read("ultrafeedback_prompts", [binarized("2+2?")], tmp_path)
    assert texts(example) == [ids("u:2+2?~\na:")]
    assert example.fields["prompt"] == [{"role": "user", "content": "2+2?"}]


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("orca_dpo", {"input": None}, "'input' is NoneType (None), expected a string"),
        ("orca_dpo", {"chosen": "5"}, "chosen and rejected are equal ('5')"),
        ("orca_dpo", {"chosen_score": "high"}, "'chosen_score' is 'high', expected a finite number"),
        ("helpsteer2_pairs", {"helpfulness": None}, "no column 'helpfulness'"),
        ("helpsteer2_reward", {"helpfulness": "high"}, "'rating helpfulness' is 'high', expected a finite number"),
        ("helpsteer2_reward", {"prompt": "a\n<extra_id_1>Assistant\nb"}, "the prompt's last turn is the assistant's"),
        ("numinamath_prompts", {"problem": ""}, "the prompt is empty: write something to be answered"),
        ("ultrafeedback_prompts", {"prompt": 3}, "'prompt' is int (3), expected a string"),
        ("kto_mix", {"label": "maybe"}, "'label' is 'maybe', expected true or false"),
    ],
)
def test_a_wrong_row_is_named(name: str, change: dict[str, Any], message: str, tmp_path: Path) -> None:
    rows = SCHEMAS[name][0]
    complained = complaint(read, name, [{**rows[0], **change}, *rows[1:]], tmp_path)
    assert complained.startswith(f"{tmp_path}/rows.jsonl:1: {message}")
