"""``rlhf-lightning memory``: prints what a micro-batch of a run takes on a device, and what would fit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from lightning.pytorch.cli import LightningArgumentParser

from ..cli import PostTrainingCLI
from ..utils.imports import find_own_modules, load_attribute
from .plan import Part, largest, plan

_GIB = float(1 << 30)


class _Options(PostTrainingCLI):
    """Reads the options of a run and builds nothing of it."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Adds the command's own options."""
        parser.add_argument("--tokens", type=int | None, help="tokens of a micro-batch; micro_batch_tokens by default")
        parser.add_argument("--card", type=float, default=80.0, help="GiB of the device's memory")
        parser.add_argument("--optimizer_states", type=int, default=2, help="numbers kept per trained weight; AdamW: 2")

    def instantiate_classes(self) -> None:
        """Builds nothing."""


def run_command(args: Sequence[str]) -> None:
    """Runs ``rlhf-lightning memory``.

    Args:
        args: those of ``fit``, and ``--tokens``, ``--card`` and ``--optimizer_states``.
    """
    find_own_modules()
    config = _Options(args, run=False).config.as_dict()
    print("\n".join(report(config)))


def report(config: Mapping[str, Any]) -> list[str]:
    """Describes the memory of a run, in lines.

    Args:
        config: its options, as a YAML file has them.

    Raises:
        ValueError: a number is out of range, or the memory of something is not known.
    """
    tokens, card, states = config["tokens"], config["card"], config["optimizer_states"]
    for name, value in (("tokens", tokens), ("card", card)):
        if value is not None and not value > 0:
            raise ValueError(f"{name} is {value}; it must be above 0")
    if states < 0:
        raise ValueError(f"optimizer_states is {states}; it must be at least 0: 2 for AdamW, 1 for momentum")
    method, options = load_attribute(config["model"]["class_path"]), config["model"].get("init_args") or {}
    precision = config["trainer"].get("precision") or "bf16-mixed"
    make = partial(plan, method, options, str(precision), states=states)
    found = make(tokens=tokens)
    lines = [f"{method.__name__} on one device, {precision}, attention {found.training.attention}"]
    lines += _table(f"a micro-batch of {found.tokens:,} tokens", found.parts)
    if found.sampling:
        lines += _table("sampling", found.sampling)
    verdict = "fits" if found.total <= card * _GIB else "does not fit"
    most = largest(lambda count: make(tokens=count), card * _GIB)
    advice = f"micro-batches of up to {most:,} tokens do" if most else "no micro-batch does"
    lines.append(f"{found.total / _GIB:,.2f} GiB: {verdict} on a card of {card:g} GiB; {advice}")
    return lines


def _table(title: str, parts: Sequence[Part]) -> list[str]:
    rows = [(part.what, part.size, part.why) for part in parts if part.size]
    total = sum(size for _, size, _ in rows)
    width = max(len(what) for what, _, _ in rows)
    lines = [f"{what:<{width}} {size / _GIB:10.2f} GiB   {why}" for what, size, why in rows]
    return ["", f"{title}:", *lines, f"{'together':<{width}} {total / _GIB:10.2f} GiB"]
