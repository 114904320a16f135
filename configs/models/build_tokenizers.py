"""Builds the embedded models' folders: a config and a tokenizer each, no weights.

    python configs/models/build_tokenizers.py nano
    python configs/models/build_tokenizers.py small --gsm8k /data/gsm8k

``nano``: one token per character of printable ASCII, and the newline. ``small``: byte-level BPE, trained on the text of
GSM8K's training file (MIT licence), digits apart. The same input gives the same files.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast, Qwen3Config

SPECIAL = {"pad_token": "<pad>", "eos_token": "<eos>", "bos_token": "<bos>", "unk_token": "<unk>"}
# `user: 3+4=?<eos>assistant: 3+4=7<eos>`: a prompt's rendering is a prefix of the whole conversation's.
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message['role'] + ': ' }}"
    "{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] + eos_token }}{% endgeneration %}"
    "{% else %}{{ message['content'] + eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)


def characters() -> Tokenizer:
    """One token per character: newline and printable ASCII; any other character is ``<unk>``."""
    alphabet = ["\n", *map(chr, range(32, 127))]
    vocabulary = {token: number for number, token in enumerate([*SPECIAL.values(), *alphabet])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=SPECIAL["unk_token"]))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    return tokenizer


def byte_pairs(texts: Iterator[str], vocab_size: int) -> Tokenizer:
    """Byte-level BPE: any text, exactly; a digit is a token, so that numbers are read as they are added."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[token for token in SPECIAL.values() if token != SPECIAL["unk_token"]],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def gsm8k_texts(folder: Path) -> Iterator[str]:
    """Questions and answers of the training file; the calculator's annotations are removed, as in the datamodule."""
    from rlhf_lightning.data.tasks import open_task

    for split in ("train", "validation"):
        for row in open_task(f"gsm8k:demonstrations?path={folder}&split={split}"):
            yield row["prompt"]
            yield row["completion"]


def save(tokenizer: Tokenizer, folder: Path, *, max_length: int, **shape: Any) -> None:
    """Writes ``config.json``, ``tokenizer.json`` and ``tokenizer_config.json``."""
    special = {name: token for name, token in SPECIAL.items() if tokenizer.token_to_id(token) is not None}
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in special.values()])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        clean_up_tokenization_spaces=False,
        model_max_length=max_length,
        padding_side="right",
        chat_template=CHAT_TEMPLATE,
        **special,
    )
    config = Qwen3Config(
        architectures=["Qwen3ForCausalLM"],
        dtype="float32",
        vocab_size=len(fast),
        max_position_embeddings=max_length,
        tie_word_embeddings=True,
        pad_token_id=fast.pad_token_id,
        eos_token_id=fast.eos_token_id,
        bos_token_id=fast.bos_token_id,
        **shape,
    )
    folder.mkdir(exist_ok=True)
    config.save_pretrained(folder)
    fast.save_pretrained(folder)
    # One line: the indented form of a BPE table is half white space.
    table = json.loads((folder / "tokenizer.json").read_text())
    (folder / "tokenizer.json").write_text(json.dumps(table, ensure_ascii=False, separators=(",", ":")) + "\n")


def main() -> None:
    """Builds the folder named on the command line, next to this file."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("model", choices=["nano", "small"])
    parser.add_argument("--gsm8k", type=Path, help="folder with GSM8K's train.jsonl (needed for small)")
    arguments = parser.parse_args()
    folder = Path(__file__).parent / arguments.model
    if arguments.model == "nano":
        shape = {"hidden_size": 128, "num_hidden_layers": 3, "intermediate_size": 384, "head_dim": 32}
        save(characters(), folder, max_length=256, num_attention_heads=4, num_key_value_heads=2, **shape)
        return
    if arguments.gsm8k is None:
        parser.error("small needs --gsm8k <folder with train.jsonl>")
    tokenizer = byte_pairs(gsm8k_texts(arguments.gsm8k), vocab_size=4096)
    shape = {"hidden_size": 256, "num_hidden_layers": 4, "intermediate_size": 768, "head_dim": 64}
    save(tokenizer, folder, max_length=1024, num_attention_heads=4, num_key_value_heads=2, **shape)


if __name__ == "__main__":
    main()
