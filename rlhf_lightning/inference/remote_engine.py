"""Samples completions from a model that another process serves over the OpenAI protocol."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any, Final, Literal, get_args

from ..data.chat_template import ChatTemplate
from ..data.text_tokens import opening_tokens
from ..utils.messages import did_you_mean, one_line
from .completion import Completion, FinishReason, readable
from .engine import Prompts
from .http_client import Endpoint, ServerError, in_parallel, read_api_key
from .remote_answers import UnusableError, before_stop, spoken_tokens
from .sample_numbers import new_token_limits, sample_seeds
from .sampling import SamplingParams

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Messages = Sequence[Mapping[str, Any]]
Api = Literal["completions", "chat"]
Dialect = Literal["vllm", "openai"]
ServerLogprobs = Literal["model", "sampling"]

_PATHS: Final[dict[str, str]] = {"completions": "completions", "chat": "chat/completions"}
_STOPPED: Final = ("stop", "tool_calls", "function_call")
# Servers differ in the width of seeds; all of them take 31 bits.
_SEED_MASK: Final = (1 << 31) - 1
_ROUNDING: Final = 1e-4  # a log-probability of 0 may come out above it by this much


class RemoteEngine:
    """Samples from a server of the OpenAI protocol, such as vLLM in its own environment.

    The same protocol as ``LocalEngine``, for models too large for this process: sampling stages, judges, step labels,
    evaluation. One request per sample, each with its own seed, so that a sample depends on its prompt, the settings and
    its seed (as far as the server honours seeds) and not on how many are drawn with it; equal prompts share their
    prefix in the server's cache. Greedy samples are asked for once.

    A server does not return all fields of a sample. ``token_ids`` are filled if it returns them (vLLM does) and empty
    otherwise. ``logprobs`` are 0 for greedy tokens, filled with ``logprobs=True`` and empty otherwise. vLLM reports
    log-probabilities *before* temperature and filters unless it was started with ``--logprobs-mode
    processed_logprobs``: they equal those of the sampling distribution only at temperature 1 with nothing filtered, and
    other settings are refused unless ``server_logprobs="sampling"`` states that the server was started so.

    Args:
        url: the server, such as ``http://localhost:8000``; an address without a path gets ``/v1``.
        model: its name on the server; ``None`` takes the only one that it serves.
        tokenizer: the model's; needed with ``text_prompts``. With it, the first token that the server puts before
            every text is removed from texts that contain it already (rendered chats), and the end tokens of the chat
            template also end a sample (``vllm``).
        api: ``completions`` continues text or token ids; ``chat`` answers text (one user message) or lists of messages,
            with the server's chat template.
        dialect: ``vllm`` sends every sampling setting, because vLLM takes missing ones from the model's own
            ``generation_config.json``; ``openai`` sends standard fields only and refuses settings that need others.
        logprobs: request log-probabilities, and refuse answers without them.
        server_logprobs: distribution of the server's log-probabilities: the unmodified ``model``, or ``sampling``.
        text_prompts: send token ids as their text, for servers that take no ids (``transformers serve``); ids that do
            not survive the round trip are refused.
        api_key_variable: the environment variable that holds the key; ``None`` sends none.
        max_concurrency: requests at once, at least 1.
        timeout: seconds without a byte after which a request is given up.
        max_retries: further attempts of a request, at least 0.
        backoff: seconds before the second attempt, doubled each time up to half a minute.
        extra_body: further fields of every request, which override all others.

    Raises:
        ValueError: for a name or number that is not allowed, or a variable that is not set.

    Example:
        >>> engine = RemoteEngine("http://localhost:8000", model="Qwen/Qwen3-8B")
        >>> engine.generate(["2+2="], sampling=SamplingParams(temperature=0.0))[0][0].text  # doctest: +SKIP
        '4'
    """

    def __init__(
        self,
        url: str,
        model: str | None = None,
        *,
        tokenizer: PreTrainedTokenizerBase | None = None,
        api: Api = "completions",
        dialect: Dialect = "vllm",
        logprobs: bool = False,
        server_logprobs: ServerLogprobs = "model",
        text_prompts: bool = False,
        api_key_variable: str | None = None,
        max_concurrency: int = 16,
        timeout: float = 600.0,
        max_retries: int = 4,
        backoff: float = 0.5,
        extra_body: Mapping[str, Any] | None = None,
    ) -> None:
        for name, value, allowed in (
            ("api", api, get_args(Api)),
            ("dialect", dialect, get_args(Dialect)),
            ("server_logprobs", server_logprobs, get_args(ServerLogprobs)),
        ):
            if value not in allowed:
                raise ValueError(f"{name}={value!r} is not allowed: use one of {', '.join(allowed)}")
        if max_concurrency < 1:
            raise ValueError(f"max_concurrency={max_concurrency} is not allowed: it must be at least 1; 16 is usual")
        if text_prompts and tokenizer is None:
            raise ValueError("text_prompts needs the tokenizer that token ids are turned into text with: give it one")
        # Read from the environment, so that no config or record holds the key.
        key = read_api_key(api_key_variable)
        self.endpoint = Endpoint(url, api_key=key, timeout=timeout, max_retries=max_retries, backoff=backoff)
        self.model = model
        self.tokenizer = tokenizer
        self.api = api
        self.dialect = dialect
        self.logprobs = logprobs
        self.server_logprobs = server_logprobs
        self.text_prompts = text_prompts
        self.max_concurrency = max_concurrency
        self.extra_body = dict(extra_body or {})

    def generate(
        self,
        prompts: Prompts | Sequence[Messages],
        num_samples: int = 1,
        sampling: SamplingParams | None = None,
        *,
        seeds: Sequence[Sequence[int]] | None = None,
        limits: Sequence[int] | None = None,
    ) -> list[list[Completion]]:
        """Samples completions of prompts; ``LocalEngine.generate`` documents the arguments.

        Prompts are strings; token ids (``api="completions"``); or lists of messages (``api="chat"``).

        Raises:
            ServerError: the server is unreachable, refuses, fails, or omits a needed field; a ``ValueError``.
            ValueError: a prompt or setting that this server does not support.
        """
        params = sampling or SamplingParams()
        if num_samples < 1:
            raise ValueError(f"num_samples={num_samples} is not allowed: it must be at least 1")
        self._check_logprobs(params)
        numbered_prompts: Any = enumerate(prompts)
        written = [self._prompt(number, prompt) for number, prompt in numbered_prompts]
        numbered = sample_seeds(seeds, len(written), num_samples, params)
        most = new_token_limits(limits, len(written), params)
        if not written:
            return []

        # One request per sample, with its own seed; equal greedy samples are requested once and repeated below.
        settings = {"model": self._model(), **self._settings(params), **self.extra_body}
        distinct = 1 if params.greedy else num_samples
        bodies = [
            {**prompt, **({} if params.greedy else {"seed": seed & _SEED_MASK}), "max_tokens": limit, **settings}
            for prompt, row, limit in zip(written, numbered, most, strict=True)
            for seed in row[:distinct]
        ]
        # A missing model is the one error worth another request: its message then lists those served.
        stopped = threading.Event()
        try:
            samples = in_parallel(
                lambda body: self._sample(body, params, stopped), bodies, self.max_concurrency, stopped
            )
        except ServerError as error:
            raise self._without_model(error, settings) if error.status == 404 else error from None
        grouped = [samples[first : first + distinct] for first in range(0, len(samples), distinct)]
        return [group * (num_samples // distinct) for group in grouped]

    def _check_logprobs(self, params: SamplingParams) -> None:
        """Refuses settings under which the server's log-probabilities would be of another distribution."""
        if _unmodified(params) or params.greedy:
            return
        advice = "use temperature 1 without top_k, top_p, min_p, repetition_penalty and min_new_tokens"
        if self.logprobs and self.server_logprobs == "model":
            raise ValueError(
                "logprobs of the sampling distribution are not available from a server that reports the unmodified "
                f"model's: {advice}, or start vLLM with --logprobs-mode processed_logprobs and set "
                "server_logprobs='sampling'"
            )
        if params.model_logprobs and self.server_logprobs == "sampling":
            raise ValueError(
                "model_logprobs are not available from a server that reports those of the sampling distribution: "
                f"{advice}"
            )

    def _prompt(self, number: int, prompt: str | Sequence[int] | Messages) -> dict[str, Any]:
        """The request field of a prompt."""
        if not prompt:
            raise ValueError(f"prompt {number} is empty: write something to be completed")
        if isinstance(prompt, str):
            if self.api == "chat":
                return {"messages": [{"role": "user", "content": prompt}]}
            return {"prompt": self._opened_once(prompt)}
        items: list[Any] = list(prompt)
        messages = all(isinstance(item, Mapping) for item in items)
        if messages != (self.api == "chat"):
            has, wants = ("messages", "completions") if messages else ("token ids", "chat")
            other = "chat" if messages else "completions"
            raise ValueError(f"prompt {number} has {has}, which api={wants!r} does not take: use api={other!r}")
        if messages:
            return {"messages": [dict(item) for item in items]}
        tokens = [int(item) for item in items]
        return {"prompt": self._as_text(number, tokens) if self.text_prompts else tokens}

    def _opened_once(self, prompt: str) -> str:
        """Removes the first token from a text that has it already (a rendered chat): the server adds it."""
        if self.tokenizer is None:
            return prompt
        opening: Any = self.tokenizer.convert_ids_to_tokens(opening_tokens(self.tokenizer))
        return prompt.removeprefix("".join(opening)) or prompt

    def _as_text(self, number: int, tokens: list[int]) -> str:
        tokenizer: Any = self.tokenizer
        # The server adds the tokens that the tokenizer puts before every text.
        opening = opening_tokens(tokenizer)
        for start in (len(opening) if tokens[: len(opening)] == opening else 0, 0):
            text = str(tokenizer.decode(tokens[start:], clean_up_tokenization_spaces=False))
            if list(tokenizer(text)["input_ids"]) == tokens:
                return text
        raise ValueError(
            f"prompt {number} does not come back from its text {one_line(text, 60)!r} as the same tokens: use a server "
            "that takes token ids, without text_prompts"
        )

    def _settings(self, params: SamplingParams) -> dict[str, Any]:
        """The request fields that do not depend on the prompt."""
        body: dict[str, Any] = {"temperature": params.temperature}
        extensions = {
            "top_k": (params.top_k or -1, -1),
            "min_p": (params.min_p, 0.0),
            "repetition_penalty": (params.repetition_penalty, 1.0),
            "stop_token_ids": (sorted({*params.stop_token_ids, *self._template_ends()}), []),
            "min_tokens": (params.min_new_tokens, 0),
        }
        if self.dialect == "vllm":
            body |= {"top_p": params.top_p, "return_token_ids": True}
            body |= {name: value for name, (value, _) in extensions.items()}
        else:
            needed = [name for name, (value, neutral) in extensions.items() if value != neutral]
            if needed:
                raise ValueError(
                    f"dialect='openai' has no {' and no '.join(needed)}: use dialect='vllm' where the server takes such"
                    " fields, or leave it at its default"
                )
            body |= {"top_p": params.top_p} if params.top_p != 1 else {}
        if params.stop:
            body["stop"] = list(params.stop)
        if self._wants_logprobs(params):
            body["logprobs"] = True if self.api == "chat" else 1
            body |= {"return_tokens_as_token_ids": True} if self.dialect == "vllm" else {}
        return body

    @cached_property
    def end_token_ids(self) -> frozenset[int]:
        """The tokenizer's end-of-sequence token, and the tokens that end a turn of its chat template."""
        tokenizer: Any = self.tokenizer
        if tokenizer is None:
            return frozenset()
        own = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
        return frozenset([*own, *ChatTemplate(tokenizer).end_tokens()])

    def _template_ends(self) -> list[int]:
        """Tokens that end a turn besides the end-of-sequence token, which the server does not know of."""
        if self.tokenizer is None or self.dialect != "vllm" or self.api == "chat":
            return []
        return sorted(self.end_token_ids - {self.tokenizer.eos_token_id})

    def _wants_logprobs(self, params: SamplingParams) -> bool:
        return params.model_logprobs or (self.logprobs and not params.greedy)

    def longest_prompt(self, sampling: SamplingParams) -> int | None:
        """Maximum number of tokens of a prompt; ``None`` if the server does not report it (vLLM does).

        vLLM refuses a request whose new tokens might not fit, however few of them are needed.
        """
        positions = self.num_positions()
        return None if positions is None else max(positions - sampling.max_new_tokens, 0)

    def num_positions(self) -> int | None:
        """Maximum number of tokens of a prompt with its completion; ``None`` if the server does not report it."""
        try:
            listed = self._listed()
        except ServerError as error:
            if error.status is None:  # no server answers
                raise
            return None
        own = [model for model in listed if self.model in (None, model["id"])]
        length = own[0].get("max_model_len") if len(own) == 1 else None
        return length if isinstance(length, int) else None

    def served_model(self) -> dict[str, Any]:
        """Identifies the model on the server: its name, and the path of that name if the server reports it.

        Raises:
            ServerError: no server answers, or it serves several models and none was chosen.
        """
        name = self._model()
        try:
            found = next((model for model in self._listed() if model["id"] == name), {})
        except ServerError as error:
            if error.status is None:  # no server answers
                raise
            found = {}
        return {"id": name, "root": found.get("root")}

    def _model(self) -> str:
        if self.model is None:
            names = self._served()
            if len(names) != 1:
                listed = ", ".join(names) or "none"
                raise ServerError(f"the server at {self.endpoint.url} serves {listed}: say which with model")
            self.model = names[0]
        return self.model

    def _served(self) -> list[str]:
        return [str(model["id"]) for model in self._listed()]

    def _listed(self) -> list[dict[str, Any]]:
        listed = self.endpoint.get("models").get("data")
        models = listed if isinstance(listed, list) else []
        return [model for model in models if isinstance(model, dict) and "id" in model]

    def _sample(self, body: Mapping[str, Any], params: SamplingParams, stopped: threading.Event) -> Completion:
        answer = self.endpoint.post(_PATHS[self.api], body, stopped)
        try:
            choice = answer["choices"][0]
            text = choice["message"].get("content") if self.api == "chat" else choice["text"]
            ended, spoken = choice.get("finish_reason"), spoken_tokens(choice, self.api)
        except UnusableError as error:
            raise ServerError(f"the server at {self.endpoint.url} {error}") from None
        except (KeyError, IndexError, TypeError, AttributeError, ValueError):
            raise ServerError(
                f"the server at {self.endpoint.url} answers without the choices of api={self.api!r}: "
                f"{one_line(answer, 120)}"
            ) from None
        if ended != "length" and ended not in _STOPPED:
            raise ServerError(f"the server at {self.endpoint.url} ended a completion by {ended!r}, not stop or length")
        finish: FinishReason = "length" if ended == "length" else "stop"
        token_ids, logprobs = spoken
        sampled, of_model = self._logprobs(token_ids, logprobs, params)
        return Completion(token_ids, before_stop(readable(str(text or "")), params), sampled, finish, of_model)

    def _logprobs(
        self, token_ids: list[int], logprobs: list[float] | None, params: SamplingParams
    ) -> tuple[list[float], list[float] | None]:
        """Log-probabilities per token under the sampling distribution, and under the model."""
        if not self._wants_logprobs(params):
            return [0.0] * len(token_ids) if params.greedy else [], None
        if logprobs is None:
            raise ServerError(
                f"the server at {self.endpoint.url} returns no log-probabilities, which are needed here: use one that "
                "does, such as vLLM, or run without logprobs and model_logprobs"
            )
        if (token_ids and len(token_ids) != len(logprobs)) or not all(value <= _ROUNDING for value in logprobs):
            raise ServerError(
                f"the server at {self.endpoint.url} returns {len(logprobs)} log-probabilities for {len(token_ids)} "
                f"tokens, or some that are not numbers of at most 0: {one_line(logprobs, 80)}"
            )
        logprobs = [min(value, 0.0) for value in logprobs]
        # A greedy draw is certain.
        sampled = [0.0] * len(logprobs) if params.greedy else logprobs if self.logprobs else []
        return sampled, logprobs if params.model_logprobs else None

    def _without_model(self, error: ServerError, body: Mapping[str, Any]) -> ServerError:
        """Replaces the error by one that lists the served models, if the requested one is not among them."""
        try:
            names = self._served()
        except ServerError:
            return error
        wanted = str(body["model"])
        if wanted in names or not names:
            return error
        return ServerError(
            f"the server at {self.endpoint.url} has no model {wanted!r}: it serves {', '.join(names)}"
            f"{did_you_mean(wanted, names)}",
            error.status,
        )


def _unmodified(params: SamplingParams) -> bool:
    """Whether the sampling distribution is the model's own."""
    neutral = (1.0, 0, 1.0, 0.0, 1.0, 0)
    return neutral == (
        params.temperature,
        params.top_k,
        params.top_p,
        params.min_p,
        params.repetition_penalty,
        params.min_new_tokens,
    )
