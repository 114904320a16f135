from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from peft.utils.integrations import dequantize_bnb_weight
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from rlhf_lightning.models import load_causal_lm, load_tokenizer, save_pretrained, saving
from rlhf_lightning.models.reference import AdapterReference
from rlhf_lightning.models.saving import export_kind
from rlhf_lightning.utils.files import MARKER, PARTIAL, REPLACED, hidden_sibling, mark

from ..helpers import ARCHITECTURES, PAD_ID, VOCAB_SIZE, char_tokenizer, save_tiny_model

Folder = Callable[..., Path]
LORA = {"r": 4, "lora_alpha": 8}


def logits(model: nn.Module) -> Tensor:
    ids = torch.randint(3, VOCAB_SIZE, (2, 12), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return model(ids).logits.float()


def shake(model: nn.Module, seed: int = 0) -> None:
    """Moves every trainable weight, as training would."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))


def reload(folder: Path, **options: Any) -> nn.Module:
    """Loads an export without this package."""
    return AutoModelForCausalLM.from_pretrained(folder, **{"dtype": torch.float32, **options})


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir() if path.name != MARKER}


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_untouched(model: nn.Module, before: dict[str, Tensor]) -> None:
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


# Whole models.


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_reloaded_logits_are_equal(
    arch: str, tiny_model_folder: Folder, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    model = load_causal_lm(str(tiny_model_folder(arch)), dtype=torch.float32, attn_implementation="rlhf_tree")
    shake(model)
    folder = save_pretrained(model, tokenizer, tmp_path / "out")
    assert folder == tmp_path / "out"
    assert torch.equal(logits(reload(folder, attn_implementation="eager")), logits(_eager(model)))
    assert not any("rlhf" in path.read_text() for path in folder.glob("*.json"))
    assert model.training
    assert {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"} <= names(folder)
    assert names(tmp_path) == {"out"}


def _eager(model: nn.Module) -> nn.Module:
    model.set_attn_implementation("eager")
    return model


def test_tokenizer_and_chat_template_go_along(tiny_model_folder: Folder, tmp_path: Path) -> None:
    tokenizer = char_tokenizer()
    folder = save_pretrained(
        load_causal_lm(tiny_model_folder("llama"), dtype=torch.float32), tokenizer, tmp_path / "out"
    )
    chat = [{"role": "user", "content": "3+4"}, {"role": "assistant", "content": "7"}]
    for loaded in (AutoTokenizer.from_pretrained(folder), load_tokenizer(folder)):
        assert loaded("3+4=7").input_ids == tokenizer("3+4=7").input_ids
        assert loaded.apply_chat_template(chat, tokenize=False) == tokenizer.apply_chat_template(chat, tokenize=False)
        assert loaded.pad_token_id == PAD_ID


def test_random_model_with_a_dtype(
    tiny_model_folder: Folder, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    model = load_causal_lm(tiny_model_folder("qwen3"), init="random", dtype=torch.bfloat16)
    folder = save_pretrained(model, tokenizer, tmp_path / "out")
    assert json.loads((folder / "config.json").read_text())["dtype"] == "bfloat16"
    assert {tensor.dtype for tensor in load_file(folder / "model.safetensors").values()} == {torch.bfloat16}
    assert torch.equal(logits(reload(folder, dtype=torch.bfloat16)), logits(model))


@pytest.mark.parametrize("arch", ["gpt2", "gemma2"])
def test_tied_weights_are_stored_once_and_stay_tied(
    arch: str, tiny_model_folder: Folder, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    model = load_causal_lm(tiny_model_folder(arch), dtype=torch.float32)
    shake(model)
    folder = save_pretrained(model, tokenizer, tmp_path / "out")
    stored = load_file(folder / "model.safetensors")
    assert sum(tensor.shape == (VOCAB_SIZE, 32) for tensor in stored.values()) == 1
    loaded = reload(folder)
    assert loaded.get_output_embeddings().weight is loaded.get_input_embeddings().weight
    assert torch.equal(loaded.get_input_embeddings().weight, model.get_input_embeddings().weight)


def test_invalid_generation_config_does_not_cost_the_weights(
    tiny_model_folder: Folder, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    model = load_causal_lm(tiny_model_folder("llama"), dtype=torch.float32)
    model.generation_config.do_sample = False
    model.generation_config.temperature = 0.5
    folder = save_pretrained(model, tokenizer, tmp_path / "out")
    assert torch.equal(logits(reload(folder)), logits(model))
    assert model.generation_config.temperature == 0.5


# Adapters.


@pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys:RuntimeWarning")  # peft's own, see loading
@pytest.mark.parametrize("arch", ["llama", "gpt2", "qwen3_moe"])
def test_adapter_alone_reloads_in_plain_peft(
    arch: str, tiny_model_folder: Folder, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    model = load_causal_lm(tiny_model_folder(arch), dtype=torch.float32, lora=LORA)
    shake(model)
    folder = save_pretrained(model, tokenizer, tmp_path / "out")
    assert not (folder / "config.json").exists()
    assert all("lora_" in name and ".default" not in name for name in load_file(folder / "adapter_model.safetensors"))
    plain = PeftModel.from_pretrained(reload(tiny_model_folder(arch)), folder)
    assert torch.equal(logits(plain), logits(model))
    again = load_causal_lm(folder, dtype=torch.float32)
    assert torch.equal(logits(again), logits(model))
    assert load_tokenizer(folder)("3+4").input_ids == tokenizer("3+4").input_ids


def test_second_generation_adapter_saves_what_was_trained_and_not_its_start(
    tiny_model_folder: Folder, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    first = load_causal_lm(tiny_model_folder("llama"), dtype=torch.float32, lora=LORA)
    shake(first)
    save_pretrained(first, tokenizer, tmp_path / "first")
    second = load_causal_lm(tmp_path / "first", dtype=torch.float32)
    shake(second, seed=1)
    with AdapterReference(second).scoring():  # even while the copy is the active one
        for merge in (False, True):
            save_pretrained(second, tokenizer, tmp_path / f"second-{merge}", merge_adapter=merge)
    expected = logits(second)
    assert not torch.allclose(expected, logits(first), atol=0.1)
    alone = PeftModel.from_pretrained(reload(tiny_model_folder("llama")), tmp_path / "second-False")
    assert torch.equal(logits(alone), expected)
    assert torch.allclose(logits(reload(tmp_path / "second-True")), expected, atol=1e-5)


MERGED = [
    ("llama", {}),
    ("gpt2", {}),
    ("gemma2", {}),
    ("llama", {"use_dora": True}),
    ("llama", {"use_rslora": True, "lora_dropout": 0.5}),
    ("qwen2", {"bias": "all"}),
    ("gpt_neox", {"lora_bias": True}),
    ("llama", {"target_modules": ["q_proj", "embed_tokens"], "modules_to_save": ["lm_head"]}),
    ("gemma2", {"target_modules": ["q_proj", "lm_head"]}),
    ("qwen3_moe", {"target_modules": ["q_proj"], "target_parameters": ["mlp.experts.gate_up_proj"]}),
]


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning")
@pytest.mark.parametrize(
    ("arch", "extra"), MERGED, ids=lambda value: "-".join(value) if isinstance(value, dict) else value
)
def test_merged_model_computes_what_the_adapter_did(
    arch: str, extra: dict, tiny_model_folder: Folder, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    model = load_causal_lm(tiny_model_folder(arch), dtype=torch.float32, lora={**LORA, **extra})
    shake(model)
    before = weights(model)
    folder = save_pretrained(model, tokenizer, tmp_path / "out", merge_adapter=True)
    assert_untouched(model, before)
    expected = logits(model.eval())
    merged = reload(folder)
    assert type(merged) is type(model.get_base_model())
    assert torch.allclose(logits(merged), expected, rtol=1e-4, atol=1e-4)
    assert float((expected - logits(reload(tiny_model_folder(arch)))).norm() / expected.norm()) > 0.05


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning")
def test_merged_tied_weights_part_only_where_an_adapter_parted_them(
    tiny_model_folder: Folder, tokenizer: PreTrainedTokenizerFast, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = load_causal_lm(tiny_model_folder("gemma2"), dtype=torch.float32, lora=LORA)
    shake(kept)
    # Weights that come from a GPU or from shards are copies, which no longer share memory.
    monkeypatch.setattr(saving, "_whole", lambda tensor: tensor.detach().clone())
    folder = save_pretrained(kept, tokenizer, tmp_path / "kept", merge_adapter=True)
    assert json.loads((folder / "config.json").read_text())["tie_word_embeddings"] is True
    assert "lm_head.weight" not in load_file(folder / "model.safetensors")

    parted = load_causal_lm(
        tiny_model_folder("gemma2"), dtype=torch.float32, lora={**LORA, "target_modules": ["lm_head"]}
    )
    shake(parted)
    folder = save_pretrained(parted, tokenizer, tmp_path / "parted", merge_adapter=True)
    assert json.loads((folder / "config.json").read_text())["tie_word_embeddings"] is False
    assert {"lm_head.weight", "model.embed_tokens.weight"} <= load_file(folder / "model.safetensors").keys()
    assert parted.config.tie_word_embeddings is True, "the model in training is as it was"


def test_merge_is_by_hand(tiny_model_folder: Folder, tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    """``W + (alpha / r) B A``, from the adapter's own numbers."""
    model = load_causal_lm(tiny_model_folder("llama"), dtype=torch.float32, lora={"r": 4, "lora_alpha": 12})
    shake(model)
    folder = save_pretrained(model, tokenizer, tmp_path / "out", merge_adapter=True)
    layer = model.get_base_model().model.layers[1].mlp.down_proj
    expected = layer.base_layer.weight + 12 / 4 * layer.lora_B["default"].weight @ layer.lora_A["default"].weight
    stored = load_file(folder / "model.safetensors")
    assert torch.allclose(stored["model.layers.1.mlp.down_proj.weight"], expected, atol=1e-6)
    assert torch.equal(stored["lm_head.weight"], model.get_base_model().lm_head.weight)
    assert stored.keys() == load_file(tiny_model_folder("llama") / "model.safetensors").keys()


@pytest.mark.parametrize("arch", ["llama", "gpt2"])
@pytest.mark.parametrize("quantization", ["nf4", "int8"])
@pytest.mark.parametrize("targets", ["all-linear", None])
def test_merging_into_quantised_weights(
    arch: str, quantization: str, targets: str | None, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    """Quantised layers come out as plain ones, those without an adapter as well."""
    source = save_tiny_model(tmp_path / "source", arch, hidden_size=64)
    lora = {**LORA, "target_modules": targets or (["q_proj"] if arch == "llama" else ["c_attn"])}
    model = load_causal_lm(source, dtype=torch.float32, quantization=quantization, lora=lora)
    shake(model)
    expected, before = logits(model), weights(model)
    folder = save_pretrained(model, tokenizer, tmp_path / "out", merge_adapter=True)
    assert_untouched(model, before)
    config = json.loads((folder / "config.json").read_text())
    assert "quantization_config" not in config
    assert config["dtype"] == "float32"
    merged = reload(folder)
    assert float((logits(merged) - expected).norm() / expected.norm()) < 1e-5
    if arch == "llama":
        base = model.get_base_model().model.layers[0].mlp.up_proj
        base = base.base_layer if targets else base
        plain = dequantize_bnb_weight(base.weight, state=getattr(base, "state", None))
        if targets is None:
            assert torch.equal(merged.model.layers[0].mlp.up_proj.weight, plain)


def test_adapter_on_quantised_weights_alone(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    source = save_tiny_model(tmp_path / "source", "llama", hidden_size=64)
    model = load_causal_lm(source, dtype=torch.float32, quantization="nf4", lora=LORA)
    shake(model)
    folder = save_pretrained(model, tokenizer, tmp_path / "out")
    again = load_causal_lm(folder, dtype=torch.float32, quantization="nf4")
    assert torch.equal(logits(again), logits(model))


@pytest.mark.filterwarnings("ignore:`lora_bias=True` was passed")
@pytest.mark.parametrize("extra", [{"use_dora": True}, {"lora_bias": True}])
def test_what_cannot_be_merged_into_quantised_weights(
    extra: dict, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    source = save_tiny_model(tmp_path / "source", "llama", hidden_size=64)
    model = load_causal_lm(source, dtype=torch.float32, quantization="nf4", lora={**LORA, **extra})
    with pytest.raises(
        ValueError, match=r"DoRA adapter or an adapter bias on quantised weights: export with merge_adapter"
    ):
        save_pretrained(model, tokenizer, tmp_path / "out", merge_adapter=True)
    assert names(tmp_path) == {"source"}


@pytest.mark.filterwarnings("ignore:`lora_bias=True` was passed")
def test_what_peft_cannot_merge_is_one_line(
    tiny_model_folder: Folder, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    model = load_causal_lm(tiny_model_folder("llama"), dtype=torch.float32, lora={**LORA, "lora_bias": True})
    with pytest.raises(
        ValueError, match=r"^model\.layers\.0\.self_attn\.q_proj cannot be merged \(.*\): export with .*$"
    ):
        save_pretrained(model, tokenizer, tmp_path / "out", merge_adapter=True)


def test_quantised_model_without_adapter_has_nothing_to_export(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    source = save_tiny_model(tmp_path / "source", "llama", hidden_size=64)
    model = load_causal_lm(source, dtype=torch.float32, quantization="nf4", trainable=False)
    with pytest.raises(ValueError, match="quantised and has no adapter"):
        save_pretrained(model, tokenizer, tmp_path / "out")


# Several processes.


def _export_sharded(rank: int, store: str, source: str, out: str) -> None:
    """One of two processes that hold halves of every weight."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    mesh = init_device_mesh("cpu", (2,))
    for name, lora in (("full", None), ("lora", LORA)):
        torch.manual_seed(0)  # adapters are drawn: alike on both ranks
        model = load_causal_lm(source, dtype=torch.float32, lora=lora)
        shake(model)
        base = model.get_base_model() if lora else model
        for layer in base.model.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
        assert any(isinstance(parameter, DTensor) for parameter in model.parameters())
        save_pretrained(model, char_tokenizer(), f"{out}/{name}")
        if lora:
            save_pretrained(model, char_tokenizer(), f"{out}/merged", merge_adapter=True)
        assert Path(out, name, "tokenizer.json").exists(), "no rank continues before the export is there"
    torch.distributed.destroy_process_group()


@pytest.mark.slow
@pytest.mark.distributed
def test_sharded_weights_are_gathered_and_written_once(tmp_path: Path) -> None:
    source, out = save_tiny_model(tmp_path / "source", "llama"), tmp_path / "out"
    torch.multiprocessing.spawn(_export_sharded, (str(tmp_path / "store"), str(source), str(out)), nprocs=2)
    full = load_causal_lm(source, dtype=torch.float32)
    shake(full)
    assert torch.equal(logits(reload(out / "full")), logits(full))
    torch.manual_seed(0)
    adapted = load_causal_lm(source, dtype=torch.float32, lora=LORA)
    shake(adapted)
    assert torch.equal(logits(PeftModel.from_pretrained(reload(source), out / "lora")), logits(adapted))
    assert torch.allclose(logits(reload(out / "merged")), logits(adapted), atol=1e-4)
    assert names(out) == {"full", "lora", "merged"}


# All or nothing.


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


class _Killed(BaseException):
    """An exception that no ordinary handler catches."""


@pytest.fixture
def exported(tiny_model_folder: Folder, tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> tuple[nn.Module, Path]:
    """A model, and an export of how it was before its last steps."""
    model = load_causal_lm(tiny_model_folder("llama"), dtype=torch.float32)
    folder = save_pretrained(model, tokenizer, tmp_path / "place" / "out")
    shake(model)
    return model, folder


def test_new_export_replaces_the_old_one_wholly(
    exported: tuple[nn.Module, Path], tokenizer: PreTrainedTokenizerFast
) -> None:
    model, folder = exported
    (folder / "leftover.txt").write_text("of the old export")
    mark(folder, export_kind(model))
    save_pretrained(model, tokenizer, folder)
    assert torch.equal(logits(reload(folder)), logits(model))
    assert not (folder / "leftover.txt").exists()
    assert names(folder.parent) == {"out"}


@pytest.mark.parametrize("failure", [OSError("No space left on device"), _Killed()], ids=["disk full", "killed"])
@pytest.mark.parametrize(
    "where",
    ["safetensors", "tokenizer", "fsync", "first rename", "second rename"],
)
def test_failure_in_the_middle_leaves_the_old_export(
    where: str, failure: BaseException, exported: tuple[nn.Module, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, folder = exported
    before = content(folder)
    tokenizer = char_tokenizer()

    def fail(*args: object, **kwargs: object) -> None:
        raise failure

    renames: list[Path] = []
    rename = Path.rename

    def failing_rename(source: Path, target: Path) -> Path:
        renames.append(source)
        if len(renames) == (1 if where == "first rename" else 2):
            raise failure
        return rename(source, target)

    with monkeypatch.context() as patch:
        if where == "safetensors":
            patch.setattr("transformers.modeling_utils.safe_save_file", fail)
        elif where == "tokenizer":
            patch.setattr(tokenizer, "save_pretrained", fail)
        elif where == "fsync":
            patch.setattr(os, "fsync", fail)
        else:
            patch.setattr(Path, "rename", failing_rename)
        expected = _Killed if isinstance(failure, _Killed) else ValueError
        with pytest.raises(expected, match=r"^cannot write the model to .* \(No space left on device\): free|^$"):
            save_pretrained(model, tokenizer, folder)

    assert content(folder) == before
    assert names(folder.parent) == {"out"}
    save_pretrained(model, char_tokenizer(), folder)
    assert torch.equal(logits(reload(folder)), logits(model))
    assert names(folder.parent) == {"out"}


def test_next_call_puts_back_what_a_kill_left_between_two_renames(
    exported: tuple[nn.Module, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, folder = exported
    before = content(folder)
    folder.rename(hidden_sibling(folder, REPLACED))
    shutil.copytree(hidden_sibling(folder, REPLACED), hidden_sibling(folder, PARTIAL))
    tokenizer = char_tokenizer()
    monkeypatch.setattr(tokenizer, "save_pretrained", lambda place: (_ for _ in ()).throw(OSError("full")))
    with pytest.raises(ValueError, match=r"cannot write the model to .* \(full\): free disk space"):
        save_pretrained(model, tokenizer, folder)
    assert content(folder) == before
    assert names(folder.parent) == {"out"}


def test_nothing_is_visible_before_it_is_complete(
    exported: tuple[nn.Module, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever looks while the new export is written finds the old one."""
    model, folder = exported
    before, seen = content(folder), []
    tokenizer = char_tokenizer()
    save = tokenizer.save_pretrained

    def look_and_save(place: Path) -> None:
        save(place)
        seen.append((content(folder) == before, (place / "model.safetensors").exists(), place.name))

    monkeypatch.setattr(tokenizer, "save_pretrained", look_and_save)
    save_pretrained(model, tokenizer, folder)
    assert seen == [(True, True, ".out.rlhf_lightning.partial")]


def test_places_that_are_not_ours_to_replace(
    tiny_model_folder: Folder, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    model = load_causal_lm(tiny_model_folder("llama"), dtype=torch.float32)
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ValueError, match=r"^'.*/file' is a file: pass a folder to write to$"):
        save_pretrained(model, tokenizer, tmp_path / "file")
    with pytest.raises(ValueError, match=r"exists and was not written by this package: nothing there is replaced"):
        save_pretrained(model, tokenizer, tmp_path)
    assert (tmp_path / "file").read_text() == "mine"
    holder = tmp_path / "holder"
    save_pretrained(model, tokenizer, holder)
    (holder / "checkpoints").mkdir()
    with pytest.raises(ValueError, match=r"holds 'checkpoints', which this package did not write"):
        save_pretrained(model, tokenizer, holder)
    (tmp_path / "empty").mkdir()
    assert (save_pretrained(model, tokenizer, tmp_path / "empty") / "config.json").exists()


def test_a_link_to_a_folder_stays_a_link(exported: tuple[nn.Module, Path], tokenizer: PreTrainedTokenizerFast) -> None:
    model, folder = exported
    link = folder.parent / "latest"
    link.symlink_to(folder)
    assert save_pretrained(model, tokenizer, link) == folder
    assert link.is_symlink()
    assert torch.equal(logits(reload(link)), logits(model))


def test_an_adapters_config_does_not_depend_on_the_process(
    tiny_model_folder: Folder, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    """peft keeps names in sets, whose order changes with the hash seed."""
    model = load_causal_lm(str(tiny_model_folder("llama")), dtype=torch.float32, lora=LORA)
    assert isinstance(model, PeftModel)
    config = model.peft_config["default"]
    names = sorted(config.target_modules)
    assert len(names) == 14  # seven in each of two layers
    # A set of its own order, whatever the seed.
    config.exclude_modules = reversed_set(["embed_tokens", "lm_head", "norm"])
    config.target_modules = reversed_set(names)
    folder = save_pretrained(model, tokenizer, tmp_path / "out")
    written = json.loads((folder / "adapter_config.json").read_text())
    assert written["target_modules"] == names
    assert written["exclude_modules"] == ["embed_tokens", "lm_head", "norm"]
    assert isinstance(config.target_modules, set), "the model itself is not touched"
    again = load_causal_lm(str(folder), dtype=torch.float32)
    assert torch.equal(logits(again), logits(model))


def reversed_set(names: list[str]) -> set[str]:
    """A set that is read from the last name to the first."""

    class Reversed(set[str]):
        def __iter__(self) -> Iterator[str]:
            return iter(sorted(names, reverse=True))

    return Reversed(names)
