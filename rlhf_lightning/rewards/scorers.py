"""Scorers of prompts with completions for learned rewards: our reward models, packed, and any others, padded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification, AutoTokenizer, PreTrainedTokenizerBase

from ..data.chat_template import ChatTemplate, with_turn
from ..inference.completion import decode
from ..models import RewardModel, num_positions
from ..models.reward_head import with_padding_token
from ..models.scoring import check_length
from ..sequences import Segment


class PackedScorer:
    """Scores prompts with completions by a ``RewardModel``."""

    def __init__(self, model: RewardModel) -> None:
        self.model = model
        self.rows = model.rows
        self._other: PreTrainedTokenizerBase | None = None
        self._same_tokens = False

    def attach(self, policy: Any) -> None:
        """Moves to a policy's device, and checks whether both tokenizers agree."""
        move(self.model, policy.device)
        if self._other is not policy.tokenizer:
            self._other = policy.tokenizer
            self._same_tokens = _same_tokens(self.rows.tokenizer, policy.tokenizer)

    def encode(
        self,
        prompt: Any,
        completion: str,
        template: dict[str, Any],
        prompt_ids: Sequence[int] | None,
        completion_ids: Sequence[int] | None,
    ) -> Segment:
        """Encodes a prompt with a completion, ended as in training."""
        sampled = self._same_tokens and prompt_ids is not None and completion_ids is not None
        if not sampled or decode(self.rows.tokenizer, completion_ids or ()) != completion:
            return self.model.encode(prompt, completion, template)
        ids = self.rows.ended(completion_ids or (), chat=not isinstance(prompt, str), template=template)
        tree = Segment(list(prompt_ids or ()), None, (Segment(ids, [1.0] * len(ids)),))
        self.model.check_length(tree)
        return tree

    def score(self, segments: Sequence[Segment]) -> list[Tensor]:
        """The rewards of each sequence by the ensemble's members, ``(M,)``."""
        with exactly(self.model.device):
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

    def attach(self, policy: Any) -> None:
        """Moves to a policy's device."""
        move(self.model, policy.device)

    def encode(self, prompt: Any, completion: str, template: dict[str, Any], *ids: Any) -> dict[str, list[int]]:
        """Tokenizes a pair of texts, or a chat."""
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
        with exactly(self.model.device):
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


def move(model: nn.Module, device: torch.device) -> None:
    """Moves a model to a device."""
    with torch.inference_mode(False):  # validation may run in inference mode
        model.to(device)


def exactly(device: torch.device) -> AbstractContextManager[Any]:
    """Turns the policy's autocast off: a reward model computes in the precision of its weights."""
    return torch.autocast(device.type, enabled=False)


def _same_tokens(one: PreTrainedTokenizerBase, other: PreTrainedTokenizerBase) -> bool:
    same_chat = one.chat_template == other.chat_template
    return same_chat and one.eos_token_id == other.eos_token_id and one.get_vocab() == other.get_vocab()
