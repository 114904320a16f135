"""Limits of the eight methods, the head and a decoding step on a GPU, with their earlier costs.

``python -m tests.budgets`` prints the table. Operators are those of tiny models of two layers, in ``bf16-mixed`` unless
the name of a line says otherwise: a limit is for the launches that each layer, method and head adds, not for time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

from . import measure

EIGHT = ("sft", "reward", "process", "dpo", "simpo", "kto", "grpo", "ppo")


class Budget(NamedTuple):
    """One line of the table.

    Args:
        what: what is counted.
        before: the count when counting began.
        limit: the most that it may be.
        count: counts it.
    """

    what: str
    before: float
    limit: float
    count: Callable[[], float]


class _Method(NamedTuple):
    """Counts before, and limits of counts that methods differ in."""

    before: tuple[int, int, int, int, int]  # a micro-batch's operators, copies, waits; a step's copies and waits
    operators: int
    waits: int = 1


# A step reads the device once: for its gradient's norm and its rows. KTO reads its estimate before the first loss, and
# GRPO and PPO read log-probs of samples, once per iteration. Their micro-batches are packed twice: for these, and for
# the step.
_METHODS = {
    "sft": _Method((413, 17, 17, 0, 1), 405),
    "reward": _Method((418, 20, 20, 2, 4), 415),
    "process": _Method((494, 19, 25, 0, 5), 480),
    "dpo": _Method((600, 17, 18, 0, 1), 580),
    "simpo": _Method((453, 17, 18, 0, 1), 445),
    "kto": _Method((722, 65, 69, 0, 14), 680, waits=2),
    "grpo": _Method((838, 35, 36, 10, 33), 830, waits=2),
    "ppo": _Method((924, 39, 39, 9, 44), 905, waits=2),
}
COPIES = 2  # to the device, per micro-batch
LAYER = 1.3  # of the model's own layer
HEAD = 60  # operators per chunk of the head, in both passes
READS_PER_TOKEN = 1  # copies to the host, per decoding step
# With other caches: copies per token, to the host and to the device. A static one is looked into every eighth step; the
# pages of four rows go to the device when a row begins one, every 16 tokens.
CACHES = {"static": (1 / 8, 0.0), "paged": (1.0, 2 / 16), "int8": (1.0, 0.0)}


def of_method(name: str) -> Iterator[Budget]:
    """The lines of a method."""
    before, operators, waits = _METHODS[name]

    def counted(part: str, what: str) -> Callable[[], float]:
        return lambda: getattr(measure.costs(name), part).totals[what]

    yield Budget(f"{name}: operators per micro-batch", before[0], operators, counted("micro_batch", "operators"))
    yield Budget(f"{name}: copies to the device per micro-batch", before[1], COPIES, counted("micro_batch", "uploads"))
    yield Budget(f"{name}: waits per micro-batch", before[2], 0, counted("micro_batch", "waits"))
    yield Budget(f"{name}: attention masks per micro-batch", 0, 0, counted("micro_batch", "masks"))
    yield Budget(f"{name}: copies to the device per step", before[3], 0, counted("step", "uploads"))
    yield Budget(f"{name}: waits per step", before[4], waits, counted("step", "waits"))


def of_padded() -> Iterator[Budget]:
    """The lines of the padded layout, whose layers make masks."""

    def counted(what: str) -> float:
        return measure.costs("dpo", layout="padded").micro_batch.totals[what]

    yield Budget("dpo, padded: copies to the device per micro-batch", 24, COPIES, partial(counted, "uploads"))
    yield Budget("dpo, padded: waits per micro-batch", 35, 0, partial(counted, "waits"))


def of_validation() -> Iterator[Budget]:
    """The lines of validation, whose rows are read when the epoch ends."""

    def counted(part: str, what: str) -> float:
        return getattr(measure.validation("simpo"), part).totals[what]  # type: ignore[no-any-return]

    yield Budget(
        "simpo, validation: copies to the device per batch", 18, COPIES, partial(counted, "micro_batch", "uploads")
    )
    yield Budget("simpo, validation: waits per batch", 19, 0, partial(counted, "micro_batch", "waits"))
    yield Budget("simpo, validation: waits per epoch", 38, 1, partial(counted, "step", "waits"))


def of_weights() -> Iterator[Budget]:
    """The lines of casts of weights, in bytes per weight of the policy's linear layers; one cast is 6 bytes."""

    def cast(part: str, name: str, **options: Any) -> float:
        return getattr(measure.costs(name, **options), part).totals["casts"] / measure.num_weights()  # type: ignore[no-any-return]

    for name, before in (("sft", 6), ("dpo", 12), ("grpo", 12)):
        yield Budget(f"{name}: casts of weights per micro-batch", before, 0, partial(cast, "micro_batch", name))
        # GRPO's samples have log-probs before the step.
        limit = 12 if name == "grpo" else 6
        yield Budget(f"{name}: casts of weights per step", 0, limit, partial(cast, "step", name))
    yield Budget("dpo with lora: casts per micro-batch", 12.34, 0, partial(cast, "micro_batch", "dpo", lora=True))
    yield Budget("dpo with lora: casts per step", 0, 1, partial(cast, "step", "dpo", lora=True))
    again = {"gradient_checkpointing": True}
    yield Budget("dpo, recomputed: casts per micro-batch", 17.63, 12, partial(cast, "micro_batch", "dpo", **again))

    def sampled() -> float:
        return measure.decoding_step(precision="bf16-mixed").totals["casts"] / measure.num_weights()

    yield Budget("decoding in bf16-mixed: casts per token", 5.625, 0, sampled)


def of_layers() -> Iterator[Budget]:
    """The lines of a decoder layer, relative to the model's own padded one, in bf16-true."""

    def relative(name: str, forwards: int) -> float:
        own = measure.own_layer().totals["operators"]
        own += forwards * measure.own_layer(backward=False).totals["operators"]
        return measure.layer(name).totals["operators"] / own

    yield Budget("sft: operators of a layer / the model's own", 1.0, LAYER, partial(relative, "sft", 0))
    yield Budget("dpo: operators of a layer / the model's own", 1.11, LAYER, partial(relative, "dpo", 1))


def of_head() -> Iterator[Budget]:
    """The lines of the head."""

    def counted(**asked: bool) -> float:
        return measure.head_chunk(**asked).totals["operators"]

    yield Budget("head: operators per chunk", 16, HEAD, counted)
    yield Budget("head with entropy: operators per chunk", 20, HEAD, partial(counted, entropy=True))
    everything = {"entropy": True, "mean": True, "power": True}
    yield Budget("head with all statistics: operators per chunk", 22, HEAD, partial(counted, **everything))


def of_decoding() -> Iterator[Budget]:
    """The lines of a decoding step, in bf16-true."""

    def counted(what: str) -> float:
        return measure.decoding_step().totals[what]

    yield Budget(
        "decoding: operators of a layer per token", 40, 40, lambda: measure.decoding_layer().totals["operators"]
    )
    yield Budget("decoding: copies to the host per token", 3, READS_PER_TOKEN, partial(counted, "reads"))
    yield Budget("decoding: copies to the device per token", 3, 0, partial(counted, "uploads"))
    yield Budget("decoding: waits per token", 6, READS_PER_TOKEN, partial(counted, "waits"))


def of_cache(kind: str) -> Iterator[Budget]:
    """The lines of a decoding step with a cache other than the dynamic one, in bf16-true, for rows of two lengths."""

    def counted(what: str) -> float:
        return measure.decoding_with(kind).token.totals[what]

    reads, uploads = CACHES[kind]
    line = partial(f"{kind} cache: {{}} per token".format)
    yield Budget(line("copies to the host"), reads, reads, partial(counted, "reads"))
    yield Budget(line("copies to the device"), uploads, uploads, partial(counted, "uploads"))
    yield Budget(line("waits"), reads, reads, partial(counted, "waits"))
    if kind == "static":
        new = lambda: len(measure.decoding_with(kind).new_shapes)  # noqa: E731
        yield Budget("static cache: shapes that later steps do not share", 0, 0, new)


GROUPS: dict[str, Callable[[], Iterator[Budget]]] = {
    **{name: partial(of_method, name) for name in EIGHT},
    "padded": of_padded,
    "validation": of_validation,
    "weights": of_weights,
    "layers": of_layers,
    "head": of_head,
    "decoding": of_decoding,
    **{f"{kind} cache": partial(of_cache, kind) for kind in CACHES},
}
