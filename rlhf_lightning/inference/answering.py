"""Asks an engine or a strategy for answers to prompts that are known as they were written and as tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from ..models import CompressedContext
from ..sequences import Example
from .candidates import columns_of
from .completion import Completion
from .engine import Engine
from .sampling import SamplingParams
from .specs import build_scorer, build_strategy, strategy_spec
from .strategy import Strategy


def takes_tokens(engine: Any) -> bool:
    """Tells whether an engine takes prompts as token ids; a chat server renders messages itself."""
    inner = getattr(engine, "engine", None)
    return getattr(engine, "api", "completions") == "completions" if inner is None else takes_tokens(inner)


def ask(
    engine: Engine,
    prompts: Sequence[Any],
    encoded: Sequence[Sequence[int]],
    num_samples: int = 1,
    sampling: SamplingParams | None = None,
    *,
    seeds: Sequence[Sequence[int]] | None = None,
    columns: Mapping[str, Sequence[Any]] | None = None,
) -> list[list[Completion]]:
    """Samples completions of prompts; scorers of a strategy read the prompts as written, and their columns.

    Args:
        engine: an engine or a strategy.
        prompts: texts or chat messages.
        encoded: their tokens, which the policy continues.
        num_samples: completions of each prompt.
        sampling: the settings; by default those of the engine.
        seeds: one per prompt and sample.
        columns: further columns of the prompts, such as ``answer``; engines without a scorer do not read them.

    Example:
        >>> ask(engine, ["2+2="], [[5, 9, 5, 7]], columns={"answer": ["4"]})[0][0].text  # doctest: +SKIP
        '4'
    """
    tokens = [list(ids) for ids in encoded] if takes_tokens(engine) else None
    if isinstance(engine, Strategy):
        return engine.generate(prompts, num_samples, sampling, seeds=seeds, columns=columns, encoded=tokens)
    return engine.generate(list(prompts) if tokens is None else tokens, num_samples, sampling, seeds=seeds)


def ask_examples(
    engine: Engine,
    examples: Sequence[Example],
    num_samples: int = 1,
    sampling: SamplingParams | None = None,
    *,
    seeds: Sequence[Sequence[int]] | None = None,
    contexts: Sequence[CompressedContext] | None = None,
) -> list[list[Completion]]:
    """Samples completions of the prompts of examples, as ``ask`` does: their fields are the columns.

    Compressed contexts that they follow are for a ``LocalEngine``.
    """
    tokens = [example.root.tokens.tolist() for example in examples]
    if contexts is not None:
        after: Any = engine
        found: list[list[Completion]] = after.generate(tokens, num_samples, sampling, seeds=seeds, contexts=contexts)
        return found
    prompts = [example.fields.get("prompt", ids) for example, ids in zip(examples, tokens, strict=True)]
    columns = columns_of([example.fields for example in examples])
    return ask(engine, prompts, tokens, num_samples, sampling, seeds=seeds, columns=columns)


def policy_of(engine: Any) -> Any:
    """Returns the engine that a strategy draws from in the end; an engine is its own."""
    return policy_of(engine.engine) if isinstance(engine, Strategy) else engine


class StrategyOption:
    """A strategy as an option of a command, stage or callback: checked at once, its scorers loaded when first used.

    Args:
        spec: as in ``build_strategy``; ``None`` for none: engines then answer themselves.
        scorer: used if the strategy names none.
        own_sampling: whether the strategy may have ``sampling`` of its own, where there is no such option next to it.

    Raises:
        ValueError: there is no such strategy, scorer or option, or ``sampling`` is not read.

    Example:
        >>> StrategyOption("majority_vote").spec
        {'class_path': 'MajorityVote', 'init_args': {}}
        >>> StrategyOption(None).on("engine")
        'engine'
    """

    def __init__(self, spec: Any, scorer: Any = None, *, own_sampling: bool = False) -> None:
        self.spec: dict[str, Any] | None = None
        self._loaded: dict[str, Any] | None = None
        if spec is None:
            return
        try:
            self.spec = strategy_spec(spec, scorer)
        except TypeError as error:  # an option that there is not
            raise ValueError(str(error)) from error
        if "sampling" in self.spec["init_args"] and not own_sampling:
            raise ValueError(
                "strategy.sampling is not read here: write sampling, which is that of the policy's samples"
            )

    def on(self, engine: Any) -> Any:
        """Builds the strategy on an engine; without a strategy, returns the engine."""
        if self.spec is None:
            return engine
        if self._loaded is None:
            self._loaded = _with_scorers(self.spec)
        return build_strategy(self._loaded, engine)

    def sampling(self, engine: Any, plain: SamplingParams) -> SamplingParams:
        """Returns the settings of an answer where only its length is an option: a strategy draws with its own.

        Args:
            engine: as ``on`` returned it.
            plain: the settings without a strategy.
        """
        if not isinstance(engine, Strategy):
            return plain
        return replace(engine.sampling, max_new_tokens=plain.max_new_tokens)


def _with_scorers(spec: Mapping[str, Any]) -> dict[str, Any]:
    """Loads the scorers that a strategy and those within name, so that it can be built on several engines."""
    options = dict(spec["init_args"])
    for name in ("scorer", "value"):
        if options.get(name) is not None:
            options[name] = build_scorer(options[name])
    if options.get("engine") is not None:
        options["engine"] = _with_scorers(options["engine"])
    return {**spec, "init_args": options}
