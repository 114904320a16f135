"""Learned reward models as reward functions. Their weights are frozen, and part of no module and no checkpoint."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer, PreTrainedTokenizerBase

from ..datamodules.formats import Row
from ..datamodules.tokenization import RowTokenizer
from ..losses.process_reward import Aggregation
from ..models import num_positions
from ..models.heads import read_head_options, read_head_state, with_padding_token
from ..models.loading import _locate
from ..rollouts.completion import decode
from ..sequences import Segment
from .checks import check_choice, check_count, check_not_negative
from .headed import HeadedModule
from .process_reward import ProcessRewardModule
from .reward import RewardModule
from .scoring import score_texts

Dtype = Literal["float32", "bfloat16", "float16"]
_DTYPES: dict[str, torch.dtype] = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


class RewardModelReward:
    """The reward that a learned reward model gives to a completion.

    An ensemble's reward is its mean less ``uncertainty_penalty`` standard deviations over its members, so that a policy
    does not go where they disagree (Coste et al., 2023, arXiv:2310.02743: uncertainty-weighted optimisation).

    What ``RewardModule`` exported, and sequence classifiers on a decoder with one linear layer, run packed, and read
    what they were trained on: prompt, completion, end-of-sequence token (one that was cut off gets it). These are the
    sampled tokens themselves, where the policy's tokenizer is the reward model's (vocabulary and chat template) and the
    tokens are the completion's text; else the texts, tokenised as the reward model's training data. Other sequence
    classifiers of transformers run padded, on pairs of prompt and completion as their tokenizer writes them, or on the
    chat as their template does. A sample that is too long for the reward model counts as failed.

    Args:
        model: folder or hub id of a reward model that was exported, or of any sequence classifier.
        uncertainty_penalty: at least 0; only for ensembles.
        label: of a classifier with several outputs, the name of the one whose logit is the reward; of a reward model
            with several attributes, the one that counts, in place of their weighted sum.
        micro_batch_tokens: tokens per forward, at least 1; changes no result.
        dtype: of the weights.

    Raises:
        ValueError: the folder holds no reward model, or an option is out of range.

    Example::

        GRPOModule("my-sft-model", rewards=[RewardModelReward("my-reward-model")])
    """

    def __init__(
        self,
        model: str,
        uncertainty_penalty: float = 0.0,
        label: str | None = None,
        micro_batch_tokens: int = 8192,
        dtype: Dtype = "float32",
    ) -> None:
        check_not_negative("uncertainty_penalty", uncertainty_penalty, "0 is the ensemble's plain mean")
        check_count("micro_batch_tokens", micro_batch_tokens, "8192 is a good start; lower it to save memory")
        check_choice("dtype", dtype, _DTYPES)
        self.uncertainty_penalty = uncertainty_penalty
        model = _locate(model, what="reward model")
        options, labels = _reward_options(model)
        chosen = _label_weights(model, labels, label, options)
        self.scorer: _Packed | _Padded
        if options is None:
            self.scorer = _Padded(model, chosen.index(1.0), micro_batch_tokens, _DTYPES[dtype])
        else:
            given = {"attributes": labels, "attribute_weights": chosen, "micro_batch_tokens": micro_batch_tokens}
            self.scorer = _Packed(RewardModule.from_pretrained(model, **given), _DTYPES[dtype])
        members = 1 if options is None else int(options.get("num_models", 1))
        if uncertainty_penalty and members == 1:
            raise ValueError(
                f"uncertainty_penalty is {uncertainty_penalty}, but {model!r} is no ensemble: use 0, or train a "
                "RewardModule with num_models=4"
            )

    def attach(self, module: Any) -> None:
        """Goes to a policy's device, and finds out whether its tokens are the reward model's."""
        self.scorer.attach(module)

    def __call__(
        self,
        prompts: Sequence[Any],
        completions: Sequence[str],
        prompt_ids: Sequence[Sequence[int]] | None = None,
        completion_ids: Sequence[Sequence[int]] | None = None,
    ) -> list[float | Exception]:
        """Scores each completion; an exception stands where one cannot be scored.

        Args:
            prompts: texts, or lists of chat messages.
            completions: texts.
            prompt_ids: the prompts' tokens, where the texts have been sampled from them.
            completion_ids: the completions' tokens.
        """
        tokens = [(None, None)] * len(completions) if prompt_ids is None or completion_ids is None else []
        pairs: Any = tokens or zip(prompt_ids or (), completion_ids or (), strict=True)
        samples = list(zip(prompts, completions, pairs, strict=True))
        rewards: list[float | Exception] = []
        segments: list[Any] = []
        places = []
        for number, (prompt, completion, ids) in enumerate(samples):
            try:
                segments.append(self.scorer.encode(prompt, completion, *ids))
                places.append(number)
                rewards.append(0.0)
            except ValueError as error:
                rewards.append(error)
        for number, members_M in zip(places, self.scorer.score(segments), strict=True):
            rewards[number] = float(members_M.mean() - self.uncertainty_penalty * members_M.std(correction=0))
        return rewards


class _Packed:
    """A ``RewardModule`` that scores prompts with completions."""

    def __init__(self, module: RewardModule, dtype: torch.dtype) -> None:
        self.module = _frozen(module, dtype)
        self.rows = RowTokenizer(module.tokenizer)
        self._other: PreTrainedTokenizerBase | None = None
        self._same_tokens = False

    def attach(self, policy: Any) -> None:
        _move(self.module, policy.device)
        if self._other is not policy.tokenizer:
            self._other = policy.tokenizer
            self._same_tokens = _same_tokens(self.rows.tokenizer, policy.tokenizer)

    def encode(
        self, prompt: Any, completion: str, prompt_ids: Sequence[int] | None, completion_ids: Sequence[int] | None
    ) -> tuple[Segment, Segment]:
        """A prompt and a completion, closed by the end-of-sequence token."""
        sampled = self._same_tokens and prompt_ids is not None and completion_ids is not None
        if sampled and decode(self.rows.tokenizer, completion_ids or ()) == completion:
            root, ids = Segment(list(prompt_ids or ())), list(completion_ids or ())
            ids = ids if ids[-1:] == [self.rows.eos] else [*ids, self.rows.eos]
            found = root, Segment(ids, [1.0] * len(ids))
        else:
            answer: Any = completion if isinstance(prompt, str) else [{"role": "assistant", "content": completion}]
            root = self.rows.answers(Row(prompt, (answer,)))
            found = root, root.children[0]
        _check_length(len(found[0].tokens) + len(found[1].tokens), num_positions(self.module.model))
        return found

    def score(self, segments: Sequence[tuple[Segment, Segment]]) -> list[Tensor]:
        """``(M,)`` rewards by the members of the ensemble, for each."""
        with _exactly(self.module.device):
            values = score_texts(self.module, segments, self.module._sequence_rewards)
        return [self.module.combined(value).float() for value in values]


class _Padded:
    """A sequence classifier of transformers, of any architecture."""

    def __init__(self, folder: str, output: int, budget: int, dtype: torch.dtype) -> None:
        try:
            loaded: Any = AutoModelForSequenceClassification.from_pretrained(
                folder, dtype=dtype, output_loading_info=True
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
        if self.model.config.pad_token_id is None:  # by which decoders find the last token
            self.model.config.pad_token_id = self.tokenizer.pad_token_id
        self.output, self.budget = output, budget

    def attach(self, policy: Any) -> None:
        with torch.inference_mode(False):
            self.model.to(policy.device)

    def encode(self, prompt: Any, completion: str, *ids: Any) -> dict[str, list[int]]:
        """What the tokenizer makes of a pair, or of a chat."""
        if isinstance(prompt, str):
            encoded = self.tokenizer(prompt, completion, verbose=False)
        elif self.tokenizer.chat_template is None:
            raise ValueError("the prompt holds chat messages and the reward model's tokenizer has no chat template")
        else:
            chat = [*prompt, {"role": "assistant", "content": completion}]
            text = str(self.tokenizer.apply_chat_template(chat, tokenize=False))
            encoded = self.tokenizer(text, add_special_tokens=False, verbose=False)
        limit = min(self.tokenizer.model_max_length, num_positions(self.model) or self.tokenizer.model_max_length)
        _check_length(len(encoded["input_ids"]), limit)
        return dict(encoded)

    @torch.no_grad()
    def score(self, encoded: Sequence[dict[str, list[int]]]) -> list[Tensor]:
        """``(1,)`` the logit of each."""
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
        with _exactly(self.model.device):
            logits = self.model(**batch).logits[:, self.output].float().cpu()
        for n, logit in zip(part, logits, strict=True):
            values[n] = logit[None]


class ProcessModelReward:
    """The score that a process reward model gives to a whole completion: its steps' probabilities, aggregated.

    A completion without steps cannot be scored. For rewards of the steps themselves give ``ProcessModelSteps`` as
    ``process_reward``.

    Args:
        model: folder or hub id of a process reward model that was exported.
        aggregation: ``min``, ``product``, ``last`` or ``mean``; the model's own by default.
        micro_batch_tokens: tokens per forward, at least 1; changes no result.
        dtype: of the weights.

    Raises:
        ValueError: the folder holds no process reward model, or an option is out of range.

    Example::

        GRPOModule("my-sft-model", rewards=[ProcessModelReward("my-process-model", aggregation="product")])
    """

    def __init__(
        self,
        model: str,
        aggregation: Aggregation | None = None,
        micro_batch_tokens: int = 8192,
        dtype: Dtype = "float32",
    ) -> None:
        check_choice("dtype", dtype, _DTYPES)
        options: dict[str, Any] = {} if aggregation is None else {"aggregation": aggregation}
        model = _locate(model, what="process reward model")
        found = ProcessRewardModule.from_pretrained(model, micro_batch_tokens=micro_batch_tokens, **options)
        self.module = _frozen(found, _DTYPES[dtype])
        self.step_separator = found.step_separator

    def attach(self, module: Any) -> None:
        """Goes to a policy's device."""
        _move(self.module, module.device)

    def __call__(self, prompts: Sequence[Any], completions: Sequence[str]) -> list[Any]:
        """Scores each completion."""
        places = [n for n, completion in enumerate(completions) if any(completion.split(self.step_separator))]
        found: list[Any] = [None] * len(completions)
        if places:
            with _exactly(self.module.device):
                scores = self._scores([prompts[n] for n in places], [completions[n] for n in places])
            for n, score in zip(places, scores, strict=True):
                found[n] = score
        return found

    def _scores(self, prompts: Sequence[Any], completions: Sequence[str]) -> Sequence[Any]:
        scores: list[float] = self.module.score(prompts, completions)
        return scores


class ProcessModelSteps(ProcessModelReward):
    """The probability that a process reward model gives to every step, less ``baseline``; a ``process_reward``.

    Without a baseline of a half or so every further step would be worth something to PPO, right or not. GRPO's
    normalisation takes any baseline out.

    Args:
        model: folder or hub id of a process reward model that was exported, not one with ``boundaries="learned"``.
        baseline: what a step's probability has to exceed to be worth something.
        micro_batch_tokens: tokens per forward, at least 1; changes no result.
        dtype: of the weights.

    Raises:
        ValueError: the folder holds no such model, or an option is out of range.

    Example::

        PPOModule("my-sft-model", rewards=[], process_reward=ProcessModelSteps("my-process-model"))
    """

    def __init__(
        self, model: str, baseline: float = 0.5, micro_batch_tokens: int = 8192, dtype: Dtype = "float32"
    ) -> None:
        super().__init__(model, micro_batch_tokens=micro_batch_tokens, dtype=dtype)
        if self.module.boundaries == "learned":
            raise ValueError(
                f"the process reward model {model!r} finds steps by itself (boundaries='learned'), so that its rewards "
                "have no tokens to land on: use ProcessModelReward, or a model trained with a step_separator"
            )
        self.baseline = baseline

    def _scores(self, prompts: Sequence[Any], completions: Sequence[str]) -> Sequence[Any]:
        steps = self.module.score_steps(prompts, completions)
        return [[score - self.baseline for score in scores] for scores in steps]


# Folders.


def _reward_options(folder: str) -> tuple[dict[str, Any] | None, list[str]]:
    """The options of what ``RewardModule`` can load (``None`` for other classifiers), and the names of its outputs."""
    stored = read_head_options(folder)
    if stored:
        if stored.get("method") != RewardModule.method:
            raise ValueError(
                f"{folder!r} holds a {stored.get('method')} model, no reward model: a process reward model is used by "
                "ProcessModelReward or ProcessModelSteps"
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
    """How much each output counts."""
    if label is not None:
        if label not in labels:
            raise ValueError(f"label is {label!r}; the outputs of {folder!r} are {', '.join(labels)}")
        return [float(name == label) for name in labels]
    if options and "attribute_weights" in options:
        return [float(weight) for weight in options["attribute_weights"]]
    if len(labels) > 1:
        raise ValueError(f"the classifier {folder!r} has the outputs {', '.join(labels)}: name one with label=")
    return [1.0]


# What models have in common.


def _frozen(module: Any, dtype: torch.dtype) -> Any:
    module.requires_grad_(False).to(dtype)
    module.settle()
    return module


def _move(module: HeadedModule, device: torch.device) -> None:
    if module.device != device:
        with torch.inference_mode(False):  # in which a validation may run
            module.to(device)
            module.settle()


def _exactly(device: torch.device) -> AbstractContextManager[Any]:
    """Autocast is the policy's, and off for the reward model: its precision is that of its weights."""
    return torch.autocast(device.type, enabled=False)


def _same_tokens(one: PreTrainedTokenizerBase, other: PreTrainedTokenizerBase) -> bool:
    same_chat = one.chat_template == other.chat_template
    return same_chat and one.eos_token_id == other.eos_token_id and one.get_vocab() == other.get_vocab()


def _check_length(length: int, limit: int | None) -> None:
    if limit is not None and length > limit:
        raise ValueError(f"prompt and completion have {length} tokens, and the reward model reads {limit} at most")
