"""Judges, which rate statements: a model in this process by its probabilities, an engine by its text.

Legend: S sequences (two answers to each question).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from ..core.device_precision import frozen_dtype
from ..data.chat_template import ChatTemplate
from ..data.text_tokens import encode, prompt_tokens
from ..inference.engine import Engine
from ..inference.sampling import SamplingParams
from ..inference.text_scorers import computing_in, move
from ..models import evaluating, load_causal_lm, load_tokenizer, num_positions, resolve_layout, token_stats
from ..models.half_weights import rounded
from ..sequences import Example, Segment, pack, plan_micro_batches, register_attention
from ..utils.imports import load_attribute
from ..utils.transfer import to_host

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "auto": torch.float32}
_VERDICT = re.compile(r"\W*(?:(?P<yes>yes|true)|(?P<no>no|false))\b", re.IGNORECASE)
_NUMBER = re.compile(r"[-+]?(?:\d+\.?\d*|\.\d+)")


class Judge(Protocol):
    """Interface of judges, which answer yes-or-no questions."""

    def __call__(self, questions: Sequence[str]) -> Sequence[float | Exception]:
        """Returns for each question a number from 0 (no) to 1 (yes), or the exception."""
        ...


class ModelJudge:
    """Judges by a language model's probability of ``yes`` against ``no``.

    P(yes) / (P(yes) + P(no)), each the probability of the answer's tokens right after the question; the question is
    the user's message where the tokenizer has a chat template. The weights are frozen.

    Args:
        model: folder or hub id of a causal language model.
        answers: the texts of yes and no; `` yes`` and `` no`` suit models that continue text.
        micro_batch_tokens: tokens per forward, above 0; changes no result.
        dtype: of the weights; ``auto``: ``float32``, with products in bf16 where the policy is trained so on a GPU.

    Raises:
        ValueError: the model does not exist, an option is out of range, or both answers have the same tokens.

    Example::

        ModelJudge("my-judge")(["Is 2 even? Answer yes or no.", "Is 3 even? Answer yes or no."])
    """

    def __init__(
        self,
        model: str,
        answers: tuple[str, str] = ("yes", "no"),
        micro_batch_tokens: int = 8192,
        dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto",
    ) -> None:
        if dtype not in _DTYPES:
            raise ValueError(f"dtype is {dtype!r}; it must be one of {', '.join(_DTYPES)}")
        name = register_attention()
        self.model = load_causal_lm(model, dtype=_DTYPES[dtype], attn_implementation=name, trainable=False)
        self.tokenizer = load_tokenizer(model)
        self.answers = [encode(self.tokenizer, answer, continues=True) for answer in answers]
        if len(self.answers) != 2 or not all(self.answers) or self.answers[0] == self.answers[1]:
            raise ValueError(f"answers is {list(answers)}; it must be two texts of different tokens: ['yes', 'no']")
        self.micro_batch_tokens = micro_batch_tokens
        self.dtype = dtype
        self._half: torch.dtype | None = None
        self._layout: Literal["packed", "padded"] | None = None

    def attach(self, module: Any) -> None:
        """Moves to a policy's device."""
        self._half = frozen_dtype(module) if self.dtype == "auto" else None
        move(self.model, module.device, self._half)

    @torch.no_grad()
    def __call__(self, questions: Sequence[str]) -> list[float | Exception]:
        """See ``Judge``."""
        verdicts: list[float | Exception] = [0.0] * len(questions)
        examples, places = [], []
        # A question that cannot be asked loses only its own verdict.
        for number, question in enumerate(questions):
            try:
                examples.append(self._example(number, question))
                places.append(number)
            except ValueError as error:
                verdicts[number] = error
        device = next(self.model.parameters()).device
        if self._layout is None:
            self._layout = resolve_layout(self.model, "auto")
        with evaluating(self.model), computing_in(self._half, device), rounded(self.model):
            found: dict[tuple[int, ...], Tensor] = {}
            for micro in plan_micro_batches(examples, budget=self.micro_batch_tokens):
                batch = pack([examples[n] for n in micro], device=device)
                logps_S = batch.sum_per_sequence(token_stats(self.model, batch, self._layout).logprobs.float())
                # p(yes) / (p(yes) + p(no)), from the log-probabilities of both answers.
                yes, no = logps_S.view(-1, 2).unbind(dim=1)
                found[tuple(micro)] = (yes - no).sigmoid()
        for numbers, values in to_host(found).items():
            for n, verdict in zip(numbers, values.tolist(), strict=True):
                verdicts[places[n]] = verdict
        return verdicts

    def _example(self, number: int, question: str) -> Example:
        """Builds the example of a question with both answers."""
        if self.tokenizer.chat_template is None:
            tokens = prompt_tokens(self.tokenizer, question)
        else:
            context = ChatTemplate(self.tokenizer).context([{"role": "user", "content": question}])
            tokens = encode(self.tokenizer, context)
        length, limit = len(tokens) + max(map(len, self.answers)), num_positions(self.model)
        if limit is not None and length > limit:
            raise ValueError(f"the question has {length} tokens with its answer, and the judge reads {limit} at most")
        children = tuple(Segment(answer, [1.0] * len(answer)) for answer in self.answers)
        return Example(f"question:{number}", Segment(tokens, children=children))


class EngineJudge:
    """Judges by the text of an engine.

    A verdict is parsed from the text: 1 if it begins with yes, 0 if it begins with no, else the first number in it
    over ``scale``. With several samples it is the mean of the readable ones; a question without one has failed.

    Args:
        engine: ``LocalEngine``, ``RemoteEngine``, or an object with the same method ``generate``.
        num_samples: per question, at least 1.
        sampling: by default 16 tokens, greedily.
        scale: the number that means yes, above 0.

    Raises:
        ValueError: an option is out of range, or the engine has no method ``generate``.
    """

    def __init__(
        self, engine: Engine, num_samples: int = 1, sampling: SamplingParams | None = None, scale: float = 1.0
    ) -> None:
        if not callable(getattr(engine, "generate", None)):
            raise ValueError(f"the judge is a {type(engine).__name__}, which has no method generate: give an engine")
        if num_samples < 1:
            raise ValueError(f"num_samples is {num_samples}; it must be at least 1")
        if not scale > 0:
            raise ValueError(f"scale is {scale}; it must be above 0: 10 where the judge is asked for 0 to 10")
        self.engine = engine
        self.num_samples = num_samples
        self.sampling = sampling or SamplingParams(max_new_tokens=16, temperature=0.0)
        self.scale = scale

    def __call__(self, questions: Sequence[str]) -> list[float | Exception]:
        """See ``Judge``."""
        groups = self.engine.generate(list(questions), self.num_samples, self.sampling) if questions else []
        if len(groups) != len(questions):
            raise ValueError(f"the judge answered {len(groups)} of {len(questions)} questions")
        return [self._verdict([sample.text for sample in group]) for group in groups]

    def _verdict(self, texts: Sequence[str]) -> float | Exception:
        found = [verdict for verdict in (read_verdict(text, self.scale) for text in texts) if verdict is not None]
        # Samples without a verdict are ignored as long as there is one.
        if not found:
            said = " ".join(texts[0].split())[:40] if texts else ""
            return ValueError(f"the judge wrote {said!r}: neither yes nor no nor a number from 0 to {self.scale:g}")
        return sum(found) / len(found)


def read_verdict(text: str, scale: float = 1.0) -> float | None:
    """Parses a judge's text into a verdict from 0 to 1; ``None`` if it has none.

    Example:
        >>> read_verdict("Yes, it does."), read_verdict("no"), read_verdict("I give it 7 of 10", scale=10)
        (1.0, 0.0, 0.7)
    """
    match = _VERDICT.match(text)
    if match is not None:
        return float(match["yes"] is not None)
    # Words first: in "Yes, 2 reasons" the number is not the verdict.
    number = _NUMBER.search(text)
    if number is None:
        return None
    verdict = float(number[0]) / scale
    return verdict if 0 <= verdict <= 1 else None


def resolve_judge(judge: Any) -> Judge:
    """Makes a judge of a model's folder or id, an engine, a judge, or ``class_path`` and ``init_args`` of one."""
    if isinstance(judge, Mapping):
        if not isinstance(judge.get("class_path"), str) or set(judge) - {"class_path", "init_args"}:
            raise ValueError(f"judge has the keys {sorted(judge)}: write class_path and init_args, or a model's folder")
        try:
            judge = load_attribute(judge["class_path"])(**(judge.get("init_args") or {}))
        except TypeError as error:
            raise ValueError(f"the init_args of the judge do not fit it: {error}") from error
    if isinstance(judge, str):
        return ModelJudge(judge)
    if callable(getattr(judge, "generate", None)) or not callable(judge):
        return EngineJudge(judge)
    found: Judge = judge
    return found
