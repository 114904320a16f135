"""Options of ``generate`` and ``chat``, and the engine or strategy that they describe."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from inspect import signature
from typing import Any, Literal

import torch

from ..inference import RemoteEngine, SamplingParams
from ..inference.answering import StrategyOption
from ..inference.policies import PolicySpec, build_policy, check_single, policy_spec, policy_tokenizer
from ..inference.speculation import parse_speculation
from ..inference.stores import CACHES, CacheKind
from ..utils.messages import did_you_mean
from ..utils.validation import check_choice, check_count

Dtype = Literal["auto", "float32", "bfloat16", "float16", "float64"]


@dataclass(frozen=True, kw_only=True)
class EngineOptions:
    """A model that samples, in this process or on a server, and a strategy that searches with it.

    Args:
        model: folder or hub id of a model or an adapter; with server, of its tokenizer. Several sample as one: a list,
            or class_path EnsemblePolicy with init_args models, combine and weights.
        adapter: folder or hub id of an adapter to put on the model.
        strategy: how an answer is chosen: a class name such as mcts or best_of_n, or class_path and init_args; its
            options follow as --strategy.simulations=32 or --strategy.budget.tokens=4096.
        scorer: what the strategy chooses by: a reward model's folder, a reward function's dotted path, a class name, or
            class_path and init_args; its options follow as --scorer.aggregation=min.
        sampling: settings of every sample, without a seed.
        chat_template_kwargs: passed to the chat template.
        seed: every sample is a function of this, the number of its prompt and its own.
        cache: of keys and values: dynamic, static, paged or int8.
        speculation: ngram, or a mapping with draft (a folder) or early_exit (a number of layers).
        max_batch_tokens: tokens of cache held at once, at least 1; affects memory, not results.
        dtype: of the weights; auto is bfloat16 on a GPU, else float32.
        device: where the model runs; by default a GPU if there is one.
        server: options of RemoteEngine, such as url, for a server in place of a model in this process.
    """

    model: PolicySpec
    adapter: str | None = None
    strategy: str | dict[str, Any] | None = None
    scorer: str | dict[str, Any] | None = None
    sampling: SamplingParams = field(default_factory=SamplingParams)
    chat_template_kwargs: dict[str, Any] = field(default_factory=dict)
    seed: int = 0
    cache: CacheKind = "dynamic"
    speculation: str | dict[str, Any] | None = None
    max_batch_tokens: int = 65536
    dtype: Dtype = "auto"
    device: str | None = None
    server: dict[str, Any] | None = None

    def check(self) -> None:
        """Checks the options before anything is loaded.

        Raises:
            ValueError: naming the option, its value and what is allowed.
        """
        if self.sampling.seed is not None:
            raise ValueError(f"sampling.seed is {self.sampling.seed}: write seed, which is that of all samples")
        check_choice("cache", self.cache, CACHES)
        self._check_model()
        check_count("max_batch_tokens", self.max_batch_tokens, "65536 is a good start; lower it to save memory")
        if self.speculation is not None:
            parse_speculation(self.speculation)
        if self.server is not None:
            remote_engine(self.server | {"text_prompts": False}, None)  # the tokenizer comes later
            if self.adapter is not None:
                raise ValueError(f"adapter is {self.adapter!r}, which a server does not read: leave it out")
        self.strategy_spec()

    def _check_model(self) -> None:
        """Refuses options of one model where several sample as one."""
        if isinstance(policy_spec(self.model), str):
            return
        if self.server is not None:
            check_single(self.model, "model", "and a server samples from one: name one, whose tokenizer is read")
        if self.adapter is not None:
            raise ValueError(f"adapter is {self.adapter!r}, and model is an ensemble: list the adapter's folder in it")
        if self.speculation is not None:
            raise ValueError(f"speculation is {self.speculation!r}, and an ensemble draws token by token: leave it out")
        usual = type(self).cache
        if self.cache != usual:
            raise ValueError(f"cache is {self.cache!r}, and each model of an ensemble has a dynamic one: leave it out")

    def strategy_spec(self) -> dict[str, Any] | None:
        """Returns the strategy in full, its scorer included; ``None`` without one.

        Raises:
            ValueError: there is no such strategy, scorer or option, or a scorer without a strategy.
        """
        if self.strategy is None:
            if self.scorer is not None:
                raise ValueError(
                    f"scorer is {self.scorer!r}, and no strategy chooses by it: add one, such as strategy best_of_n"
                )
            return None
        own = None if isinstance(self.strategy, str) else (self.strategy.get("init_args") or {}).get("scorer")
        if self.scorer is not None and own is not None:
            raise ValueError(
                f"scorer is {self.scorer!r}, and the strategy has the scorer {own!r}: leave one of them out"
            )
        return StrategyOption(self.strategy, self.scorer).spec

    def engine(self) -> Any:
        """Loads the model, or finds its server, and builds the strategy on it.

        Raises:
            ValueError: something cannot be loaded, or an option does not fit it.
        """
        self.strategy_spec()
        engine: Any
        if self.server is not None:
            engine = remote_engine(self.server, policy_tokenizer(self.model))
        else:
            single = {"adapter": self.adapter, "cache": self.cache, "speculation": self.speculation}
            engine = build_policy(
                self.model,
                dtype=self.dtype,
                device=self.device or _own_device(),
                max_batch_tokens=self.max_batch_tokens,
                **(single if isinstance(self.model, str) else {}),
            )
        return StrategyOption(self.strategy, self.scorer).on(engine)

    def plain(self) -> dict[str, Any]:
        """Returns the options as plain values, the strategy in full."""
        found: dict[str, Any] = {option.name: getattr(self, option.name) for option in fields(self)}
        sampling = {option.name: getattr(self.sampling, option.name) for option in fields(self.sampling)}
        written = {"model": policy_spec(self.model), "strategy": self.strategy_spec(), "scorer": None}
        return found | written | {"sampling": sampling}


@dataclass(frozen=True, kw_only=True)
class GenerateOptions(EngineOptions):
    """Options of ``generate``.

    Args:
        model: folder or hub id of a model or an adapter; with server, of its tokenizer. Several sample as one: a list,
            or class_path EnsemblePolicy with init_args models, combine and weights.
        prompts: a source of PromptDataModule: a file, folder, hub id or task such as sums:prompts?rows=100.
        prompt: one prompt as text, instead.
        output: a JSON Lines file, which the same command continues; without it rows are printed.
        num_samples: answers to each prompt, at least 1.
        candidates: whether rows also hold all solutions that a strategy found, with their scores.
        chat: text prompts are a user's message in the model's chat template.
        limit: number of prompts to read, at least 1; all by default.
        columns: new name of a column -> its name in the rows, such as '{prompt: question}'.
        prompts_at_once: prompts that are worked on together, at least 1; affects no result. An interruption loses
            what was begun of these.
        adapter: folder or hub id of an adapter to put on the model.
        strategy: how an answer is chosen: a class name such as mcts or best_of_n, or class_path and init_args; its
            options follow as --strategy.simulations=32 or --strategy.budget.tokens=4096.
        scorer: what the strategy chooses by: a reward model's folder, a reward function's dotted path, a class name, or
            class_path and init_args; its options follow as --scorer.aggregation=min.
        sampling: settings of every sample, without a seed.
        chat_template_kwargs: passed to the chat template; the rows' own take precedence.
        seed: every sample is a function of this, the number of its prompt and its own.
        cache: of keys and values: dynamic, static, paged or int8.
        speculation: ngram, or a mapping with draft (a folder) or early_exit (a number of layers).
        max_batch_tokens: tokens of cache held at once, at least 1; affects memory, not results.
        dtype: of the weights; auto is bfloat16 on a GPU, else float32.
        device: where the model runs; by default a GPU if there is one.
        server: options of RemoteEngine, such as url, for a server in place of a model in this process.
    """

    prompts: str | list[str] | None = None
    prompt: str | None = None
    output: str | None = None
    num_samples: int = 1
    candidates: bool = False
    chat: bool = False
    limit: int | None = None
    columns: dict[str, str] = field(default_factory=dict)
    prompts_at_once: int = 64

    def check(self) -> None:
        """Checks the options before anything is loaded."""
        super().check()
        if (self.prompts is None) == (self.prompt is None):
            raise ValueError("one of prompts (a file) and prompt (a text) must be given: pass --prompts or --prompt")
        for name, advice in (("num_samples", "1 is usual"), ("prompts_at_once", "64 is usual")):
            check_count(name, getattr(self, name), advice)
        if self.limit is not None:
            check_count("limit", self.limit, "leave it out to read all prompts")
        if self.candidates and self.strategy is None:
            raise ValueError("candidates are found by a strategy: add one, or write num_samples for several answers")
        if self.num_samples > 1 and self.sampling.greedy:
            raise ValueError(
                f"num_samples is {self.num_samples} with sampling.temperature 0, which makes all of a prompt's samples "
                "equal: use num_samples 1, or a temperature above 0"
            )


@dataclass(frozen=True, kw_only=True)
class ChatOptions(EngineOptions):
    """Options of ``chat``.

    Args:
        model: folder or hub id of a model or an adapter; with server, of its tokenizer. Several sample as one: a list,
            or class_path EnsemblePolicy with init_args models, combine and weights.
        system: the system message.
        adapter: folder or hub id of an adapter to put on the model.
        strategy: how an answer is chosen: a class name such as mcts or best_of_n, or class_path and init_args; its
            options follow as --strategy.simulations=32 or --strategy.budget.tokens=4096.
        scorer: what the strategy chooses by: a reward model's folder, a reward function's dotted path, a class name, or
            class_path and init_args; its options follow as --scorer.aggregation=min.
        sampling: settings of every sample, without a seed.
        chat_template_kwargs: passed to the chat template.
        seed: every answer is a function of this, the number of its turn and the conversation before it.
        cache: of keys and values: dynamic, static, paged or int8; paged finds the conversation again in each turn.
        speculation: ngram, or a mapping with draft (a folder) or early_exit (a number of layers).
        max_batch_tokens: tokens of cache held at once, at least 1; affects memory, not results.
        dtype: of the weights; auto is bfloat16 on a GPU, else float32.
        device: where the model runs; by default a GPU if there is one.
        server: options of RemoteEngine, such as url, for a server in place of a model in this process.
    """

    sampling: SamplingParams = field(default_factory=lambda: SamplingParams(max_new_tokens=1024))
    cache: CacheKind = "paged"
    system: str | None = None


def sampling_params(written: dict[str, Any]) -> SamplingParams:
    """Makes sampling settings of a mapping.

    Raises:
        ValueError: for an unknown key or a value out of range.
    """
    allowed = [f.name for f in fields(SamplingParams) if f.name != "seed"]
    for key in written:
        if key not in allowed:
            raise ValueError(f"sampling has no key {key!r}{did_you_mean(str(key), allowed)}")
    try:
        return SamplingParams(**written)
    except TypeError as error:  # a text where a number belongs
        raise ValueError(f"sampling is {written!r}; one of its values has the wrong type: {error}") from error


def remote_engine(written: Mapping[str, Any], tokenizer: Any) -> RemoteEngine:
    """Makes a server's engine of a mapping.

    Raises:
        ValueError: for an unknown key or a value out of range.
    """
    allowed = [name for name in signature(RemoteEngine).parameters if name != "tokenizer"]
    for key in written:
        if key not in allowed:
            raise ValueError(f"server has no key {key!r}{did_you_mean(str(key), allowed)}")
    if "url" not in written:
        raise ValueError("server has no url: write where it listens, such as url: http://localhost:8000")
    return RemoteEngine(**written, tokenizer=tokenizer)


def _own_device() -> str | None:
    """The GPU of this rank, where a launcher has started several."""
    rank = os.environ.get("LOCAL_RANK", "")
    return f"cuda:{rank}" if rank.isdecimal() and torch.cuda.is_available() else None
