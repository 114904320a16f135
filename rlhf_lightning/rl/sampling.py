"""The option ``sampling`` of methods that sample their own completions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from ..inference.sampling import SamplingFilters, SamplingParams
from ..inference.speculation import parse_speculation
from ..utils.validation import check_count


@dataclass(frozen=True, kw_only=True)
class Sampling(SamplingFilters):
    """How completions are sampled, apart from their temperature, number and maximum length.

    With filters (also ``min_new_tokens``), the sampled distribution is not the trained one:
    ``OffPolicyCorrection`` reweights for it.

    Args:
        top_k: keep the ``k`` most likely tokens; 0 keeps all.
        top_p: keep the smallest set of most likely tokens with at least this mass, in (0, 1]; 1 keeps all.
        min_p: keep tokens at least this fraction as likely as the most likely one, in [0, 1]; 0 keeps all.
        repetition_penalty: above 0; lowers scores of tokens that the prompt or completion holds already; 1 for none.
        stop: strings that end a completion, in addition to the end-of-sequence token.
        min_new_tokens: minimum number of tokens of a completion, at least 0.
        generation_batch_tokens: tokens of KV cache in generation, at least 1; affects memory, not results.
        speculation: ``"ngram"``, ``{"draft": folder}``, ``{"early_exit": layers}`` or ``None``, as for ``LocalEngine``;
            affects speed, not results.

    Raises:
        ValueError: an option out of range.

    Example:
        >>> Sampling(top_p=0.9).params(max_completion_length=64, temperature=0.7, seed=0).top_p
        0.9
    """

    generation_batch_tokens: int = 65536
    speculation: Literal["ngram"] | dict[str, Any] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count("sampling.generation_batch_tokens", self.generation_batch_tokens, "65536 is a good start")
        if self.speculation is not None:
            parse_speculation(self.speculation)

    @property
    def engine_options(self) -> dict[str, Any]:
        """The options that ``LocalEngine`` takes, which affect no result."""
        return {"max_batch_tokens": self.generation_batch_tokens, "speculation": self.speculation}

    def params(self, *, max_completion_length: int, temperature: float, seed: int) -> SamplingParams:
        """Returns all settings of the sampler."""
        return SamplingParams(
            top_k=self.top_k,
            top_p=self.top_p,
            min_p=self.min_p,
            repetition_penalty=self.repetition_penalty,
            stop=self.stop,
            min_new_tokens=self.min_new_tokens,
            max_new_tokens=max_completion_length,
            temperature=temperature,
            seed=seed,
        )
