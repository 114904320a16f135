"""Scalar heads that reward models put on a decoder, and the files in which they are stored with it.

A folder of such a model is a plain Hugging Face folder of the decoder (or of its adapter) with two more files:
``reward_head.json``, the options of the head, and ``reward_head.safetensors``, its weights under the names of
``RewardHead``. A single linear head read at the last token is written in transformers' own form instead, as an
``AutoModelForSequenceClassification`` whose ``score.weight`` it is.

Legend: S positions read, D hidden size, M members, K outputs (attributes) of a member.
"""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable, Mapping, Sequence
from hashlib import blake2b
from pathlib import Path
from typing import Any, Final, Literal, get_args

import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import AutoModelForSequenceClassification, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils.hub import cached_file

from ..utils.transfer import count_index
from .backbone import base_model
from .safetensors_io import read_weights

HeadKind = Literal["linear", "mlp"]

HEAD_KINDS: Final[tuple[HeadKind, ...]] = get_args(HeadKind)
HEAD_OPTIONS = "reward_head.json"
HEAD_WEIGHTS = "reward_head.safetensors"
CLASSIFIER_WEIGHT = "score.weight"


class RewardHead(nn.Module):
    """Scores hidden states: K outputs of each of M members that share a decoder and differ in their first weights.

    ``linear`` is W h, ``mlp`` W gelu(V h + b); weights begin as normal draws of variance 1 / (D + 1), and ``b`` as 0.
    Products are computed in at least fp32, also under autocast, since small differences are compared.

    Args:
        hidden_size: D.
        kind: ``linear`` or ``mlp``.
        num_outputs: K, at least 1.
        num_models: M, at least 1.
        seed: seed of the weights, together with the number of the member.
        dtype: of the weights.

    Raises:
        ValueError: a kind or number out of range.

    Example:
        >>> head = RewardHead(8, kind="mlp", num_outputs=2, num_models=3)
        >>> head(torch.zeros(5, 8)).shape
        torch.Size([5, 3, 2])
    """

    inner: nn.Parameter
    bias: nn.Parameter

    def __init__(
        self,
        hidden_size: int,
        *,
        kind: HeadKind = "linear",
        num_outputs: int = 1,
        num_models: int = 1,
        seed: int = 0,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        if kind not in HEAD_KINDS:
            raise ValueError(f"head is {kind!r}; it must be one of {', '.join(HEAD_KINDS)}")
        for name, value in (("num_outputs", num_outputs), ("num_models", num_models)):
            if value < 1:
                raise ValueError(f"{name} is {value}; it must be at least 1")
        self.kind = kind

        def drawn(*shape: int) -> nn.Parameter:
            members = []
            for member in range(num_models):
                digest = blake2b(f"{seed}/{member}/{shape}".encode(), digest_size=8).digest()
                generator = torch.Generator("cpu").manual_seed(int.from_bytes(digest, "big") >> 1)
                # In a fixed precision, since another one would draw other numbers.
                draws = torch.randn(shape, generator=generator, device="cpu", dtype=torch.float64)
                members.append(draws / math.sqrt(hidden_size + 1))
            return nn.Parameter(torch.stack(members).to(device=torch.get_default_device(), dtype=dtype))

        if kind == "mlp":
            self.inner = drawn(hidden_size, hidden_size)
            self.bias = nn.Parameter(torch.zeros(num_models, hidden_size, dtype=dtype))
        self.weight = drawn(num_outputs, hidden_size)

    def forward(self, hidden_SD: Tensor, member: int | None = None) -> Tensor:
        """Scores states, ``(S, D) -> (S, M, K)``, in at least fp32; with one ``member`` only, ``(S, 1, K)``."""
        dtype = torch.promote_types(self.weight.dtype, torch.float32)
        own = slice(None) if member is None else slice(member, member + 1)
        with torch.autocast(hidden_SD.device.type, enabled=False):
            weight = self.weight[own].to(dtype)
            hidden_MSD = hidden_SD.to(dtype).expand(len(weight), *hidden_SD.shape)
            if self.kind == "mlp":
                bias, inner = self.bias[own].to(dtype), self.inner[own].to(dtype)
                hidden_MSD = F.gelu(torch.baddbmm(bias.unsqueeze(1), hidden_MSD, inner.mT))
            return torch.bmm(hidden_MSD, weight.mT).transpose(0, 1)


def mean_pooled(values_ND: Tensor, sequence_index_N: Tensor, num_sequences: int) -> Tensor:
    """Averages the states of each sequence: ``(N, D) -> (S, D)``, in at least fp32.

    Args:
        values_ND: states.
        sequence_index_N: the sequence of each.
        num_sequences: S; each needs at least one state.

    Example:
        >>> mean_pooled(torch.tensor([[1.0], [3.0], [5.0]]), torch.tensor([0, 0, 1]), 2).flatten().tolist()
        [2.0, 5.0]
    """
    values = values_ND.to(torch.promote_types(values_ND.dtype, torch.float32))
    total_SD = values.new_zeros(num_sequences, values.shape[1]).index_add(0, sequence_index_N, values)
    return total_SD / count_index(sequence_index_N, num_sequences)[:, None]


def freeze_output_projection(model: nn.Module) -> None:
    """Freezes an output projection that a scalar head leaves unused, unless it is tied to the embedding."""
    base: Any = base_model(model)
    projection, embeddings = base.get_output_embeddings(), base.get_input_embeddings()
    if projection is None or projection.weight is embeddings.weight:
        return
    projection.requires_grad_(False)


# Folders.


def head_files(head: RewardHead | None, options: Mapping[str, Any]) -> Callable[[Path], None]:
    """Gathers a head, on every rank; returns a function that writes it into a model's folder.

    Args:
        head: the head; ``None`` writes its options only.
        options: constructor arguments of the module that reads it; plain values.
    """
    state = {} if head is None else {name: whole(tensor).contiguous() for name, tensor in head.state_dict().items()}

    def write(place: Path) -> None:
        (place / HEAD_OPTIONS).write_text(json.dumps(dict(options), indent=2) + "\n", encoding="utf-8")
        if state:
            save_file(state, place / HEAD_WEIGHTS, metadata={"format": "pt"})

    return write


def read_head_options(folder: str | Path) -> dict[str, Any]:
    """Reads the head's options stored with a model; empty where there is no such file.

    Raises:
        ValueError: the file is not a JSON object.
    """
    path = stored_file(folder, HEAD_OPTIONS)
    if path is None:
        return {}
    try:
        options = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"cannot read {str(path)!r} ({error}): export the model again") from error
    if not isinstance(options, dict):
        raise ValueError(f"{str(path)!r} holds a {type(options).__name__}, not a JSON object: export the model again")
    return options


def read_head_state(folder: str | Path) -> dict[str, Tensor]:
    """Reads the weights of a head stored with a model, or a classifier's ``score.weight``; otherwise an empty dict."""
    path = stored_file(folder, HEAD_WEIGHTS)
    if path is not None:
        return read_weights(path)
    name: str | None = "model.safetensors"
    index = stored_file(folder, "model.safetensors.index.json")
    if index is not None:
        name = json.loads(index.read_text(encoding="utf-8"))["weight_map"].get(CLASSIFIER_WEIGHT)
    path = None if name is None else stored_file(folder, name)
    if path is None:
        return {}
    with safe_open(path, framework="pt") as file:
        if CLASSIFIER_WEIGHT in file.keys():  # noqa: SIM118 (the file is not a mapping)
            return {"weight": file.get_tensor(CLASSIFIER_WEIGHT)[None]}
    return {}


def stored_file(source: str | Path, name: str) -> Path | None:
    """Finds a file of a local folder or a hub id; None where it is missing or the hub cannot be reached."""
    folder = Path(source).expanduser()
    if folder.is_dir():
        return folder / name if (folder / name).is_file() else None
    found = cached_file(
        str(source),
        name,
        _raise_exceptions_for_gated_repo=False,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
    )
    return None if found is None else Path(found)


def load_head(head: RewardHead, folder: str | Path) -> bool:
    """Loads stored weights into a head.

    Returns:
        Whether there were any.

    Raises:
        ValueError: the stored head is of another kind or shape.
    """
    state = read_head_state(folder)
    if not state:
        return False
    shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
    wanted = {name: tuple(tensor.shape) for name, tensor in head.state_dict().items()}
    if shapes != wanted:
        raise ValueError(
            f"the head stored in {str(folder)!r} has the weights {shapes}, the options ask for {wanted}: leave head, "
            "num_attributes and num_models as they were trained (from_pretrained reads them)"
        )
    head.load_state_dict(state)
    return True


def whole(tensor: Tensor) -> Tensor:
    """Returns a tensor on the CPU, unsharded and detached."""
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().cpu()


# Sequence classifiers of transformers.


class NoClassifier(ValueError):
    """Raised for an architecture without a sequence classifier that fits a linear head."""


def classifier_from(
    weight_KD: Tensor, names: Sequence[str], pad_token_id: int
) -> Callable[[PreTrainedModel, dict[str, Tensor]], tuple[PreTrainedModel, dict[str, Tensor]]]:
    """Makes a function that turns a causal language model and its weights into a sequence classifier with K outputs.

    Args:
        weight_KD: the linear head.
        names: K labels.
        pad_token_id: the classifier's padding token. It reads the last token that is not padding, so this must not be
            the token that ends a completion.

    Returns:
        A function of a model and its state dict that returns the classifier, without memory, and its state dict.
    """

    def convert(base: PreTrainedModel, state: dict[str, Tensor]) -> tuple[PreTrainedModel, dict[str, Tensor]]:
        config = copy.deepcopy(base.config)
        config.num_labels = len(names)
        config.id2label = dict(enumerate(names))
        config.label2id = {name: number for number, name in enumerate(names)}
        config.pad_token_id = pad_token_id
        config.get_text_config().pad_token_id = pad_token_id
        config._attn_implementation = None
        kind = type(base).__name__
        try:
            with torch.device("meta"):
                classifier: Any = AutoModelForSequenceClassification.from_config(config, dtype=base.dtype)
        except ValueError as error:
            raise NoClassifier(f"transformers has no sequence classifier for {kind}") from error
        wanted = classifier.state_dict()
        kept = {name: tensor for name, tensor in state.items() if name in wanted} | {CLASSIFIER_WEIGHT: weight_KD}
        missing = sorted(wanted.keys() - kept.keys())
        if missing or wanted[CLASSIFIER_WEIGHT].shape != weight_KD.shape:
            raise NoClassifier(f"the sequence classifier of {kind} has other weights: {missing or [CLASSIFIER_WEIGHT]}")
        return classifier, kept

    return convert


def with_padding_token(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """Returns a tokenizer whose padding token is not the end-of-sequence token; itself if that is so already.

    A sequence classifier of transformers finds the end of a row by its padding *token*. Any token that does not end a
    completion serves: the unknown or beginning-of-sequence token if there is one, else the first of the vocabulary.
    """
    pad, eos = tokenizer.pad_token_id, tokenizer.eos_token_id
    if pad is not None and pad != eos:
        return tokenizer
    other = copy.deepcopy(tokenizer)
    candidates: list[Any] = [tokenizer.unk_token_id, tokenizer.bos_token_id, 0, 1]
    chosen = next(token for token in candidates if token is not None and token != eos)
    other.pad_token = str(tokenizer.convert_ids_to_tokens(chosen))
    return other
