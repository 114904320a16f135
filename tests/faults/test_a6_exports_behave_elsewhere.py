"""An export behaves elsewhere as the model did here, whatever was trained of it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import lightning
import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, PreTrainedTokenizerFast

from rlhf_lightning import SFTModule
from rlhf_lightning.callbacks import ModelExport
from rlhf_lightning.data.tokenization import RowTokenizer
from rlhf_lightning.datamodules import SFTDataModule
from rlhf_lightning.inference import LocalEngine, SamplingParams
from rlhf_lightning.models import load_causal_lm, load_tokenizer, save_pretrained
from rlhf_lightning.models.reference import ADAPTER_COPY, AdapterReference

from ..helpers import EOS_ID, VOCAB_SIZE, char_tokenizer, save_tiny_model
from ..models.test_saving import logits, reload, shake

pytestmark = pytest.mark.filterwarnings(
    "ignore:Model has `tie_word_embeddings=True`:UserWarning",
    "ignore:You have requested `ensure_weight_tying`:UserWarning",
    "ignore:.*lora_bias=True. was passed",
    "ignore:The following (rank|alpha)_pattern keys:RuntimeWarning",
)

EMBEDDING = {"target_modules": ["q_proj", "embed_tokens"]}
HEAD = {"target_modules": ["q_proj", "lm_head"]}
TIE = {"ensure_weight_tying": True}
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "dora": {"use_dora": True},
    "rslora": {"use_rslora": True},
    "bias all": {"bias": "all"},
    "bias lora_only": {"bias": "lora_only"},
    "save embedding": {"modules_to_save": ["embed_tokens"]},
    "save embedding, tied": {"modules_to_save": ["embed_tokens"], **TIE},
    "save head": {"modules_to_save": ["lm_head"]},
    "save head, tied": {"modules_to_save": ["lm_head"], **TIE},
    "save both": {"modules_to_save": ["embed_tokens", "lm_head"]},
    "save norms": {"modules_to_save": ["norm"]},
    "adapt embedding": EMBEDDING,
    "adapt embedding, tied": {**EMBEDDING, **TIE},
    "adapt head": HEAD,
    "adapt head, tied": {**HEAD, **TIE},
    "some tokens": {"trainable_token_indices": [5, 6]},
    "some tokens, tied": {"trainable_token_indices": [5, 6], **TIE},
    "one layer": {"target_modules": ["q_proj"], "layers_to_transform": [0]},
    "ranks": {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"q_proj": 3}},
    "parameters": {"target_parameters": ["mlp.down_proj.weight"]},
}


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("bases")
    return {
        "qwen2 tied": save_tiny_model(folder / "tied", "qwen2", tie_word_embeddings=True),
        "llama": save_tiny_model(folder / "untied", "llama"),
    }


def close(one: torch.Tensor, other: torch.Tensor) -> bool:
    return torch.allclose(one, other, rtol=1e-4, atol=1e-4)


QUICK = ("bias all", "save embedding, tied", "adapt embedding, tied", "adapt head", "some tokens")


@pytest.mark.parametrize(
    ("arch", "option"),
    [
        pytest.param(arch, option, marks=() if arch == "qwen2 tied" and option in QUICK else pytest.mark.slow)
        for arch in ("qwen2 tied", "llama")
        for option in OPTIONS
    ],
)
def test_whatever_an_adapter_trains_is_the_same_everywhere(
    arch: str, option: str, bases: dict[str, Path], tmp_path: Path
) -> None:
    base, tokenizer = bases[arch], char_tokenizer()
    model = load_causal_lm(base, dtype=torch.float32, lora={"r": 4, "lora_alpha": 8, **OPTIONS[option]})
    shake(model)
    trained = logits(model.eval())
    assert not close(trained, logits(reload(base)))

    # The adapter alone, in plain peft; merged, in plain transformers.
    save_pretrained(model, tokenizer, tmp_path / "adapter")
    assert close(logits(PeftModel.from_pretrained(reload(base), tmp_path / "adapter")), trained)
    save_pretrained(model, tokenizer, tmp_path / "merged", merge_adapter=True)
    assert close(logits(reload(tmp_path / "merged")), trained)
    assert close(logits(model), trained), "the model itself is not touched"

    # The next stage begins there, with the same as its reference, and what it trains can be exported as well.
    following = load_causal_lm(tmp_path / "adapter", dtype=torch.float32).eval()
    assert close(logits(following), trained)
    trains = {name.replace("default", "") for name, p in following.named_parameters() if p.requires_grad}
    assert trains == {name.replace("default", "") for name, p in model.named_parameters() if p.requires_grad}
    assert ADAPTER_COPY in following.peft_config
    with AdapterReference(following).scoring() as reference:
        assert close(logits(reference), trained)
    shake(following, seed=1)
    moved = logits(following)
    assert not close(moved, trained)
    save_pretrained(following, tokenizer, tmp_path / "following")
    assert close(logits(PeftModel.from_pretrained(reload(base), tmp_path / "following")), moved)


def test_tied_adapters_stay_tied_when_the_model_is_moved(bases: dict[str, Path]) -> None:
    model = load_causal_lm(bases["qwen2 tied"], dtype=torch.float32, lora={"r": 4, **EMBEDDING, **TIE})
    names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert not [name for name in names if "lm_head" in name], "the output projection has no weights of its own"
    model.to(torch.float64).to(torch.float32)  # every parameter gets new memory
    shake(model)
    base = model.get_base_model()
    embedding, head = base.get_input_embeddings(), base.get_output_embeddings()
    expected = embedding.lora_embedding_A["default"].t() @ embedding.lora_embedding_B["default"].t()
    found = head.lora_B["default"].weight @ head.lora_A["default"].weight
    assert torch.equal(found, expected)
    assert float(found.detach().norm()) > 0


@pytest.mark.parametrize(
    ("arch", "lora", "message"),
    [
        (
            "llama",
            {"layer_replication": [[0, 2], [1, 2]]},
            "lora's layer_replication is .*, with which the",
        ),
        ("llama", {"alora_invocation_tokens": [5]}, "lora's alora_invocation_tokens is"),
        ("gpt2", {"target_modules": ["c_attn", "lm_head"], **TIE}, "lora's ensure_weight_tying with target_modules"),
    ],
)
def test_what_could_not_be_loaded_again_is_refused_at_the_start(
    arch: str, lora: dict[str, Any], message: str, tmp_path: Path
) -> None:
    base = save_tiny_model(tmp_path / "base", arch)
    with pytest.raises(ValueError, match=rf"^{message}.*$"):
        load_causal_lm(base, dtype=torch.float32, lora=lora)


def trainer(**options: Any) -> lightning.Trainer:
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    return lightning.Trainer(**{**quiet, "enable_checkpointing": False, "max_steps": 1, **options})


ROWS = [{"prompt": "q", "completion": "a"}]


@pytest.mark.parametrize(
    ("lora", "message"),
    [
        ({"r": 4, "lora_bias": True}, "cannot be merged (Impossible to merge LoRA with `lora_bias=True`"),
        ({"r": 4}, None),
    ],
)
def test_what_cannot_be_merged_is_known_before_the_first_step(
    lora: dict[str, Any], message: str | None, bases: dict[str, Path], tmp_path: Path
) -> None:
    module = SFTModule(str(bases["llama"]), lora=lora)
    run = trainer(callbacks=[ModelExport(str(tmp_path / "out"), merge_adapter=True)])
    data = SFTDataModule(train=ROWS)
    if message is None:
        run.fit(module, data)
        assert (tmp_path / "out" / "model.safetensors").exists()
        return
    with pytest.raises(ValueError, match="merge_adapter=False") as caught:
        run.fit(module, data)
    assert message in str(caught.value)
    assert run.global_step == 0
    assert not (tmp_path / "out").exists()


# The base model of an adapter.


def written_base(folder: Path) -> str:
    return str(json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"])


@pytest.mark.parametrize("given", ["base", "org/base", "./models/base", "absolute"])
def test_an_adapter_names_its_base_as_the_user_did(given: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    given = str(tmp_path / "base") if given == "absolute" else given
    base = save_tiny_model(tmp_path / given, "llama")
    model = load_causal_lm(given, dtype=torch.float32, lora={"r": 4})
    shake(model)
    save_pretrained(model, char_tokenizer(), "runs/first")
    assert written_base(tmp_path / "runs" / "first") == given
    second = load_causal_lm("runs/first", dtype=torch.float32)
    save_pretrained(second, char_tokenizer(), "runs/second")
    assert written_base(tmp_path / "runs" / "second") == given
    assert torch.equal(logits(PeftModel.from_pretrained(reload(base), tmp_path / "runs" / "second")), logits(model))


def test_a_folder_with_adapter_and_base_can_be_moved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here, there, elsewhere = tmp_path / "here", tmp_path / "there", tmp_path / "elsewhere"
    save_tiny_model(here / "models" / "base", "llama")
    monkeypatch.chdir(here)
    model = load_causal_lm("models/base", dtype=torch.float32, lora={"r": 4})
    shake(model)
    adapter = save_pretrained(model, char_tokenizer(), "runs/adapter")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (adapter / name).unlink()
    shutil.move(here, there)
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    moved = load_causal_lm(there / "runs" / "adapter", dtype=torch.float32)
    assert torch.equal(logits(moved), logits(model))
    assert load_tokenizer(there / "runs" / "adapter")("3+4").input_ids == char_tokenizer()("3+4").input_ids
    save_pretrained(moved, char_tokenizer(), "again")
    assert written_base(elsewhere / "again") == str(there / "models" / "base")


# Where answers end.

TURN_END = VOCAB_SIZE
ENDING = (
    "{% for m in messages %}{{ m['role'][0] + ':' + m['content'] + '<end>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'a:' }}{% endif %}"
)


def ending_tokenizer(eos: str = "<eos>") -> PreTrainedTokenizerFast:
    """Ends a turn with a token of its own, which may be the end-of-sequence token."""
    tokenizer = char_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<end>"]})
    tokenizer.eos_token = eos
    tokenizer.chat_template = ENDING
    return tokenizer


@pytest.mark.parametrize(
    ("eos", "template", "expected"),
    [
        ("<eos>", ENDING, [TURN_END, EOS_ID]),
        ("<end>", ENDING, [TURN_END]),
        ("<eos>", None, [EOS_ID]),
        ("<eos>", ENDING.replace("<end>", "|"), [EOS_ID]),
        ("<eos>", "{{ raise_exception('no') }}", [EOS_ID]),
    ],
)
def test_end_tokens_of_templates(eos: str, template: str | None, expected: list[int]) -> None:
    tokenizer = ending_tokenizer(eos)
    tokenizer.chat_template = template
    assert RowTokenizer(tokenizer).end_tokens == expected


@pytest.mark.parametrize(
    ("eos", "lora"), [("<eos>", None), ("<end>", {"r": 8, "modules_to_save": ["embed_tokens", "lm_head"]})]
)
def test_generation_ends_elsewhere_where_training_ended_answers(
    eos: str, lora: dict[str, Any] | None, tmp_path: Path
) -> None:
    base = save_tiny_model(tmp_path / "base", "llama", vocab_size=VOCAB_SIZE + 1)
    GenerationConfig(eos_token_id=60, do_sample=False).save_pretrained(base)
    ending_tokenizer(eos).save_pretrained(base)
    chat = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "abc"}]
    module = SFTModule(str(base), lora=lora, optimizer=lambda parameters: torch.optim.Adam(parameters, lr=1e-2))
    trainer(max_steps=40, callbacks=[ModelExport(str(tmp_path / "out"))]).fit(
        module, SFTDataModule(train=[{"messages": chat}])
    )
    ends = [TURN_END, EOS_ID, 60] if eos == "<eos>" else [TURN_END, 60]
    assert GenerationConfig.from_pretrained(tmp_path / "out").eos_token_id == ends

    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    prompt = tokenizer.apply_chat_template(chat[:1], add_generation_prompt=True, return_tensors="pt")["input_ids"]
    if lora is None:
        loaded: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
        answer = loaded.generate(prompt, max_new_tokens=20, pad_token_id=0)[0, prompt.shape[1] :]
        assert tokenizer.decode(answer) == "abc<end>"
    # The next stage's engine ends there as well, and its exports keep it.
    following = load_causal_lm(tmp_path / "out", dtype=torch.float32)
    engine = LocalEngine(following, None)
    [[completion]] = engine.generate([prompt[0].tolist()], 1, SamplingParams(max_new_tokens=20, temperature=0.0))
    assert tokenizer.decode(list(completion.token_ids)) == "abc<end>"
    again = save_pretrained(following, tokenizer, tmp_path / "again", merge_adapter=lora is not None)
    assert set(GenerationConfig.from_pretrained(again).eos_token_id) == set(ends)
