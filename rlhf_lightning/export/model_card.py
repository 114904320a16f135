"""Writes model cards: from what a model was made and how, for readers and in the fields that the hub reads."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from ..merging.adapter_files import CONFIG, is_adapter
from ..merging.manifest import NAME
from ..models.safetensors_io import read_json

# Ids on the hub; everything else is a file, a folder or a description.
HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")


@dataclass(frozen=True, kw_only=True)
class ModelCard:
    """Fields of a model card. Omitted ones are filled in from the model's folder, where that records them.

    Args:
        title: heading; the folder's name by default.
        description: text under the heading.
        license: an identifier of the hub, such as ``apache-2.0``; none by default: licences are never guessed.
        language: codes such as ``en``.
        data: data sets that it was trained on: ids of the hub, or descriptions.
        method: how it was made; by default that of a merge's manifest.
        parameters: of the method, by name; by default those of a merge's manifest, or of the adapter.
        metrics: held-out metrics by name; by default the monitored metric that ``ModelExport`` recorded.

    Example:
        >>> ModelCard(license="apache-2.0", data=["HuggingFaceH4/ultrafeedback_binarized"], method="DPO").license
        'apache-2.0'
    """

    title: str | None = None
    description: str = ""
    license: str | None = None
    language: Sequence[str] = ()
    data: Sequence[str] = ()
    method: str | None = None
    parameters: Mapping[str, Any] = field(default_factory=dict)
    metrics: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("language", "data"):
            if isinstance(getattr(self, name), str):
                raise ValueError(f"{name} is {getattr(self, name)!r}; it must be a list of texts")
        if self.license is not None and not re.fullmatch(r"[a-z0-9][a-z0-9.+-]*", self.license):
            raise ValueError(
                f"license is {self.license!r}; it must be an identifier of the hub, such as apache-2.0, mit or other"
            )

    def text(self, source: Path) -> str:
        """Returns the card of the model in a folder, as Markdown with the hub's fields before it."""
        facts = _recorded(source)
        bases, method = facts["bases"], self.method or facts["method"]
        title = self.title or source.name
        header: dict[str, Any] = {
            "license": self.license,
            "language": list(self.language),
            "base_model": [base for base in bases if is_hub_id(base)],
            "datasets": [name for name in self.data if is_hub_id(name)],
            "library_name": "peft" if facts["adapter"] else "transformers",
            "pipeline_tag": "text-generation",
            "tags": [
                "rlhf_lightning",
                *(["merge"] if facts["merged"] else []),
                *(["lora"] if facts["adapter"] else []),
            ],
        }
        header = {name: value for name, value in header.items() if value not in (None, [])}
        parts = [f"---\n{yaml.safe_dump(header, sort_keys=False, allow_unicode=True)}---", f"# {title}"]
        parts += [self.description] if self.description else []
        made = [("Method", method), ("Licence", self.license), ("Made from", ", ".join(map(_name, bases)))]
        made += [("Data", ", ".join(self.data))]
        parts.append(_table(("", ""), [(name, value) for name, value in made if value]))
        parts.append(_section("Parameters", ("parameter", "value"), self.parameters or facts["parameters"]))
        parts.append(_section("Metrics", ("metric", "value"), self.metrics or facts["metrics"]))
        parts.append(_section("Files it was merged from", ("file", "sha256"), facts["files"]))
        return "\n\n".join(part for part in parts if part) + "\n"


def is_hub_id(name: str) -> bool:
    """Tells whether a text names something on the hub, and no folder here.

    Example:
        >>> is_hub_id("Qwen/Qwen3-0.6B"), is_hub_id("/models/base"), is_hub_id("rows.jsonl")
        (True, False, False)
    """
    return HUB_ID.fullmatch(name) is not None and not Path(name).exists()


def _recorded(source: Path) -> dict[str, Any]:
    """Collects what the package has written next to or into a model's folder."""
    found: dict[str, Any] = {"bases": [], "method": None, "parameters": {}, "metrics": {}, "files": {}}
    found |= {"adapter": is_adapter(source), "merged": (source / NAME).is_file()}
    if found["adapter"]:
        config = read_json(source / CONFIG)
        base = config.get("base_model_name_or_path")
        found["bases"] = [str(base)] if base else []
        named = ("r", "lora_alpha", "target_modules", "use_rslora", "use_dora")
        found["parameters"] = {name: config[name] for name in named if config.get(name)}
    if found["merged"]:
        manifest = read_json(source / NAME)
        options = manifest["options"]
        preset = f" (convention: {options['preset']})" if options.get("preset") else ""
        found["method"] = f"merged by {manifest['method']}{preset}"
        found["parameters"] = {**options, "layers": manifest["layers"], "precision": manifest["precision"]}
        found["bases"] = [entry["folder"] for entry in manifest["inputs"]]
        found["files"] = {
            f"{entry['role']}: {_name(entry['folder'])}/{Path(file).name}": digest
            for entry in manifest["inputs"]
            for file, digest in entry["files"].items()
        }
    record = source.with_name(f"{source.name}.json")
    if record.is_file():
        content = json.loads(record.read_text(encoding="utf-8"))
        if isinstance(content, dict) and content.get("monitor") and content.get("value") is not None:
            found["metrics"] = {f"{content['monitor']} (step {content.get('step')})": content["value"]}
    return found


def _name(place: str) -> str:
    """Names a model without the folders above it, which are nobody else's business."""
    path = Path(place)
    if is_hub_id(place):
        return place
    return f"{path.parent.name}/{path.name}" if path.name == "model" else path.name


def _section(title: str, heads: tuple[str, str], values: Mapping[str, Any]) -> str:
    rows = [(name, _value(value)) for name, value in values.items() if value not in (None, {}, [], "")]
    return f"## {title}\n\n{_table(heads, rows)}" if rows else ""


def _value(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.6g}"
    return value if isinstance(value, str) else json.dumps(value, default=list)


def _table(heads: tuple[str, str], rows: Iterable[tuple[str, Any]]) -> str:
    lines = [" | ".join(_cell(cell) for cell in row) for row in rows]
    return "\n".join(f"| {line} |" for line in (" | ".join(heads), "---|---", *lines)) if lines else ""


def _cell(text: Any) -> str:
    return " ".join(str(text).split()).replace("|", "\\|")
