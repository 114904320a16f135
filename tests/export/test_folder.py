"""Exported folders, against the models that they were made from; their cards, as the hub's own reader reads them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard as HubCard
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from rlhf_lightning.export import ModelCard, export_folder
from rlhf_lightning.export import folder as exporting
from rlhf_lightning.merging import merge, verify
from rlhf_lightning.models import load_causal_lm, load_tokenizer

from ..helpers import save_tiny_model

PROMPTS = ["2+2=", "hello"]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    base = Path(save_tiny_model(root / "base", "llama"))
    model = load_causal_lm(base, dtype=torch.float32)
    peft: Any = get_peft_model(model, LoraConfig(r=4, lora_alpha=16, target_modules=["q_proj", "up_proj"]))
    torch.manual_seed(3)
    with torch.no_grad():
        for weight in peft.parameters():
            if weight.requires_grad:
                weight += 0.1 * torch.randn(weight.shape)
    peft.save_pretrained(root / "adapter")
    load_tokenizer(base).save_pretrained(root / "adapter")
    other = load_causal_lm(base, dtype=torch.float32)
    with torch.no_grad():
        for weight in other.parameters():
            weight += 0.02 * torch.randn(weight.shape)
    other.save_pretrained(root / "tuned" / "model")
    load_tokenizer(base).save_pretrained(root / "tuned" / "model")
    return {"base": base, "adapter": root / "adapter", "tuned": root / "tuned" / "model"}


def logits(folder: Path) -> torch.Tensor:
    model = load_causal_lm(folder, dtype=torch.float32, trainable=False).eval()
    with torch.no_grad():
        return model(input_ids=torch.arange(3, 12)[None]).logits


def test_a_whole_model_in_shards(models: dict[str, Path], tmp_path: Path) -> None:
    found = export_folder(models["tuned"], tmp_path / "out", max_shard_size="20KB", check_prompts=PROMPTS)
    assert found.path == tmp_path / "out"
    assert found.url is None
    assert found.logit_error == 0.0
    source = load_file(models["tuned"] / "model.safetensors")
    files = sorted(found.path.glob("*.safetensors"))
    assert len(files) > 2
    written = {name: weight for file in files for name, weight in load_file(file).items()}
    assert written.keys() == source.keys()
    assert all(torch.equal(written[name], weight) for name, weight in source.items())
    assert AutoTokenizer.from_pretrained(found.path)("2+2=")["input_ids"]
    assert verify(found.path) == []
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]


def test_types_round_once(models: dict[str, Path], tmp_path: Path) -> None:
    found = export_folder(models["tuned"], tmp_path / "out", dtype="bfloat16", check_prompts=PROMPTS)
    assert found.logit_error == 0.0
    source = load_file(models["tuned"] / "model.safetensors")
    written = load_file(found.path / "model.safetensors")
    assert all(torch.equal(written[name], weight.bfloat16()) for name, weight in source.items())
    assert AutoModelForCausalLM.from_pretrained(found.path).dtype == torch.bfloat16


def test_adapters_are_merged_or_written_alone(models: dict[str, Path], tmp_path: Path) -> None:
    expected = logits(models["adapter"])
    assert not torch.allclose(expected, logits(models["base"]), atol=1e-3)
    merged = export_folder(models["adapter"], tmp_path / "merged", check_prompts=PROMPTS)
    assert merged.logit_error < 1e-5
    torch.testing.assert_close(logits(merged.path), expected, rtol=0, atol=1e-5)
    assert not (merged.path / "adapter_config.json").exists()
    alone = export_folder(models["adapter"], tmp_path / "alone", merge_adapter=False, check_prompts=PROMPTS)
    assert not (alone.path / "model.safetensors").exists()
    assert torch.equal(logits(alone.path), expected)
    with pytest.raises(ValueError, match="an adapter alone keeps its own type"):
        export_folder(models["adapter"], tmp_path / "x", merge_adapter=False, dtype="float16")


@pytest.mark.parametrize("what", ["weights", "rotary", "tokenizer", "template"])
def test_a_sabotaged_folder_is_caught_and_the_earlier_export_stays(
    what: str, models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    export_folder(models["tuned"], tmp_path / "out", check_prompts=PROMPTS)
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    loaded = exporting._loaded

    def sabotaged(place: Path) -> Any:
        if what == "weights":  # two heads change places
            state = load_file(place / "model.safetensors")
            name = "model.layers.0.self_attn.q_proj.weight"
            state[name] = torch.cat([part for part in state[name].chunk(2)][::-1])
            save_file(state, place / "model.safetensors", metadata={"format": "pt"})
        if what == "rotary":
            config = json.loads((place / "config.json").read_text())
            config["rope_parameters"]["rope_theta"] *= 4
            (place / "config.json").write_text(json.dumps(config))
        if what == "template":
            (place / "chat_template.jinja").write_text("{{ messages }}")
        model, tokenizer = loaded(place)
        if what == "tokenizer":
            tokenizer.eos_token = tokenizer.convert_ids_to_tokens(7)
        return model, tokenizer

    monkeypatch.setattr(exporting, "_loaded", sabotaged)
    with pytest.raises(ValueError, match="the export is not the model, and was removed"):
        export_folder(models["tuned"], tmp_path / "out", check_prompts=PROMPTS)
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_refusals(models: dict[str, Path], tmp_path: Path) -> None:
    for options, message in (
        ({"dtype": "int8"}, "dtype is 'int8'"),
        ({"max_shard_size": "many"}, "max_shard_size is 'many'"),
        ({"check_prompts": []}, "check_prompts is"),
        ({"push_to_hub": "a/b/c"}, "push_to_hub is 'a/b/c'; it must be an id such as me/my-model"),
        ({"output": models["tuned"]}, "is the model itself"),
    ):
        with pytest.raises(ValueError, match=message) as caught:
            export_folder(models["tuned"], **{"output": tmp_path / "out", **options})
        assert "\n" not in str(caught.value)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    with pytest.raises(ValueError, match="not written by this package"):
        export_folder(models["tuned"], tmp_path / "mine", check_prompts=PROMPTS)
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


# The card.


def test_the_hub_reads_the_card(models: dict[str, Path], tmp_path: Path) -> None:
    card = ModelCard(
        title="Small sums",
        description="Adds.",
        license="apache-2.0",
        language=["en"],
        data=["HuggingFaceH4/ultrafeedback_binarized", "rows of mine"],
        method="DPO",
        parameters={"beta": 0.1, "loss | type": "sigmoid"},
        metrics={"val/accuracy": 0.8125},
    )
    found = export_folder(models["tuned"], tmp_path / "out", card=card, check_prompts=PROMPTS)
    read = HubCard.load(found.path / "README.md")
    assert read.data.license == "apache-2.0"
    assert read.data.language == ["en"]
    assert read.data.datasets == ["HuggingFaceH4/ultrafeedback_binarized"]
    assert read.data.library_name == "transformers"
    assert read.data.pipeline_tag == "text-generation"
    assert read.data.tags == ["rlhf_lightning"]
    for text in (
        "# Small sums",
        "Adds.",
        "rows of mine",
        "| beta | 0.1 |",
        "loss \\| type",
        "| val/accuracy | 0.8125 |",
    ):
        assert text in read.text
    assert str(models["tuned"].parent.parent) not in read.content


def test_the_card_says_what_the_folders_record(models: dict[str, Path], tmp_path: Path) -> None:
    merged = merge(
        "ties", base=models["base"], models=[models["tuned"]], output=tmp_path / "merged", density=0.3, preset="peft"
    )
    merged.with_name("merged.json").write_text(json.dumps({"step": 40, "monitor": "val/loss", "value": 1.25}))
    read = HubCard.load(export_folder(merged, tmp_path / "out", check_prompts=PROMPTS).path / "README.md")
    assert read.data.tags == ["rlhf_lightning", "merge"]
    assert read.data.license is None
    manifest = json.loads((merged / "merge_manifest.json").read_text())
    for text in (
        "merged by ties (convention: peft)",
        "| density | 0.3 |",
        "| val/loss (step 40) | 1.25 |",
        "tuned/model, base",
        *(digest for entry in manifest["inputs"] for digest in entry["files"].values()),
    ):
        assert text in read.text
    assert str(tmp_path) not in read.content
    adapter = export_folder(models["adapter"], tmp_path / "alone", merge_adapter=False, check_prompts=PROMPTS)
    read = HubCard.load(adapter.path / "README.md")
    assert read.data.library_name == "peft"
    assert read.data.tags == ["rlhf_lightning", "lora"]
    assert "| r | 4 |" in read.text


@pytest.mark.parametrize(("field", "value"), [("license", "Apache 2.0\nx"), ("data", "rows"), ("language", "en")])
def test_fields_of_the_card_are_checked(field: str, value: str) -> None:
    with pytest.raises(ValueError, match=f"{field} is "):
        ModelCard(**{field: value})


# The hub.


class Hub:
    """Stands in for the hub; records what it is asked."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, dict[str, Any]]] = []
        self.error: OSError | None = None

    def create_repo(self, repository: str, **options: Any) -> str:
        self.asked.append((repository, options))
        return f"https://hub.test/{repository}"

    def upload_folder(self, **options: Any) -> None:
        if self.error is not None:
            raise self.error
        self.asked.append(("upload", options))


def test_nothing_is_uploaded_unless_asked(
    models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub = Hub()
    monkeypatch.setattr(exporting, "HfApi", lambda: hub)
    export_folder(models["tuned"], tmp_path / "out", check_prompts=PROMPTS)
    assert hub.asked == []
    found = export_folder(models["tuned"], tmp_path / "out", check_prompts=PROMPTS, push_to_hub="me/sums")
    assert found.url == "https://hub.test/me/sums"
    (repository, created), (_, uploaded) = hub.asked
    assert (repository, created) == ("me/sums", {"private": True, "exist_ok": True})
    assert uploaded["folder_path"] == found.path
    assert "merge_manifest.json" in uploaded["ignore_patterns"]

    hub.error = OSError("403 Forbidden\nmore")
    with pytest.raises(ValueError, match=r"is complete in .*'me/sums' \(403 Forbidden\): log in") as caught:
        export_folder(models["tuned"], tmp_path / "out", check_prompts=PROMPTS, push_to_hub="me/sums")
    assert "\n" not in str(caught.value)
    assert (tmp_path / "out" / "model.safetensors").is_file()
