"""Runs of the command line on a pretended card: every method, precision and subcommand, with what a run may hold.

Options that get along are in one *set*. The set of a run is that of its method, precision and subcommand, so that each
method meets each set (hence each option that it has), and so does each precision.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, NamedTuple
from unittest.mock import patch

import lightning
import yaml
from torch import Tensor, nn

from rlhf_lightning import ProcessRewardModule, RewardModule
from rlhf_lightning.cli import main
from rlhf_lightning.sequences import cascade

from ..helpers import save_tiny_model
from . import pretended
from .pretended import pretended_cuda
from .steps import EIGHT, save_model

PRECISIONS = ("32-true", "bf16-mixed", "bf16-true", "16-mixed")
SUBCOMMANDS = ("fit", "validate", "predict")
# The class of a method, that of its data, and the contract of its rows.
_PARTS = {
    "sft": ("SFTModule", "SFTDataModule", "demonstrations"),
    "reward": ("RewardModule", "PreferenceDataModule", "preference"),
    "process": ("ProcessRewardModule", "StepwiseDataModule", "stepwise"),
    "dpo": ("DPOModule", "PreferenceDataModule", "preference"),
    "simpo": ("SimPOModule", "PreferenceDataModule", "preference"),
    "kto": ("KTOModule", "UnpairedDataModule", "unpaired"),
    "grpo": ("GRPOModule", "PromptDataModule", "prompts"),
    "ppo": ("PPOModule", "PromptDataModule", "prompts"),
}
_WRITING = ("sft", "dpo", "simpo", "kto", "grpo", "ppo")
_SAMPLING = ("grpo", "ppo")
_REFERRING = ("dpo", "kto")
_PROMPTS = "sums:prompts?split=validation&rows=2&terms=2&high=9"
_ROWS = 4
_BATCH = 2


@dataclass(frozen=True)
class Option:
    """One option of a run.

    Args:
        model: options of the module; ``{scorer}`` and the like stand for folders.
        callbacks: classes of callbacks with their arguments.
        methods: the methods that have it.
    """

    model: dict[str, Any] = field(default_factory=dict)
    callbacks: dict[str, dict[str, Any]] = field(default_factory=dict)
    methods: tuple[str, ...] = EIGHT


def _reward(name: str, **arguments: Any) -> list[Any]:
    exact = "rlhf_lightning.rewards.exact_answer"
    return [exact, {"class_path": f"rlhf_lightning.rewards.{name}", "init_args": arguments}]


_PRINCIPLES = [{"name": "short", "statement": "it is short"}]
_SAMPLES = {"every_n_batches": 1, "screen": False}
# Sets of options that get along with one another.
OPTIONS: tuple[dict[str, Option], ...] = (
    {
        "adapters": Option({"lora": {"r": 2, "target_modules": ["q_proj", "v_proj"]}}),
        "packed": Option({"layout": "packed"}),
        "reference of adapters": Option({"reference": "adapter"}, methods=_REFERRING),
        "members with adapters": Option({"num_models": 2, "ensemble": "adapters"}, methods=("reward",)),
        "accuracy": Option(
            callbacks={"GenerationAccuracy": {"prompts": _PROMPTS, "max_new_tokens": 3}}, methods=_WRITING
        ),
        "samples": Option(callbacks={"SampleLogger": _SAMPLES}, methods=_SAMPLING),
        "reward model": Option({"rewards": _reward("RewardModelReward", model="{scorer}")}, methods=_SAMPLING),
        "throughput": Option(callbacks={"Throughput": {"peak_flops": 1e12, "every_n_batches": 1}}),
    },
    {
        "checkpointing": Option({"gradient_checkpointing": True}),
        "padded": Option({"layout": "padded"}),
        "averaged weights": Option(callbacks={"WeightAverage": {"decay": 0.5}}),
        "frozen reference": Option({"reference": "frozen"}, methods=_REFERRING),
        "members": Option({"num_models": 2, "head": "mlp", "pooling": "mean"}, methods=("reward",)),
        "outcomes": Option({"outcome_head": True}, methods=("process",)),
        "judge": Option(
            {"rewards": _reward("ConstitutionReward", principles=_PRINCIPLES, judge="{judge}")}, methods=_SAMPLING
        ),
        "critic": Option({"value": {"model": "{scorer}"}}, methods=("ppo",)),
        "divergence": Option({"beta": 0.1}, methods=("grpo",)),
    },
    {
        "cascade": Option({"attention": "cascade"}),
        "several micro-batches": Option({"micro_batch_tokens": 40}),
        "precomputed reference": Option({"reference": "precomputed"}, methods=("dpo",)),
        "precomputed reference of labels": Option(
            {"reference": "precomputed", "loss_type": "apo_zero_unpaired"}, methods=("kto",)
        ),
        "label tokens": Option({"head": "tokens", "boundaries": "learned"}, methods=("process",)),
        "checkpoints": Option(callbacks={"TrainingCheckpoint": {"folder": "{run}/kept", "every_n_steps": 1}}),
        "export": Option(callbacks={"ModelExport": {"folder": "{run}/exported"}}),
        "rewarded steps": Option(
            {
                "process_reward": {
                    "class_path": "rlhf_lightning.rewards.ProcessModelSteps",
                    "init_args": {"model": "{steps}"},
                }
            },
            methods=_SAMPLING,
        ),
        "several updates": Option({"num_updates": 2, "num_mini_batches": 2}, methods=_SAMPLING),
    },
    {
        "blocks": Option({"attention": "blocks"}),
        "experts": Option({"model": "{experts}", "router_aux_loss_coef": 0.5}),
        "repeated prompts": Option({"share_prefix": False}),
        "dropout": Option({"dropout": 0.1}),
        "reference that follows": Option(callbacks={"ReferenceSync": {"every_n_steps": 1}}, methods=_REFERRING),
        "coupled loss": Option({"loss_type": "aot"}, methods=("dpo",)),
        "odds": Option({"loss_type": "orpo"}, methods=("simpo",)),
        "speculation": Option({"sampling": {"speculation": "ngram"}}, methods=_SAMPLING),
        "entropy": Option({"entropy": {"coef": 0.1}}, methods=_SAMPLING),
    },
)


class Run(NamedTuple):
    """A command.

    Args:
        method: one of the eight.
        precision: of the trainer.
        subcommand: of the command line.
        options: number of its set of options.
    """

    method: str
    precision: str
    subcommand: str
    options: int

    @property
    def names(self) -> list[str]:
        """The options that its method has."""
        return [name for name, option in OPTIONS[self.options].items() if self.method in option.methods]


def every_run() -> Iterator[Run]:
    """Lists all methods, precisions and subcommands; options follow from them."""
    for number, method in enumerate(EIGHT):
        for of_precision, precision in enumerate(PRECISIONS):
            for of_subcommand, subcommand in enumerate(SUBCOMMANDS):
                yield Run(method, precision, subcommand, (number + of_precision + of_subcommand) % len(OPTIONS))


class Folders(NamedTuple):
    """Models that runs load."""

    policy: str
    experts: str
    scorer: str
    steps: str
    judge: str

    @classmethod
    def make(cls, place: Path) -> Folders:
        """Writes them."""
        policy = save_model(place / "policy", initializer_range=0.05, max_position_embeddings=1024)
        experts = str(save_tiny_model(place / "experts", "qwen3_moe", initializer_range=0.05))
        RewardModule(policy).save_pretrained(str(place / "scorer"))
        ProcessRewardModule(policy).save_pretrained(str(place / "steps"))
        return cls(policy, experts, str(place / "scorer"), str(place / "steps"), policy)


def config(run: Run, folders: Folders, place: Path) -> dict[str, Any]:
    """The configuration of a run, whose files go to a folder."""
    module, data, contract = _PARTS[run.method]
    chosen = [OPTIONS[run.options][name] for name in run.names]
    model: dict[str, Any] = {"model": folders.policy, "micro_batch_tokens": 8192}
    if run.method in _SAMPLING:
        sampling = {"num_generations": 2, "max_completion_length": 4}
        model |= {"rewards": ["rlhf_lightning.rewards.exact_answer"], **sampling}
    if run.method == "ppo":
        model["num_updates"] = 1
    callbacks = [{"class_path": f"{__name__}.Placed"}]
    for option in chosen:
        model |= option.model
        for name, arguments in option.callbacks.items():
            callbacks.append({"class_path": f"rlhf_lightning.callbacks.{name}", "init_args": arguments})
    rows = {"train": "train", "val": "validation", "predict": "test"}
    sources = {name: f"sums:{contract}?split={split}&rows={_ROWS}&terms=2&high=9" for name, split in rows.items()}
    quiet = dict.fromkeys(("logger", "enable_progress_bar", "enable_model_summary"), False)
    found = {
        "model": {"class_path": f"rlhf_lightning.modules.{module}", "init_args": model},
        "data": {
            "class_path": f"rlhf_lightning.datamodules.{data}",
            "init_args": {**sources, "global_batch_size": _BATCH},
        },
        "trainer": {
            "strategy": {"class_path": f"{pretended.__name__}.OnPretended"},
            "precision": run.precision,
            "max_epochs": 1,
            "num_sanity_val_steps": 0,
            "default_root_dir": "{run}",
            "callbacks": callbacks,
            **quiet,
        },
    }
    if "checkpoints" not in run.names:
        found["trainer"]["enable_checkpointing"] = False
    text = json.dumps(found)
    for name, folder in {**folders._asdict(), "run": str(place)}.items():
        text = text.replace(f"{{{name}}}", folder)
    configured: dict[str, Any] = json.loads(text)
    return configured


class Placed(lightning.Callback):
    """Sees where a run's models are after each batch, and which products are computed in host memory."""

    devices: ClassVar[Counter[str]] = Counter()
    on_host: ClassVar[Counter[str]] = Counter()
    watching: ClassVar[bool] = False

    def on_train_start(self, *args: Any) -> None:
        Placed.watching = True

    on_validation_start = on_predict_start = on_train_start

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
        for tensor in held((pl_module, trainer.callbacks)):
            Placed.devices[str(tensor.device)] += 1

    on_validation_batch_end = on_predict_batch_end = on_train_batch_end

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        Placed.watching = False


def held(root: Any) -> Iterator[Tensor]:
    """The weights of all models that an object holds, itself or in its parts: references, reward models, judges."""
    waiting, seen = [root], set()
    while waiting:
        each = waiting.pop()
        if id(each) in seen:
            continue
        seen.add(id(each))
        if isinstance(each, nn.Module):
            own = (*each._parameters.values(), *each._buffers.values())
            yield from (tensor for tensor in own if tensor is not None)
            waiting.extend(each._modules.values())
        if isinstance(each, dict):
            waiting.extend(each.values())
        elif isinstance(each, list | tuple | set):
            waiting.extend(each)
        elif type(each).__module__.startswith(("rlhf_lightning", "tests")) and hasattr(each, "__dict__"):
            waiting.extend(value for name, value in vars(each).items() if name != "_trainer")


_PRODUCTS = ("mm", "bmm", "addmm", "baddbmm", "embedding", "_scaled_dot_product_flash_attention_for_cpu")


@contextmanager
def card() -> Iterator[None]:
    """Within it there is a card on which flash attention applies, and ``Placed`` sees products in host memory."""
    plain = pretended._run_on_host

    def run_on_host(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        name = str(func.overloadpacket).removeprefix("aten.")
        if Placed.watching and name in _PRODUCTS:
            Placed.on_host[name] += 1
        return plain(func, args, kwargs)

    with ExitStack() as stack:
        stack.enter_context(pretended_cuda())
        stack.enter_context(patch.object(pretended, "_run_on_host", run_on_host))
        stack.enter_context(patch.object(cascade, "can_use_flash_attention", lambda params: True))
        yield


class Seen(NamedTuple):
    """Where a run's models were, and products that were computed in host memory."""

    devices: set[str]
    products_on_host: dict[str, int]


def start(run: Run, folders: Folders, place: Path) -> Seen:
    """Runs a command, whose files go to a folder."""
    Placed.devices.clear()
    Placed.on_host.clear()
    file = place / "config.yaml"
    file.write_text(yaml.safe_dump(config(run, folders, place)))
    arguments = [run.subcommand, "--debug", "--config", str(file)]
    if run.subcommand == "predict":
        arguments.append(f"--output={place / 'predictions.jsonl'}")
    with card():
        main(arguments)
    return Seen(set(Placed.devices), dict(Placed.on_host))


def numbers(value: Any) -> Iterator[float]:
    """All numbers of a JSON value."""
    if isinstance(value, dict | list):
        for each in value.values() if isinstance(value, dict) else value:
            yield from numbers(each)
    elif isinstance(value, float | int):
        yield value


def finite(file: Path) -> int:
    """The number of rows of a file, whose numbers are all finite."""
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    assert all(math.isfinite(number) for number in numbers(rows))
    return len(rows)
