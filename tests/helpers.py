"""Small things that every test may import: a character tokenizer, tiny model configs, tiny random models.

Nothing here touches the network, and everything is a function of its arguments alone.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from tokenizers import Tokenizer, decoders
from tokenizers.models import BPE
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerFast

from rlhf_lightning.sequences.tree_attention import TreeGeometry
from rlhf_lightning.utils.files import LOCK

PAD, EOS, UNK = "<pad>", "<eos>", "<unk>"
CHARACTERS = "\n 0123456789abcdefghijklmnopqrstuvwxyz+-*/=#?.,:;!()[]<>|_'\"&"
PAD_ID, EOS_ID, UNK_ID = 0, 1, 2
VOCAB_SIZE = 3 + len(CHARACTERS)
MAX_POSITIONS = 128

# A chat prompt (with its generation prompt) is a prefix of the full rendering, and the assistant's words with their
# end-of-sequence token are marked for assistant-only masks.
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<' + message['role'] + '>' }}"
    "{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] + eos_token }}{% endgeneration %}"
    "{% else %}{{ message['content'] + '\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<assistant>' }}{% endif %}"
)

# Values of each architecture besides the common sizes. Windows are shorter than the sequences in the tests, so that a
# layout that ignores them is caught; soft-caps are low enough to bend the scores that these models produce.
_WINDOWED_PAIR = {"sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]}
_EXTRAS: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen2": {},
    "qwen3": {"head_dim": 8},
    "mistral": {"sliding_window": 4},
    "gemma2": {
        **_WINDOWED_PAIR,
        "head_dim": 8,
        "query_pre_attn_scalar": 8,
        "attn_logit_softcapping": 2.0,
        "final_logit_softcapping": 5.0,
    },
    "gemma3_text": {**_WINDOWED_PAIR, "head_dim": 8, "query_pre_attn_scalar": 8, "final_logit_softcapping": 5.0},
    "phi3": {"original_max_position_embeddings": MAX_POSITIONS},
    "gpt2": {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0},
    "gpt_neox": {},
    "olmo2": {},
    "qwen3_moe": {"head_dim": 8, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16},
}
ARCHITECTURES = tuple(_EXTRAS)


def char_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer of one token per character, with padding, end-of-sequence and unknown tokens and a chat template."""
    vocab = {token: index for index, token in enumerate((PAD, EOS, UNK, *CHARACTERS))}
    backend = Tokenizer(BPE(vocab=vocab, merges=[], unk_token=UNK))
    backend.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token=PAD,
        eos_token=EOS,
        unk_token=UNK,
        model_max_length=MAX_POSITIONS,
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def tiny_config(arch: str, **overrides: Any) -> PreTrainedConfig:
    """The config of a tiny model: width 32, 2 layers, 4 heads (2 of keys and values), 64 tokens, 128 positions.

    Dropout is off. Weights are drawn ten times wider than usual, so that logits differ enough for a comparison to mean
    something.
    """
    common = {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": MAX_POSITIONS,
        "initializer_range": 0.2,
        "pad_token_id": PAD_ID,
        "eos_token_id": EOS_ID,
        "bos_token_id": None,
    }
    if arch in ("gpt2", "gpt_neox"):
        del common["num_key_value_heads"]
    if arch == "gpt2":
        common["n_inner"] = common.pop("intermediate_size")
    return AutoConfig.for_model(arch, **{**common, **_EXTRAS[arch], **overrides})


def tiny_model(arch: str, *, seed: int = 0, dtype: torch.dtype = torch.float32, **overrides: Any) -> PreTrainedModel:
    """A tiny random model in evaluation mode; equal arguments give equal weights. The global random state is kept."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return AutoModelForCausalLM.from_config(tiny_config(arch, **overrides), dtype=dtype).eval()


def save_tiny_model(folder: str | Path, arch: str = "llama", *, seed: int = 0, **overrides: Any) -> Path:
    """Writes a tiny random model and the character tokenizer as a Hugging Face folder, and returns the folder."""
    tiny_model(arch, seed=seed, **overrides).save_pretrained(folder)
    char_tokenizer().save_pretrained(folder)
    return Path(folder)


def dense_mask(tree: TreeGeometry, window: int | None = None) -> torch.Tensor:
    """Builds the mask (T, T) of a small tree, True where a key (column) is visible to a query (row)."""
    index = torch.arange(len(tree.subtree_end), device=tree.subtree_end.device)
    visible = (index[None, :] <= index[:, None]) & (index[:, None] < tree.subtree_end[None, :])
    if window is not None:
        visible &= tree.depth[:, None] - tree.depth[None, :] < window
    return visible


def leave_together() -> None:
    """Ends the process group of a rank; gloo's threads may abort a process that ends while they run."""
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()


def nested(options: dict[str, Any]) -> dict[str, Any]:
    """Puts options with dotted names into their groups: ``{"loss.epsilon": 0.3}`` becomes ``{"loss": {...}}``."""
    found: dict[str, Any] = {}
    for name, value in options.items():
        group, _, option = name.rpartition(".")
        (found.setdefault(group, {}) if group else found)[option] = value
    return found


class Killed(BaseException):
    """Ends a test's process, so to speak: no ordinary handler catches it."""


@contextmanager
def killed_after(moment: int, begin: str | None = None) -> Iterator[None]:
    """Simulates a kill: after so many changes of the file system, the next one and all later ones raise ``Killed``.

    Args:
        moment: number of folders made, and of files and folders renamed or deleted, before the kill.
        begin: count from the first change of a file of this name on.
    """
    left, counts = moment, begin is None

    def mortal(change: Any) -> Any:
        def changed(path: Any, *args: Any, **kwargs: Any) -> Any:
            nonlocal left, counts
            if str(path).endswith(LOCK):  # a lock ends with its process
                return change(path, *args, **kwargs)
            counts = counts or Path(path).name == begin
            left -= counts
            if left < 0:
                raise Killed
            return change(path, *args, **kwargs)

        return changed

    changes = {name: mortal(getattr(os, name)) for name in ("mkdir", "rename", "replace", "rmdir", "unlink")}
    with mock.patch.multiple(os, **changes):
        yield
