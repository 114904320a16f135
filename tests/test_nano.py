from __future__ import annotations

import importlib.util
import json
import os
import string
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from rlhf_lightning.data.tasks import open_task

MODELS = Path(__file__).resolve().parents[1] / "configs" / "models"
CHARACTERS = "\n" + string.digits + string.ascii_letters + string.punctuation + " "
SPECIAL = {"nano": ["<pad>", "<eos>", "<bos>", "<unk>"], "small": ["<pad>", "<eos>", "<bos>"]}
TOKENIZERS = {name: AutoTokenizer.from_pretrained(MODELS / name) for name in SPECIAL}
GSM8K = Path(os.environ.get("GSM8K_DIR", Path(__file__).resolve().parents[2] / "shared" / "data" / "gsm8k"))


@pytest.mark.parametrize(("name", "parameters", "positions"), [("nano", 603_712, 256), ("small", 4_197_120, 1024)])
def test_config_makes_a_model_of_the_stated_size(name, parameters, positions):
    config = AutoConfig.from_pretrained(MODELS / name)
    tokenizer = TOKENIZERS[name]
    model = AutoModelForCausalLM.from_config(config)
    assert type(model).__name__ == "Qwen3ForCausalLM" == config.architectures[0]
    assert sum(parameter.numel() for parameter in model.parameters()) == parameters
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert len(tokenizer) == config.vocab_size
    assert tokenizer.model_max_length == config.max_position_embeddings == positions
    assert (config.pad_token_id, config.eos_token_id, config.bos_token_id) == (0, 1, 2)
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.bos_token_id) == (0, 1, 2)


@pytest.mark.parametrize("name", SPECIAL)
def test_special_tokens_come_first_and_none_is_added_to_a_text(name):
    tokenizer = TOKENIZERS[name]
    assert tokenizer.convert_ids_to_tokens(range(len(SPECIAL[name]))) == SPECIAL[name]
    assert sorted(tokenizer.all_special_tokens) == sorted(SPECIAL[name])
    assert tokenizer("3+4=?").input_ids == tokenizer("3+4=?", add_special_tokens=False).input_ids
    assert tokenizer("7<eos>").input_ids == [*tokenizer("7").input_ids, 1]
    assert tokenizer.decode([*tokenizer("7").input_ids, 1, 0, 0], skip_special_tokens=True) == "7"


@settings(max_examples=200, deadline=None)
@given(st.text(alphabet=CHARACTERS, max_size=60))
def test_nano_reads_one_token_per_character_and_gives_back_the_text(text):
    ids = TOKENIZERS["nano"](text).input_ids
    assert TOKENIZERS["nano"].decode(ids) == text
    assert len(ids) == len(text) or any(token in text for token in SPECIAL["nano"])


@settings(max_examples=200, deadline=None)
@given(st.text(alphabet=st.characters(exclude_categories=["Cs"]), max_size=60))
def test_small_gives_back_any_text(text):
    tokenizer = TOKENIZERS["small"]
    assert tokenizer.decode(tokenizer(text).input_ids) == text


@settings(max_examples=50, deadline=None)
@given(st.text(alphabet=CHARACTERS, max_size=30), st.text(alphabet=CHARACTERS, max_size=30))
def test_nano_reads_prompt_and_completion_apart_as_it_reads_them_together(prompt, completion):
    tokenizer = TOKENIZERS["nano"]
    apart = tokenizer(prompt).input_ids + tokenizer(completion).input_ids
    if not any(token in prompt + completion for token in SPECIAL["nano"]):
        assert tokenizer(prompt + completion).input_ids == apart


@pytest.mark.parametrize("text", ["", " ", "\n\n", " a  b ", "don 't , .", "<eos", "<eos> <pad>", "  <eos>  x"])
@pytest.mark.parametrize("name", SPECIAL)
def test_texts_that_tokenizers_like_to_tidy(name, text):
    assert TOKENIZERS[name].decode(TOKENIZERS[name](text).input_ids) == text


def test_nano_marks_what_it_cannot_read_and_small_splits_digits():
    assert TOKENIZERS["nano"]("é3").input_ids == [3, *TOKENIZERS["nano"]("3").input_ids]
    assert len(TOKENIZERS["small"]("1234567890").input_ids) == 10


@pytest.mark.parametrize("name", SPECIAL)
def test_chat_prompt_is_a_prefix_of_the_conversation_and_assistant_turns_are_masked(name):
    tokenizer = TOKENIZERS[name]
    messages = [
        {"role": "system", "content": "Be brief. "},
        {"role": "user", "content": "3+4=?"},
        {"role": "assistant", "content": "#7\n"},
    ]
    whole = tokenizer.apply_chat_template(messages, tokenize=False)
    prompt = tokenizer.apply_chat_template(messages[:2], tokenize=False, add_generation_prompt=True)
    assert prompt == "system: Be brief. <eos>user: 3+4=?<eos>assistant: "
    assert whole == prompt + "#7\n<eos>"
    encoded = tokenizer.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
    counted = [i for i, mask in zip(encoded["input_ids"], encoded["assistant_masks"], strict=True) if mask]
    assert tokenizer.decode(counted) == "#7\n<eos>"


def test_the_embedded_task_fits_nano():
    tokenizer = TOKENIZERS["nano"]
    rows = open_task("sums:demonstrations?rows=200&careless=0&terms=8&high=99")
    lengths = [len(tokenizer(row["prompt"] + row["completion"]).input_ids) for row in rows]
    assert all(tokenizer.unk_token_id not in tokenizer(row["prompt"] + row["completion"]).input_ids for row in rows)
    assert max(lengths) < 256


def builder():
    specification = importlib.util.spec_from_file_location("build_tokenizers", MODELS / "build_tokenizers.py")
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


def test_the_script_builds_the_committed_nano_tokenizer():
    built = json.loads(builder().characters().to_str())
    committed = json.loads((MODELS / "nano" / "tokenizer.json").read_text())
    assert committed["model"] == built["model"]
    assert committed["pre_tokenizer"] == built["pre_tokenizer"]
    assert committed["decoder"] == built["decoder"]


@pytest.mark.skipif(
    not (GSM8K / "train.jsonl").is_file(), reason="GSM8K is not here: set GSM8K_DIR to the folder with train.jsonl"
)
def test_the_script_builds_the_committed_small_tokenizer():
    module = builder()
    built = json.loads(module.byte_pairs(module.gsm8k_texts(GSM8K), 4096).to_str())
    assert json.loads((MODELS / "small" / "tokenizer.json").read_text())["model"] == built["model"]
    assert (MODELS / "small" / "tokenizer.json").stat().st_size < 400_000
