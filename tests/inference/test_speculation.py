"""Speculation changes no sample: engines with it, against engines without and against exact distributions."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM

from rlhf_lightning.inference import Completion, LocalEngine, SamplingParams
from rlhf_lightning.inference.draft_lengths import Pace
from rlhf_lightning.inference.drafts import ModelDrafter
from rlhf_lightning.inference.speculation import Speculator

from ..helpers import ARCHITECTURES, VOCAB_SIZE, char_tokenizer, save_tiny_model, tiny_model
from .test_engine import transformers_greedy

# A prompt that repeats itself, so that lookups find something, and others.
PROMPTS = [[5, 6, 7, 8, 5, 6, 7, 8, 5, 6], [9, 10, 11], [12], [13, 14, 13, 14, 13, 14, 15], [20, 21] * 6]
KINDS = ("ngram", "draft", "early_exit")
SETTINGS = {
    "plain": SamplingParams(max_new_tokens=14),
    "peaked": SamplingParams(max_new_tokens=14, temperature=0.4, model_logprobs=True),
    "top-k": SamplingParams(max_new_tokens=14, temperature=1.3, top_k=5),
    "top-p": SamplingParams(max_new_tokens=14, temperature=0.8, top_p=0.8),
    "min-p": SamplingParams(max_new_tokens=14, min_p=0.1),
    "penalty": SamplingParams(max_new_tokens=14, temperature=0.5, repetition_penalty=1.5, top_k=20),
    "minimum": SamplingParams(max_new_tokens=14, temperature=0.6, min_new_tokens=6, stop_token_ids=tuple(range(3, 40))),
    "stops": SamplingParams(max_new_tokens=14, temperature=0.6, stop=("a", "7"), stop_token_ids=(9, 30)),
    "greedy": SamplingParams(max_new_tokens=14, temperature=0),
    "greedy penalty": SamplingParams(max_new_tokens=14, temperature=0, repetition_penalty=1.3, min_new_tokens=14),
}


class Eager(Pace):
    """Drafts in every round, as many as there is room for, or lengths that change from row to row."""

    def __init__(self, longest: int, ragged: bool = False) -> None:
        super().__init__(longest, 0.0, 8)
        self.ragged, self.rounds = ragged, 0

    def choose(self, rates: Sequence[float], rooms: Sequence[int], unprepared: int = 0, ahead: int = 1) -> list[int]:
        self.rounds += 1
        if not self.ragged:
            return [min(room, self.longest) for room in rooms]
        # Plain steps among them.
        return [min(room, (self.rounds * (row + 2)) % (self.longest + 1)) for row, room in enumerate(rooms)]


def disturbed(model: Any) -> Any:
    """Changes the weights a little, so that a model often agrees with what it was."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for weight in model.parameters():
            weight += 0.03 * torch.randn(weight.shape, generator=generator)
    return model


def spec_of(kind: str) -> Any:
    if kind == "draft":
        return {"draft": disturbed(tiny_model("llama"))}
    return kind if kind == "ngram" else {"early_exit": 1}


def speculating(model: Any, kind: Any, longest: int = 4, ragged: bool = False, **options: Any) -> LocalEngine:
    spec = spec_of(kind) if kind in KINDS else kind
    engine = LocalEngine(model, char_tokenizer(), speculation=spec, **options)
    assert engine._speculation is not None
    engine._speculation.pace = Eager(longest, ragged)
    return engine


def assert_equal(found: list[list[Completion]], expected: list[list[Completion]]) -> None:
    for one, other in zip(itertools.chain(*found), itertools.chain(*expected), strict=True):
        assert (one.token_ids, one.text, one.finish_reason) == (other.token_ids, other.text, other.finish_reason)
        np.testing.assert_allclose(one.logprobs, other.logprobs, atol=2e-4)
        assert (one.model_logprobs is None) == (other.model_logprobs is None)
        if one.model_logprobs is not None and other.model_logprobs is not None:
            np.testing.assert_allclose(one.model_logprobs, other.model_logprobs, atol=2e-4)


# The fast run has a draft model with every setting, and each of the others with every second one.
IN_TURN = [
    pytest.param(setting, kind, marks=() if kind in ("draft", other) else pytest.mark.slow)
    for setting, other in zip(SETTINGS, 5 * ("early_exit", "ngram"), strict=True)
    for kind in KINDS
]


@pytest.mark.parametrize(("setting", "kind"), IN_TURN)
def test_samples_and_log_probs_are_those_of_plain_decoding(kind: str, setting: str) -> None:
    model, params = tiny_model("llama", num_hidden_layers=2), SETTINGS[setting]
    seeds = [[100 * row + column for column in range(3)] for row in range(len(PROMPTS))]
    expected = LocalEngine(model, char_tokenizer()).generate(PROMPTS, 3, params, seeds=seeds)
    engine = speculating(model, kind, ragged=setting in ("plain", "penalty", "stops"))
    assert_equal(engine.generate(PROMPTS, 3, params, seeds=seeds), expected)
    counts = engine.statistics()["speculation"]
    # A random model repeats itself where it is sharp, and lookups find nothing elsewhere.
    if kind != "ngram" or setting in ("peaked", "greedy"):
        assert counts["rounds"] > 3
        assert counts["drafted"] > counts["accepted"]
    if kind == "draft" or setting == "peaked":
        assert counts["accepted"] > 0


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_greedy_tokens_are_those_of_transformers(arch: str) -> None:
    model, params = tiny_model(arch), SamplingParams(max_new_tokens=16, temperature=0)
    expected = [[transformers_greedy(model, prompt)] for prompt in PROMPTS]
    for kind in KINDS:
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # none of these may do without
            found = speculating(model, kind, ragged=True).generate(PROMPTS, 1, params)
        assert [[sample.token_ids for sample in group] for group in found] == expected


@pytest.mark.parametrize(("arch", "rows"), [("phi", True), ("opt", True), ("bloom", False)])
def test_models_without_plain_attention_run_without_speculation(arch: str, rows: bool) -> None:
    common = {"vocab_size": 66, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    extra = {"opt": {"ffn_dim": 48, "word_embed_proj_dim": 32}, "phi": {"intermediate_size": 48}}.get(arch, {})
    tokens = {"pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 2}
    torch.manual_seed(0)
    config = AutoConfig.for_model(arch, **common, **extra, **tokens, max_position_embeddings=128, initializer_range=0.2)
    model = AutoModelForCausalLM.from_config(config).eval()
    expected = [[transformers_greedy(model, prompt)] for prompt in PROMPTS]
    engine = speculating(model, "early_exit", longest=3)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = engine.generate(PROMPTS, 1, SamplingParams(max_new_tokens=16, temperature=0))
    assert [[sample.token_ids for sample in group] for group in found] == expected
    assert (engine.statistics()["speculation"]["rounds"] > 0) == rows
    assert any("without speculation" in str(warning.message) for warning in caught) != rows


@pytest.mark.parametrize(
    ("cache", "kind"),
    [
        pytest.param(cache, kind, marks=() if cache == "dynamic" or kind == fast else pytest.mark.slow)
        for cache, fast in (("dynamic", "draft"), ("paged", "draft"), ("int8", "early_exit"))
        for kind in KINDS
    ],
)
def test_a_row_depends_neither_on_its_neighbours_nor_on_lengths_nor_on_the_cache(kind: str, cache: Any) -> None:
    model = tiny_model("qwen3")
    params = SamplingParams(max_new_tokens=18, temperature=0.5, stop_token_ids=tuple(range(3, 9)))
    seeds = [[10 * row + column for column in range(2)] for row in range(len(PROMPTS))]
    # Few rows at once: others join while some are in the middle.
    engine = speculating(model, kind, ragged=True, max_batch_tokens=90, cache=cache)
    together = engine.generate(PROMPTS, 2, params, seeds=seeds)
    again = engine.generate(PROMPTS[::-1], 2, params, seeds=seeds[::-1])[::-1]
    for prompt, group, repeated, row in zip(PROMPTS, together, again, seeds, strict=True):
        for sample, other, seed in zip(group, repeated, row, strict=True):
            alone = speculating(model, kind, longest=2, cache=cache).generate([prompt], 1, params, seeds=[[seed]])
            if cache == "int8":
                # Rounded states are those of other layouts up to rounding, which may change a token.
                assert sample.token_ids[:3] == alone[0][0].token_ids[:3] == other.token_ids[:3]
            else:
                assert sample.token_ids == alone[0][0].token_ids == other.token_ids


def test_the_clock_changes_no_sample() -> None:
    model, params = tiny_model("llama"), SamplingParams(max_new_tokens=40, temperature=0.5)
    seeds = [[row] for row in range(len(PROMPTS))]
    expected = LocalEngine(model, char_tokenizer()).generate(PROMPTS, 1, params, seeds=seeds)
    for kind in KINDS:
        engine = LocalEngine(model, char_tokenizer(), speculation=spec_of(kind))
        assert_equal(engine.generate(PROMPTS, 1, params, seeds=seeds), expected)
        assert engine.statistics()["speculation"]["plain_steps"] >= 2  # the first steps are measured


@pytest.mark.parametrize("kind", ["draft", "early_exit"])
def test_after_a_rollback_caches_hold_what_computing_the_rows_gives(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("llama")
    rounds = []
    real = Speculator.step

    def checked(self: Any, requests: Any, cache: Any, lanes: Any) -> bool:
        done = real(self, requests, cache, lanes)
        held_rows = [(self._decoder, cache, requests)]
        if isinstance(self._drafter, ModelDrafter):
            held_rows.append((self._drafter._decoder, self._drafter._cache, self._drafter._rows))
        for decoder, held, rows in held_rows:
            for row, request in enumerate(rows):
                known, length = [*request.prompt, *request.token_ids], int(held.lengths[row])
                # The model's own lacks the last token; samples that ended may have more than they were given.
                assert length == len(known) - 1 or request.finish_reason or held is not cache
                length = min(length, len(known) - 1)
                _, states = decoder.prefill([known[:length]])
                for planes, layer in zip(held._planes, states, strict=True):
                    for plane, expected in zip(planes, layer, strict=True):
                        found = plane.get(len(rows), length)[row]
                        torch.testing.assert_close(found, expected[0], rtol=0, atol=1e-5)
        rounds.append(done)
        return done

    monkeypatch.setattr(Speculator, "step", checked)
    speculating(model, kind, ragged=True).generate(PROMPTS, 2, SamplingParams(max_new_tokens=12, seed=3))
    assert sum(rounds) > 3


def test_a_call_that_rests_is_one_of_an_engine_without_speculation() -> None:
    model = tiny_model("llama")
    engine, plain = LocalEngine(model, None, speculation="ngram"), LocalEngine(model, None)
    params = SamplingParams(max_new_tokens=6, seed=1)
    engine._speculation.pace._resting[2] = 1
    found = []
    for _ in range(2):
        found.append([[s.token_ids for s in group] for group in engine.generate([[5, 6], [7, 8, 9]], 1, params)])
        found.append(engine.statistics()["attention"])
    expected = [[s.token_ids for s in group] for group in plain.generate([[5, 6], [7, 8, 9]], 1, params)]
    assert found[0] == found[2] == expected
    assert found[1] == plain.statistics()["attention"] != found[3]
    counts = engine.statistics()["speculation"]
    assert counts["plain_calls"] == 1
    assert counts["rounds"] + counts["plain_steps"] > 0


def test_adapters_take_part_in_the_first_layers() -> None:
    torch.manual_seed(0)
    model = get_peft_model(tiny_model("llama"), LoraConfig(r=4, init_lora_weights=False, target_modules="all-linear"))
    params = SamplingParams(max_new_tokens=12, temperature=0.7, seed=5)
    expected = LocalEngine(model, None).generate(PROMPTS, 2, params)
    engine = LocalEngine(model, None, speculation={"early_exit": 1})
    assert engine._speculation is not None
    engine._speculation.pace = Eager(3)
    assert_equal(engine.generate(PROMPTS, 2, params), expected)
    assert engine.statistics()["speculation"]["rounds"] > 0


def test_a_model_that_drafts_for_itself_is_always_right() -> None:
    model = tiny_model("llama")
    engine = speculating(model, {"draft": tiny_model("llama")}, longest=4)
    params = SamplingParams(max_new_tokens=21, min_new_tokens=21, temperature=0.9, top_p=0.9, repetition_penalty=1.2)
    engine.generate(PROMPTS, 2, params)
    counts = engine.statistics()["speculation"]
    # The first token, then four rounds of four drafts and one token of the model.
    assert counts["acceptance_rate"] == 1
    assert (counts["rounds"], counts["plain_steps"], counts["drafted"]) == (4, 0, 4 * 4 * 10)
    assert counts["tokens"] == 20 * 10


def test_a_draft_may_have_fewer_positions_and_other_scores_than_tokens(tmp_path: Path) -> None:
    model = tiny_model("llama")
    params = SamplingParams(max_new_tokens=20, temperature=0.5, seed=1)
    expected = LocalEngine(model, char_tokenizer()).generate(PROMPTS, 2, params)
    for name, options in (("wide", {"vocab_size": 80}), ("short", {"max_position_embeddings": 20})):
        folder = save_tiny_model(tmp_path / name, seed=2, num_hidden_layers=1, **options)
        engine = speculating(model, {"draft": str(folder)})
        assert_equal(engine.generate(PROMPTS, 2, params), expected)
        assert engine.statistics()["speculation"]["rounds"] > 0


def test_folders_are_loaded(tmp_path: Path) -> None:
    target, draft = save_tiny_model(tmp_path / "target"), save_tiny_model(tmp_path / "draft", seed=1)
    for speculation in ("ngram", {"draft": draft}, {"early_exit": 1}, None):
        engine = LocalEngine.from_pretrained(target, speculation=speculation, dtype="float32")
        assert len(engine.generate(["1+2="], 2, SamplingParams(max_new_tokens=4, seed=0))[0]) == 2
        assert ("speculation" in engine.statistics()) == (speculation is not None)


@pytest.mark.parametrize(
    ("spec", "cache", "message"),
    [
        ("lookup", "dynamic", "speculation='lookup' is not allowed: use 'ngram'"),
        ({"draft": "a", "early_exit": 1}, "dynamic", "is not allowed: use 'ngram'"),
        ({"early_exit": True}, "dynamic", "is not allowed: use 'ngram'"),
        ({"early_exit": 2}, "dynamic", "the model has 2 layers; use 1 to 1"),
        ({"early_exit": 0}, "dynamic", "the model has 2 layers; use 1 to 1"),
        (
            {"draft": tiny_model("llama", vocab_size=50)},
            "dynamic",
            rf"another vocabulary \(50 tokens, the model has {VOCAB_SIZE}\)",
        ),
        ("ngram", "static", "is not allowed with cache='static'"),
    ],
)
def test_wrong_options_are_one_line(spec: Any, cache: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message) as raised:
        LocalEngine(tiny_model("llama"), char_tokenizer(), speculation=spec, cache=cache)
    assert "\n" not in str(raised.value)


def test_a_draft_with_another_tokenizer_is_refused(tmp_path: Path) -> None:
    folder = save_tiny_model(tmp_path)
    other = char_tokenizer()
    other.add_tokens(["<more>"])
    with pytest.raises(ValueError, match="has another vocabulary"):
        LocalEngine(tiny_model("llama"), other, speculation={"draft": folder})


def test_scores_that_are_not_finite_are_refused() -> None:
    model = tiny_model("llama")
    with torch.no_grad():
        model.get_output_embeddings().weight[5] = float("nan")
    with pytest.raises(ValueError, match="hold NaN or infinity"):
        speculating(model, "early_exit").generate(PROMPTS, 1, SamplingParams(max_new_tokens=4))
