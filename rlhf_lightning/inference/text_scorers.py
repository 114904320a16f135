"""Reward models that score prompts with completions, as texts or tokens: our own, packed, and any others, padded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer, PreTrainedTokenizerBase

from ..data.chat_template import ChatTemplate, with_turn
from ..models import RewardModel, num_positions
from ..models.half_weights import hold_frozen
from ..models.loading import locate
from ..models.reward_head import read_head_options, read_head_state, with_padding_token
from ..models.scoring import check_length
from ..sequences import Segment
from ..utils.validation import check_choice, check_count
from .completion import decode

Dtype = Literal["float32", "bfloat16", "float16"]
DTYPES: dict[str, torch.dtype] = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


class PackedScorer:
    """Scores prompts with completions by a ``RewardModel``."""

    def __init__(self, model: RewardModel) -> None:
        self.model = model
        self.rows = model.rows
        self.half: torch.dtype | None = None
        self._other: PreTrainedTokenizerBase | None = None
        self._same_tokens = False

    @property
    def num_members(self) -> int:
        """Number of members of an ensemble; 1 for any other model."""
        return self.model.options.num_models

    def attach(
        self, device: torch.device, tokenizer: PreTrainedTokenizerBase | None, half: torch.dtype | None = None
    ) -> None:
        """Moves to a policy's device, and checks whether both tokenizers agree.

        Args:
            device: the policy's.
            tokenizer: the policy's.
            half: the precision of products; ``None``: that of the weights.
        """
        self.half = half
        move(self.model, device, half)
        if self._other is not tokenizer:
            self._other = tokenizer
            self._same_tokens = tokenizer is not None and same_tokens(self.rows.tokenizer, tokenizer)

    def encode(
        self,
        prompt: Any,
        completion: str,
        template: dict[str, Any],
        prompt_ids: Sequence[int] | None,
        completion_ids: Sequence[int] | None,
        *,
        ended: bool = True,
    ) -> Segment:
        """Encodes a prompt with a completion: ended as in training, or as it is so far.

        Raises:
            ValueError: it is too long, or not ended and of other tokens than the reward model's.
        """
        sampled = self._same_tokens and prompt_ids is not None and completion_ids is not None
        if not sampled or decode(self.rows.tokenizer, completion_ids or ()) != completion:
            if not ended:
                raise ValueError(
                    "a partial solution is scored in the policy's own tokens, and the reward model has another "
                    "tokenizer: score whole solutions (BestOfN), or train a reward model on the policy"
                )
            return self.model.encode(prompt, completion, template)
        ids = list(completion_ids or ())
        ids = self.rows.ended(ids, chat=not isinstance(prompt, str), template=template) if ended else ids
        tree = Segment(list(prompt_ids or ()), None, (Segment(ids, [1.0] * len(ids)),))
        self.model.check_length(tree)
        return tree

    def score(self, segments: Sequence[Segment]) -> list[Tensor]:
        """The rewards of each sequence by the ensemble's members, ``(M,)``."""
        with computing_in(self.half, self.model.device):
            values = self.model.score_trees(segments)
        return [self.model.options.combined(value).float() for value in values]


class PaddedScorer:
    """Scores prompts with completions by a sequence classifier of transformers, of any architecture."""

    def __init__(self, folder: str, output: int, budget: int, dtype: torch.dtype) -> None:
        try:
            loaded: Any = AutoModelForSequenceClassification.from_pretrained(
                folder, dtype=dtype, output_loading_info=True, attn_implementation="eager"
            )
            tokenizer = AutoTokenizer.from_pretrained(folder)
        except (OSError, ValueError, RuntimeError) as error:
            reason = (str(error).splitlines() or ["no reason given"])[0]
            raise ValueError(f"cannot load the sequence classifier {folder!r} ({reason})") from error
        self.model, info = loaded
        if info["missing_keys"]:
            raise ValueError(
                f"the sequence classifier {folder!r} lacks the weights {sorted(info['missing_keys'])[:3]}: export it "
                "again, its head included"
            )
        self.model.eval().requires_grad_(False)
        self.tokenizer = with_padding_token(tokenizer)
        self.tokenizer.padding_side = "right"
        if self.model.config.pad_token_id is None:  # decoders find the last token by it
            self.model.config.pad_token_id = self.tokenizer.pad_token_id
        self.output, self.budget = output, budget
        self.half: torch.dtype | None = None

    num_members = 1

    def attach(
        self, device: torch.device, tokenizer: PreTrainedTokenizerBase | None, half: torch.dtype | None = None
    ) -> None:
        """Moves to a policy's device; arguments as of ``PackedScorer.attach``."""
        self.half = half
        move(self.model, device, half)

    def encode(
        self, prompt: Any, completion: str, template: dict[str, Any], *ids: Any, ended: bool = True
    ) -> dict[str, list[int]]:
        """Tokenizes a pair of texts, or a chat; a classifier reads a partial solution as if it were whole."""
        if isinstance(prompt, str):
            encoded = self.tokenizer(prompt, completion, verbose=False)
        elif self.tokenizer.chat_template is None:
            raise ValueError("the prompt holds chat messages and the reward model's tokenizer has no chat template")
        else:
            turn = {"role": "assistant", "content": completion}
            text = ChatTemplate(self.tokenizer).render(with_turn(prompt, turn), template)
            encoded = self.tokenizer(text, add_special_tokens=False, verbose=False)
        limit = min(self.tokenizer.model_max_length, num_positions(self.model) or self.tokenizer.model_max_length)
        check_length(len(encoded["input_ids"]), limit)
        return dict(encoded)

    @torch.no_grad()
    def score(self, encoded: Sequence[dict[str, list[int]]]) -> list[Tensor]:
        """The logit of each sequence, ``(1,)``."""
        order = sorted(range(len(encoded)), key=lambda n: len(encoded[n]["input_ids"]))
        values: list[Tensor] = [torch.empty(0)] * len(encoded)
        part: list[int] = []
        for n in order:
            if part and (len(part) + 1) * len(encoded[n]["input_ids"]) > self.budget:
                self._score_part(part, encoded, values)
                part = []
            part.append(n)
        if part:
            self._score_part(part, encoded, values)
        return values

    def _score_part(self, part: Sequence[int], encoded: Sequence[dict[str, list[int]]], values: list[Tensor]) -> None:
        batch = self.tokenizer.pad([encoded[n] for n in part], return_tensors="pt").to(self.model.device)
        with computing_in(self.half, self.model.device):
            logits = self.model(**batch).logits[:, self.output].float().cpu()
        for n, logit in zip(part, logits, strict=True):
            values[n] = logit[None]


def row_templates(
    count: int,
    common: Mapping[str, Any],
    tools: Sequence[Any] | None,
    settings: Sequence[Mapping[str, Any] | None] | None,
) -> list[dict[str, Any]]:
    """Merges the common chat template settings, each row's own (which take precedence), and its tools."""
    found = [{**common, **((settings[n] if settings is not None else None) or {})} for n in range(count)]
    for template, own in zip(found, tools or (), strict=False):
        if own:
            template["tools"] = own
    return found


def move(model: nn.Module, device: torch.device, half: torch.dtype | None = None) -> None:
    """Moves a model to a device, the weights of its linear layers in the precision that products have there."""
    with torch.inference_mode(False):  # validation may run in inference mode
        if half is not None:
            hold_frozen(model, half, exact=False)
        model.to(device)


def computing_in(half: torch.dtype | None, device: torch.device) -> AbstractContextManager[Any]:
    """Computes products in half precision; with ``None`` in the precision of the weights, whatever the policy's."""
    return torch.autocast(device.type, half, enabled=half is not None, cache_enabled=False)


def same_tokens(one: PreTrainedTokenizerBase, other: PreTrainedTokenizerBase) -> bool:
    """Tells whether two tokenizers have the same tokens, end and chat template."""
    same_chat = one.chat_template == other.chat_template
    return same_chat and one.eos_token_id == other.eos_token_id and one.get_vocab() == other.get_vocab()


# Folders.


def loading_options(micro_batch_tokens: int | None, dtype: Dtype | None) -> dict[str, Any]:
    """Checks the options that a scoring model is loaded with, and fills in their defaults.

    Raises:
        ValueError: one is out of range.
    """
    micro_batch_tokens = 8192 if micro_batch_tokens is None else micro_batch_tokens
    check_count("micro_batch_tokens", micro_batch_tokens, "8192 is a good start; lower it to save memory")
    dtype = "float32" if dtype is None else dtype
    check_choice("dtype", dtype, DTYPES)
    return {"micro_batch_tokens": micro_batch_tokens, "dtype": DTYPES[dtype]}


def check_unloaded(**options: Any) -> None:
    """Raises if an option of loading is given with a model that is loaded already."""
    for name, value in options.items():
        if value is not None:
            raise ValueError(
                f"{name} is {value!r}, and the model is loaded already, with options of its own: give its folder, or "
                f"leave {name} out"
            )


def load_scorer(
    model: str, *, label: str | None, micro_batch_tokens: int, dtype: torch.dtype, penalty: float
) -> PackedScorer | PaddedScorer:
    """Loads a reward model, or any sequence classifier.

    Args:
        model: folder or hub id.
        label: name of the output to use, of several.
        micro_batch_tokens: tokens per forward.
        dtype: of the weights.
        penalty: standard deviations of an ensemble that will be subtracted; above 0 it must be one.

    Raises:
        ValueError: the folder holds no reward model, or an option does not fit it.
    """
    model = locate(model, what="reward model")
    options, labels = _reward_options(model)
    chosen = _label_weights(model, labels, label, options)
    scorer: PackedScorer | PaddedScorer
    if options is None:
        scorer = PaddedScorer(model, chosen.index(1.0), micro_batch_tokens, dtype)
    else:
        given: dict[str, Any] = {"attributes": labels, "attribute_weights": chosen}
        given |= {"dtype": dtype, "micro_batch_tokens": micro_batch_tokens}
        scorer = PackedScorer(RewardModel.from_pretrained(model, **given))
    check_ensemble(model, scorer.num_members, penalty)
    return scorer


def check_ensemble(model: str, members: int, penalty: float) -> None:
    """Raises if an uncertainty penalty is asked of a model that is no ensemble."""
    if penalty and members == 1:
        raise ValueError(
            f"uncertainty_penalty is {penalty}, but {model!r} is no ensemble: use 0, or train a RewardModule with "
            "num_models=4"
        )


def _reward_options(folder: str) -> tuple[dict[str, Any] | None, list[str]]:
    """The head options of a folder that ``RewardModel`` can load (``None`` for others), and its outputs' names."""
    stored = read_head_options(folder)
    if stored:
        if stored.get("method") != RewardModel.method:
            raise ValueError(
                f"{folder!r} holds a {stored.get('method')} model, no reward model: a process reward model is used by "
                "ProcessModelReward, ProcessModelSteps or ProcessScorer, a critic by ValueScorer"
            )
        return stored, list(stored["attributes"])
    try:
        config = AutoConfig.from_pretrained(folder)
    except (OSError, ValueError) as error:
        raise ValueError(f"{folder!r} holds no model ({str(error).splitlines()[0]}): give a reward model") from error
    architecture = str((getattr(config, "architectures", None) or ["unknown architecture"])[0])
    if not architecture.endswith("ForSequenceClassification"):
        raise ValueError(
            f"{folder!r} holds no reward model but a {architecture}: give what RewardModule exported, or a sequence "
            "classifier"
        )
    labels = [str(config.id2label[n]) for n in sorted(config.id2label)]
    return ({} if read_head_state(folder) else None), labels


def _label_weights(
    folder: str, labels: Sequence[str], label: str | None, options: Mapping[str, Any] | None
) -> list[float]:
    """The weight of each output in the reward."""
    if label is not None:
        if label not in labels:
            raise ValueError(f"label is {label!r}; the outputs of {folder!r} are {', '.join(labels)}")
        return [float(name == label) for name in labels]
    if options and "attribute_weights" in options:
        return [float(weight) for weight in options["attribute_weights"]]
    if len(labels) > 1:
        raise ValueError(f"the classifier {folder!r} has the outputs {', '.join(labels)}: name one with label=")
    return [1.0]
