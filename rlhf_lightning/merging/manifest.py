"""The record of a merge: what it was made from, how, and the digest of every file of weights."""

from __future__ import annotations

import json
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from ..models.loading import locate
from ..models.safetensors_io import read_json
from .tensor_files import file_digest, weight_files

NAME = "merge_manifest.json"


def manifest_text(
    *,
    method: str,
    options: Mapping[str, Any],
    layers: Mapping[str, Mapping[str, Any]],
    precision: str,
    dtype: str,
    inputs: list[dict[str, Any]],
    outputs: Mapping[str, str],
    errors: Mapping[str, Mapping[str, float]] | None = None,
) -> str:
    """Returns the manifest as JSON.

    Args:
        method: name of the method.
        options: with everything that a preset decided.
        layers: options of tensors by patterns of their names.
        precision: that the merge computed in.
        dtype: of the result.
        inputs: of every model its ``role``, ``folder`` and ``files`` with their sha256.
        outputs: sha256 by name of every file of weights.
        errors: by name of a layer, the ``frobenius`` norm of what a lower rank leaves out, and the part of the norm of
            the whole (``relative``).
    """
    from .. import __version__

    content = {
        "written_by": f"rlhf_lightning {__version__}",
        "method": method,
        "options": options,
        "layers": layers,
        "precision": precision,
        "dtype": dtype,
        "versions": {name: version(name) for name in ("torch", "numpy", "safetensors")},
        "inputs": inputs,
        "outputs": dict(outputs),
        **({} if errors is None else {"errors": errors}),
    }
    return json.dumps(content, indent=2, default=list) + "\n"


def verify(folder: str | Path) -> list[str]:
    """Recomputes the digests in a merged folder's manifest, and lists what differs.

    Args:
        folder: written by ``merge``.

    Returns:
        One line for each file that is missing, was changed, or is not in the manifest; empty where nothing differs.
        Inputs that are no longer there are reported as missing.

    Raises:
        ValueError: the folder has no manifest.

    Example:
        >>> verify("merged")  # doctest: +SKIP
        []
    """
    place = Path(locate(folder, what="merged model"))
    if not (place / NAME).is_file():
        raise ValueError(f"{str(place)!r} has no {NAME}: give a folder that merge wrote")
    manifest = read_json(place / NAME)
    found = [_difference(place / name, digest, "output") for name, digest in manifest["outputs"].items()]
    for entry in manifest["inputs"]:
        found += [_difference(Path(file), digest, entry["role"]) for file, digest in entry["files"].items()]
    extra = [path for path in _present(place) if path.name not in manifest["outputs"]]
    return [line for line in found if line] + [f"{path}: not in the manifest" for path in extra]


def _difference(path: Path, digest: str, role: str) -> str | None:
    if not path.is_file():
        return f"{path}: missing ({role})"
    found = file_digest(path)
    return None if found == digest else f"{path}: sha256 is {found[:12]}..., the manifest has {digest[:12]}... ({role})"


def _present(place: Path) -> list[Path]:
    try:
        return weight_files(place)
    except ValueError:  # reported as missing above
        return []
