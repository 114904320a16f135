"""EleutherAI's lm-evaluation-harness on an engine: log-likelihoods by packed forwards, completions by the engine."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jinja2.exceptions import TemplateError

from ..inference import LocalEngine, SamplingParams
from ..models.backbone import num_positions
from ..sequences import Example, Segment, SequenceBatch
from ..utils.messages import did_you_mean
from ..utils.validation import check_count
from .logits import batches, log_probs

# Names of the harness's settings of a generation, and ours; of several lengths, the first is taken.
_LENGTHS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
_SETTINGS = {
    "until": "stop",
    **dict.fromkeys(reversed(_LENGTHS), "max_new_tokens"),
    "temperature": "temperature",
    "top_p": "top_p",
    "top_k": "top_k",
    "min_p": "min_p",
    "repetition_penalty": "repetition_penalty",
}


class HarnessModel:
    """Answers the harness's requests: objects whose ``args`` are a context with a continuation, or with settings.

    Tokens and windows are those of the harness's own model of transformers (``HFLM``), so that numbers can be compared:
    a text begins with the tokens that its tokenizer puts there, and the last token of a row, which is predicted and
    never read, needs no position.

    Args:
        engine: with a tokenizer.
        micro_batch_tokens: tokens of a forward, above 0; changes no result.
        max_gen_toks: tokens of a completion whose request does not say.

    Raises:
        ValueError: the engine is not one model in this process, has no tokenizer, or a number is out of its range.
    """

    def __init__(self, engine: LocalEngine, *, micro_batch_tokens: int = 8192, max_gen_toks: int = 256) -> None:
        check_count("micro_batch_tokens", micro_batch_tokens, "8192 is usual")
        check_count("max_gen_toks", max_gen_toks, "256 is usual")
        if not isinstance(engine, LocalEngine):
            raise ValueError(
                f"engine is of class {type(engine).__name__}, and log-likelihoods are those of one model in this "
                "process: give a LocalEngine"
            )
        if engine.tokenizer is None:
            raise ValueError("the engine has no tokenizer, which requests are read with: give it one")
        self.engine = engine
        self.tokenizer: Any = engine.tokenizer
        self.micro_batch_tokens = micro_batch_tokens
        self.max_gen_toks = max_gen_toks

    @property
    def tokenizer_name(self) -> str:
        """Name under which the harness caches requests."""
        return str(self.tokenizer.name_or_path).replace("/", "__")

    def chat_template(self, chat_template: bool | str = False) -> str:
        """Returns the chat template; empty without one."""
        return self.tokenizer.chat_template or "" if chat_template else ""

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """Renders a chat in the model's template; without its system messages where the template refuses them."""

        def render(messages: list[dict[str, str]]) -> str:
            text = self.tokenizer.apply_chat_template(
                messages,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=not add_generation_prompt,
            )
            return str(text)

        try:
            return render(chat_history)
        except TemplateError as error:
            rest = [message for message in chat_history if message["role"] != "system"]
            if len(rest) == len(chat_history):
                raise
            warnings.warn(f"the chat template refuses a system message, which is left out: {error}", stacklevel=2)
            return render(rest)

    def loglikelihood(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Computes the log-likelihood of continuations, and whether each is what greedy decoding would write.

        The tokens are those of context and continuation together; blanks at the end of a context count as the
        continuation's. Contexts that do not fit the model lose their first tokens.

        Args:
            requests: with ``args`` of a context and a continuation.
            disable_tqdm: not read.

        Raises:
            ValueError: a continuation alone does not fit the model.
        """
        return self._scored([self._pair(*request.args) for request in requests])

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Computes the log-likelihood of whole texts, in windows of as many tokens as the model has positions.

        The first token of a window is predicted from the last one before it, that of a text from the first token of
        sequences; the last window begins earlier, so that its tokens are predicted from as many as fit.

        Args:
            requests: with ``args`` of one text.
            disable_tqdm: not read.
        """
        texts = [self._encode(request.args[0]) for request in requests]
        windows: list[tuple[int, list[int], list[int]]] = []
        for number, tokens in enumerate(texts):
            size = num_positions(self.engine.model) or len(tokens)
            whole = [self._first_token, *tokens]
            for start in range(1, len(whole), size):
                part = whole[start : start + size]
                end = start + len(part)
                windows.append((number, whole[max(0, end - size - 1) : start], part))
        found = [0.0] * len(texts)
        scored = self._scored([(context, tokens) for _, context, tokens in windows])
        for (number, _, _), (value, _) in zip(windows, scored, strict=True):
            found[number] += value
        return found

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Completes contexts.

        Args:
            requests: with ``args`` of a context and settings: ``until``, ``max_gen_toks``, ``do_sample``,
                ``temperature``, ``top_p``, ``top_k``, ``min_p``, ``repetition_penalty``. Greedy without ``do_sample``.
            disable_tqdm: not read.

        Raises:
            ValueError: an unknown setting.
        """
        # Requests with the same settings are sampled together.
        groups: dict[SamplingParams, list[int]] = {}
        for number, request in enumerate(requests):
            groups.setdefault(self._params(request.args[1]), []).append(number)
        texts = [""] * len(requests)
        for params, numbers in groups.items():
            prompts = []
            for number in numbers:
                tokens = self._encode(requests[number].args[0]) or [self._first_token]
                positions = num_positions(self.engine.model)
                room = len(tokens) if positions is None else max(1, positions - params.max_new_tokens)
                prompts.append(tokens[-room:])
            for number, group in zip(numbers, self.engine.generate(prompts, 1, params), strict=True):
                texts[number] = group[0].text
        return texts

    def _params(self, given: Mapping[str, Any]) -> SamplingParams:
        settings = {name: value for name, value in given.items() if name != "do_sample" and value is not None}
        lengths = [name for name in _LENGTHS if name in settings]
        settings = {name: value for name, value in settings.items() if name not in lengths[1:]}
        for name in settings:
            if name not in _SETTINGS:
                raise ValueError(f"there is no setting {name!r} of generation{did_you_mean(name, list(_SETTINGS))}")
        options: dict[str, Any] = {"max_new_tokens": self.max_gen_toks, "seed": 0}
        options |= {_SETTINGS[name]: value for name, value in settings.items()}
        options["stop"] = [text for text in _listed(options.get("stop", ())) if text]
        # Without a temperature above 0 nothing is drawn.
        if not given.get("do_sample", float(given.get("temperature") or 0) > 0):
            options["temperature"] = 0.0
        return SamplingParams(**options)

    @property
    def _first_token(self) -> int:
        """The token that a text begins with: the beginning of sequences, or their end if the tokenizer lacks it."""
        first = self.tokenizer.bos_token_id
        return int(self.tokenizer.eos_token_id if first is None else first)

    def _encode(self, text: str, *, begins: bool = True) -> list[int]:
        """Encodes a text, by default with the tokens that the tokenizer puts before one that begins a sequence."""
        # A rendered chat may have them already.
        begins = begins and not text.startswith(self.tokenizer.decode([self._first_token]))
        return list(self.tokenizer(text, add_special_tokens=begins)["input_ids"])

    def _pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        kept = context.rstrip()
        continuation = context[len(kept) :] + continuation
        if not kept:
            tokens = self._encode(continuation, begins=False)
            return ([self._first_token], tokens) if tokens[:1] != [self._first_token] else (tokens[:1], tokens[1:])
        before = self._encode(kept)
        return before, self._encode(kept + continuation)[len(before) :]

    def _scored(self, pairs: Sequence[tuple[list[int], list[int]]]) -> list[tuple[float, bool]]:
        """Scores the tokens of continuations after those of contexts."""
        model = self.engine.model
        positions = num_positions(model)
        found = [(0.0, True)] * len(pairs)
        examples, numbers = [], []
        for number, (context, tokens) in enumerate(pairs):
            if positions is not None and len(tokens) > positions:
                raise ValueError(
                    f"continuation {number} has {len(tokens)} tokens, and the model {positions} positions: shorten it"
                )
            if tokens:
                room = len(context) if positions is None else min(len(context), positions + 1 - len(tokens))
                children = (Segment(tokens, [1.0] * len(tokens)),)
                root = Segment(context[len(context) - room :], children=children)
                examples.append(Example(f"request:{number}", root))
                numbers.append(number)
        device = next(model.parameters()).device
        for micro, batch in batches(examples, self.micro_batch_tokens, device):
            _end_within(batch, positions)
            own = torch.zeros(len(batch.target_ids), dtype=torch.float64, device=device)
            missed = torch.zeros_like(own)
            for part, (logs,) in log_probs([model], batch):
                targets = batch.target_ids[part]
                own[part] = logs.gather(1, targets[:, None])[:, 0].double()
                missed[part] = (logs.argmax(dim=1) != targets).double()
            totals, misses = batch.sum_per_example(own).tolist(), batch.sum_per_example(missed).tolist()
            for n, total, missing in zip(micro, totals, misses, strict=True):
                found[numbers[n]] = (total, missing == 0)
        return found


def _end_within(batch: SequenceBatch, positions: int | None) -> None:
    """Lets rows have one token more than positions: nothing is predicted from their last, so any position will do."""
    if positions is not None and int(batch.host["lengths"].max()) > positions:
        for position_ids in (batch.position_ids, batch.padded().position_ids):
            position_ids.clamp_(max=positions - 1)


def _listed(stops: str | Sequence[str]) -> Sequence[str]:
    return [stops] if isinstance(stops, str) else stops


def harness_model(engine: LocalEngine, **options: Any) -> Any:
    """Makes a model that the harness takes.

    Args:
        engine: with a tokenizer.
        options: those of ``HarnessModel``.

    Raises:
        ModuleNotFoundError: the harness is not installed.

    Example::

        import lm_eval

        engine = LocalEngine.from_pretrained("runs/dpo/model")
        print(lm_eval.simple_evaluate(harness_model(engine), tasks=["hellaswag"], limit=100)["results"])
    """
    try:
        from lm_eval.api.model import LM
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "the harness is not installed: pip install 'rlhf-lightning[harness]'", name=error.name
        ) from error

    class EngineLM(HarnessModel, LM):  # type: ignore[misc]
        """A model of the harness on an engine."""

        def __init__(self) -> None:
            LM.__init__(self)
            HarnessModel.__init__(self, engine, **options)

    return EngineLM()
