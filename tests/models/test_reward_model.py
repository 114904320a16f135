"""RewardModel without a trainer, against transformers' own forward of one sequence at a time and a naive head."""

from __future__ import annotations

import json
import logging
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from rlhf_lightning import ProcessRewardModule, RewardModule
from rlhf_lightning.models import (
    ProcessRewardModel,
    ProcessRewardModelOptions,
    RewardModel,
    RewardModelOptions,
    load_causal_lm,
)
from rlhf_lightning.models.reward_ensemble import MEMBER_ADAPTERS
from rlhf_lightning.sequences import Example, Segment, pack, register_attention

from ..helpers import EOS_ID, char_tokenizer, save_tiny_model, tiny_config

PROMPTS = ["1+1=", "2+2=", "1+1="]
COMPLETIONS = ["2", "four", "three or more"]
LORA = {"r": 2, "init_lora_weights": False}
CASES: dict[str, tuple[dict[str, Any], dict[str, Any] | None]] = {
    "linear": ({}, None),
    "mlp, mean": ({"head": "mlp", "pooling": "mean"}, None),
    "attributes": ({"attributes": ["right", "short"], "attribute_weights": [1.0, -0.5]}, None),
    "heads": ({"num_models": 3, "num_attributes": 2}, None),
    "adapter": ({}, LORA),
    "adapters": ({"num_models": 2, "ensemble": "adapters"}, LORA),
    "an ensemble of one adapter": ({"ensemble": "adapters"}, LORA),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_tiny_model(tmp_path_factory.mktemp("model"), "llama"))


def made(folder: str, options: dict[str, Any], lora: dict[str, Any] | None = None) -> RewardModel:
    """A reward model with other weights than those drawn, so that a part that is not loaded shows."""
    decoder = load_causal_lm(folder, dtype=torch.float32, lora=lora, attn_implementation=register_attention())
    model = RewardModel(decoder, RewardModelOptions(**options), tokenizer=char_tokenizer(), seed=3)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    if model.options.num_models > 1:
        model.means.update(torch.randn(3, 2, *model.head.weight.shape[:2], generator=generator))
    return model


def ids(text: str) -> list[int]:
    return list(char_tokenizer()(text)["input_ids"])


def plain_decoder(model: RewardModel, folder: str, member: int) -> Any:
    """The decoder of a member as a plain model: W + (alpha / r) B A by hand."""
    plain: Any = AutoModelForCausalLM.from_pretrained(folder).eval()
    own = {name.replace(".base_layer", ""): p.detach() for name, p in model.model.named_parameters()}
    if not hasattr(model.model, "peft_config"):
        plain.load_state_dict(own)
        return plain
    adapter = f"member_{member}" if member else "default"
    found = 0
    for name, parameter in plain.named_parameters():
        layer = f"base_model.model.{name.removesuffix('.weight')}"
        if f"{layer}.lora_A.{adapter}.weight" in own:
            a, b = (own[f"{layer}.lora_{m}.{adapter}.weight"] for m in "AB")
            parameter.data += 8 / 2 * b @ a
            found += 1
    assert found == 14
    return plain


def naive(model: RewardModel, folder: str, rows: list[tuple[list[int], list[int]]]) -> Tensor:
    """``(S, M)`` rewards, centred by hand."""
    options, columns = model.options, []
    for member in range(options.num_models):
        decoder = plain_decoder(model, folder, member if options.ensemble == "adapters" else 0)
        column = []
        for prompt, completion in rows:
            states = decoder.model(input_ids=torch.tensor([prompt + completion])).last_hidden_state[0]
            state = states[-1] if options.pooling == "last" else states[len(prompt) :].mean(dim=0)
            if options.head == "mlp":
                state = torch.nn.functional.gelu(model.head.inner[member] @ state + model.head.bias[member])
            reward_K = model.head.weight[member] @ state - model.means.value[member].float()
            weights = options.attribute_weights or []
            column.append(sum(w * r for w, r in zip(weights, reward_K, strict=True)))
        columns.append(torch.stack(column))  # type: ignore[arg-type]
    return torch.stack(columns, dim=1).detach()


@pytest.mark.parametrize("name", CASES)
def test_three_lines_score_texts(name: str, folder: str, tmp_path: Path) -> None:
    options, lora = CASES[name]
    trained = made(folder, options, lora)
    trained.save_pretrained(tmp_path / "model")
    rows = [(ids(p), [*ids(c), EOS_ID]) for p, c in zip(PROMPTS, COMPLETIONS, strict=True)]
    members = naive(trained, folder, rows)

    model = RewardModel.from_pretrained(tmp_path / "model")
    found, stds = model.score_with_std(PROMPTS, COMPLETIONS)
    assert found == pytest.approx(members.mean(dim=1).tolist(), rel=1e-4, abs=1e-5)
    assert stds == pytest.approx(members.std(dim=1, correction=0).tolist(), rel=1e-4, abs=1e-5)
    assert (min(stds) > 1e-3) == (trained.options.num_models > 1)
    assert model.score(PROMPTS, COMPLETIONS) == found
    assert model.options == trained.options
    assert not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())

    # Memory settings change no score, and a module gives the same one.
    small = RewardModel.from_pretrained(tmp_path / "model", micro_batch_tokens=20, layout="padded", share_prefix=False)
    assert small.score(PROMPTS, COMPLETIONS) == pytest.approx(found, rel=1e-5, abs=1e-6)
    module = RewardModule.from_pretrained(str(tmp_path / "model"))
    assert module.score_with_std(PROMPTS, COMPLETIONS) == (found, stds)
    assert module.state_dict().keys() == module.reward_model.state_dict().keys()


def test_a_packed_batch_needs_no_tokenizer(folder: str) -> None:
    model = made(folder, {"num_models": 2, "num_attributes": 3})
    model.tokenizer = None
    prompt, parts = [5, 6], [[7, 8], [9]]
    tree = Segment(prompt, children=[Segment(part, [1.0] * len(part)) for part in parts])
    rewards = model(pack([Example("rows:0", tree)]), "packed")
    assert rewards.shape == (2, 2, 3)
    assert rewards.requires_grad
    for reward_MK, part in zip(rewards, parts, strict=True):
        state = model.model.model(input_ids=torch.tensor([prompt + part])).last_hidden_state[0, -1]
        torch.testing.assert_close(reward_MK, model.head.weight @ state, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match=re.escape("RewardModel has no tokenizer: give tokenizer=load_tokenizer(")):
        model.score(["1"], ["2"])


def test_chats_are_rendered_by_the_template(folder: str, tmp_path: Path) -> None:
    made(folder, {}).save_pretrained(tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    tokenizer.chat_template = "{{ mood or '' }}" + tokenizer.chat_template
    model = RewardModel.from_pretrained(tmp_path / "model", tokenizer=tokenizer)
    chat = [{"role": "user", "content": "2+2?"}]
    answers: list[Any] = ["4", [{"role": "assistant", "content": "4"}]]
    written = "<user>2+2?\n<assistant>"
    plain, moody = (model.score([f"{start}{written}"], ["4"])[0] for start in ("", "!!"))
    assert abs(plain - moody) > 1e-4
    assert model.score([chat, chat], answers) == pytest.approx([plain, plain], rel=1e-5)
    assert model.score([chat, chat], answers, {"mood": "!!"}) == pytest.approx([moody, moody], rel=1e-5)
    assert model.score([chat, chat], answers, [None, {"mood": "!!"}]) == pytest.approx([plain, moody], rel=1e-5)


@pytest.mark.parametrize("tied", [True, False])
def test_anyones_classifier_is_a_reward_model(
    tied: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    torch.manual_seed(0)
    config = tiny_config("llama", num_labels=2, tie_word_embeddings=tied)
    classifier = AutoModelForSequenceClassification.from_config(config).eval()
    classifier.save_pretrained(tmp_path)
    char_tokenizer().save_pretrained(tmp_path)
    model = RewardModel.from_pretrained(tmp_path, attributes=["good", "bad"], attribute_weights=[1.0, -1.0])
    # That it has another head is no news.
    assert caplog.messages == []
    expected = []
    for prompt, completion in zip(PROMPTS, COMPLETIONS, strict=True):
        with torch.no_grad():
            good, bad = classifier(input_ids=torch.tensor([[*ids(prompt + completion), EOS_ID]])).logits[0]
        expected.append(float(good - bad))
    assert model.score(PROMPTS, COMPLETIONS) == pytest.approx(expected, rel=1e-4, abs=1e-5)


def test_a_dtype_is_that_of_all_weights_but_adapters(folder: str, tmp_path: Path) -> None:
    options, lora = CASES["adapters"]
    trained = made(folder, options, lora)
    trained.save_pretrained(tmp_path / "model")
    model = RewardModel.from_pretrained(tmp_path / "model", dtype=torch.bfloat16, device="cpu")
    for name, parameter in model.named_parameters():
        assert parameter.dtype == (torch.float32 if "lora_" in name else torch.bfloat16), name
    assert torch.equal(model.model.get_base_model().model.rotary_emb.inv_freq, plain_frequencies(folder))
    assert model.score(PROMPTS, COMPLETIONS) == pytest.approx(trained.eval().score(PROMPTS, COMPLETIONS), abs=0.1)


def plain_frequencies(folder: str) -> Tensor:
    found: Tensor = AutoModelForCausalLM.from_pretrained(folder).model.rotary_emb.inv_freq
    return found


def test_a_folder_is_written_again_as_it_was(folder: str, tmp_path: Path) -> None:
    for number, (options, lora) in enumerate(CASES.values()):
        first, second = tmp_path / f"{number}/first", tmp_path / f"{number}/second"
        made(folder, options, lora).save_pretrained(first)
        RewardModel.from_pretrained(first).save_pretrained(second)
        names = sorted(file.name for file in first.iterdir())
        assert names == sorted(file.name for file in second.iterdir())
        for file in first.glob("*.safetensors"):
            again = load_file(second / file.name)
            assert all(torch.equal(tensor, again[name]) for name, tensor in load_file(file).items())
        stored = [json.loads((place / "reward_head.json").read_text()) for place in (first, second)]
        means = [content.pop("member_means", [[0.0]]) for content in stored]
        assert stored[0] == stored[1]
        assert torch.allclose(*map(torch.tensor, means))


def test_one_adapter_of_an_ensemble_can_be_merged(folder: str, tmp_path: Path) -> None:
    options, lora = CASES["an ensemble of one adapter"]
    model = made(folder, options, lora)
    model.save_pretrained(tmp_path / "merged", merge_adapter=True)
    merged = RewardModel.from_pretrained(tmp_path / "merged")
    assert not hasattr(merged.model, "peft_config")
    expected = model.eval().score(PROMPTS, COMPLETIONS)
    assert merged.score(PROMPTS, COMPLETIONS) == pytest.approx(expected, rel=1e-4, abs=1e-5)


# Errors.


@pytest.mark.parametrize(
    ("prompts", "completions", "message"),
    [
        (["a"], ["b", "c"], "given 1 prompts and 2 completions; give two lists of one length"),
        ("a", "b", "given str and str"),
        (["a", "a"], ["b", ""], "completion 1 is empty"),
        (
            ["a", "a"],
            ["b", "9" * 200],
            "completion 1: prompt and completion have 202 tokens, and the reward model reads",
        ),
    ],
)
def test_what_cannot_be_scored_is_refused(folder: str, prompts: Any, completions: Any, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        made(folder, {}).score(prompts, completions)


def test_tokens_beyond_the_vocabulary_are_refused(folder: str) -> None:
    model = made(folder, {})
    assert model.tokenizer is not None
    model.tokenizer.add_tokens(["~"])
    with pytest.raises(ValueError, match=r"has token 64, the model's vocabulary has 64: the tokenizer is not this"):
        model.score(["1"], ["~"])


def test_folders_that_hold_no_such_model_are_refused(folder: str, tmp_path: Path) -> None:
    made(folder, *CASES["adapters"]).save_pretrained(tmp_path / "ensemble")
    made(folder, *CASES["mlp, mean"]).save_pretrained(tmp_path / "mlp")
    decoder = load_causal_lm(folder, dtype=torch.float32)
    ProcessRewardModel(decoder, tokenizer=char_tokenizer()).save_pretrained(tmp_path / "process")
    for name, file in (("ensemble", MEMBER_ADAPTERS), ("mlp", "reward_head.safetensors")):
        (tmp_path / name / file).unlink()
    cases: list[tuple[type, str, str]] = [
        (RewardModel, folder, "holds no model that RewardModule exported: train one with RewardModule"),
        (RewardModel, str(tmp_path / "process"), "holds no model that RewardModule exported"),
        (ProcessRewardModel, str(tmp_path / "mlp"), "holds no model that ProcessRewardModule exported"),
        (RewardModel, str(tmp_path / "nowhere"), "/nowhere' to load the reward model from"),
        (RewardModel, str(tmp_path / "ensemble"), "holds no adapters of further members: export it again"),
        (RewardModel, str(tmp_path / "mlp"), "holds no head: export it again"),
    ]
    for kind, place, message in cases:
        with pytest.raises(ValueError, match=re.escape(message)) as error:
            kind.from_pretrained(place)  # type: ignore[attr-defined]
        assert "\n" not in str(error.value)
    with pytest.raises(TypeError, match="RewardModelOptions has no option 'atributes'; did you mean 'attributes'"):
        RewardModel.from_pretrained(tmp_path / "mlp", atributes=["a"])
    with pytest.raises(ValueError, match="micro_batch_tokens is 0; it must be above 0"):
        RewardModel(decoder, micro_batch_tokens=0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"head": "quadratic"}, "head is 'quadratic'; it must be one of linear, mlp"),
        ({"pooling": "first"}, "pooling is 'first'; it must be one of last, mean"),
        ({"num_models": 0}, "num_models is 0; it must be a whole number of at least 1"),
        ({"num_attributes": 0}, "num_attributes is 0; it must be a whole number of at least 1"),
        ({"ensemble": "models"}, "ensemble is 'models'; it must be one of heads, adapters"),
        ({"attributes": ["a", "a"]}, "give as many different names"),
        ({"num_attributes": 3, "attributes": ["a", "b"]}, "num_attributes=3"),
        ({"num_attributes": 2, "attribute_weights": [1.0]}, "attribute_weights is [1.0]"),
    ],
)
def test_options_out_of_range_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        RewardModelOptions(**options)


# Process reward models.


STEP_CASES: dict[str, dict[str, Any]] = {
    "linear": {},
    "mlp, outcome": {"head": "mlp", "outcome_head": True, "aggregation": "product"},
    "tokens": {"head": "tokens", "label_tokens": ["y", "n"]},
    "boundaries": {"boundaries": "learned", "aggregation": "mean"},
}
SOLUTIONS = ["1+1=2\n#2", "4", "2\n\n3\n4"]


def step_logits(model: ProcessRewardModel, folder: str, tokens: list[int]) -> dict[str, Tensor]:
    """Logits of each output at each token."""
    plain: Any = AutoModelForCausalLM.from_pretrained(folder).eval()
    plain.load_state_dict(model.model.state_dict())
    with torch.no_grad():
        states = plain.model(input_ids=torch.tensor([tokens])).last_hidden_state[0]
        found = {}
        if model.head is not None:
            outputs = model.head(states)[:, 0].unbind(dim=1)
            found = dict(zip(model.options.outputs, outputs, strict=True))
        if model.options.head == "tokens":
            yes, no = (plain.lm_head(states)[:, ids(text)[0]] for text in model.options.label_tokens)
            found["step"] = yes - no
    return found


@pytest.mark.parametrize("name", STEP_CASES)
def test_three_lines_score_steps(name: str, folder: str, tmp_path: Path) -> None:
    decoder = load_causal_lm(folder, dtype=torch.float32)
    options = ProcessRewardModelOptions(**STEP_CASES[name])
    trained = ProcessRewardModel(decoder, options, tokenizer=char_tokenizer(), seed=4)
    trained.save_pretrained(tmp_path / "model")
    expected = []
    for prompt, solution in zip(PROMPTS, SOLUTIONS, strict=True):
        if options.boundaries == "learned":
            logits = step_logits(trained, folder, ids(prompt + solution))
            places = range(len(prompt), len(prompt + solution))
            ends = [n for n in places if logits["boundary"][n] > 0 or n == places[-1]]
        else:
            text, ends = prompt, []
            for step in filter(None, solution.split("\n")):
                text += f"{step}\n"
                ends.append(len(text) - 1)
            logits = step_logits(trained, folder, ids(text))
        expected.append([float(logits["step"][n].sigmoid()) for n in ends])
    assert max(map(len, expected)) > 1

    model = ProcessRewardModel.from_pretrained(tmp_path / "model")
    found = model.score_steps(PROMPTS, SOLUTIONS)
    assert [len(steps) for steps in found] == [len(steps) for steps in expected]
    for own, steps in zip(found, expected, strict=True):
        assert own == pytest.approx(steps, abs=1e-5)
    rules = {"min": min, "mean": lambda s: sum(s) / len(s), "product": lambda s: torch.tensor(s).prod().item()}
    scores = [rules[options.aggregation](steps) for steps in expected]
    assert model.score(PROMPTS, SOLUTIONS) == pytest.approx(scores, abs=1e-5)
    assert model.options == options
    module = ProcessRewardModule.from_pretrained(str(tmp_path / "model"))
    assert module.score_steps(PROMPTS, SOLUTIONS) == found
    assert module.state_dict().keys() == module.reward_model.state_dict().keys()


def test_options_of_a_stored_process_reward_model_can_be_replaced(folder: str, tmp_path: Path) -> None:
    decoder = load_causal_lm(folder, dtype=torch.float32)
    ProcessRewardModel(decoder, tokenizer=char_tokenizer()).save_pretrained(tmp_path / "model")
    model = ProcessRewardModel.from_pretrained(tmp_path / "model", aggregation="last", step_separator="|")
    steps = model.score_steps(["1"], ["2|3"])[0]
    assert len(steps) == 2
    assert model.score(["1"], ["2|3"]) == [steps[1]]
    assert model.score([], []) == []
    with pytest.raises(ValueError, match="completion 1 has no steps: give at least one character between separators"):
        model.score_steps(["1", "1"], ["2", "||"])
    with pytest.raises(ValueError, match="completion 0: prompt and completion have 202 tokens, and the reward model"):
        model.score_steps(["1"], ["9" * 200])
    with pytest.raises(ValueError, match="label_tokens has 'yes', which is 3 tokens"):
        ProcessRewardModel.from_pretrained(tmp_path / "model", head="tokens", label_tokens=["yes", "no"])
