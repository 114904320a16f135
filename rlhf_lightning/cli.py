"""The command line: ``rlhf-lightning fit | validate | test | predict`` and further commands."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields
from importlib import import_module
from itertools import count
from pathlib import Path
from typing import Any, Literal, NoReturn, get_args, get_origin, get_type_hints
from zipfile import is_zipfile

import jsonargparse
import lightning
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import BasePredictionWriter, Checkpoint
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn

from .core import PostTrainingModule
from .core.device_precision import default_precision
from .distributed.collectives import is_peer_loss, rank_prefix
from .rl import PolicyLoss, PPOLoss
from .utils import yaml_parser
from .utils.files import on_first_rank, write_atomically
from .utils.imports import find_own_modules
from .utils.log_output import log_output, take_log_options
from .utils.messages import UsageError, did_you_mean, explain
from .utils.option_groups import OptionGroup
from .utils.packaged_configs import with_packaged_configs
from .utils.quiet import quiet

# A class can be named without its path once it has been imported.
_WITH_SHORT_NAMES = ("modules", "datamodules", "callbacks")
_CLASSES = (PostTrainingModule, lightning.LightningDataModule, lightning.Callback)
# Option groups that `class_path` may replace by a subclass.
jsonargparse.set_parsing_settings(subclasses_enabled=[PolicyLoss, PPOLoss])
# Subcommands of LightningCLI, and subcommands with their own module.
_ONE_METHOD = ("fit", "validate", "test", "predict")
_COMMANDS = {
    "pipeline": ".pipeline.command",
    "label-steps": ".labeling.command",
    "merge": ".pipeline.merge_command",
    "evaluate": ".evaluation.command",
    "contamination": ".evaluation.contamination_command",
    "generate": ".generation.command",
    "chat": ".generation.chat_command",
    "compress": ".generation.compress_command",
    "memory": ".planning.command",
}
_USAGE = """\
usage: rlhf-lightning fit|validate|test|predict [--config FILE ...] [--model.NAME VALUE ...] [--data.NAME VALUE ...]
       rlhf-lightning generate --model FOLDER --prompts SOURCE|--prompt TEXT [--output FILE] [--NAME VALUE ...]
       rlhf-lightning chat --model FOLDER [--system TEXT] [--NAME VALUE ...]
       rlhf-lightning compress --model FOLDER --compressor FOLDER|NAME --input SOURCE [--output FILE] [--NAME VALUE ...]
       rlhf-lightning pipeline --config FILE [--run_dir FOLDER] [--dry-run] [--force STAGE] [KEY=VALUE ...]
       rlhf-lightning label-steps --model FOLDER --prompts SOURCE --output FILE [--NAME VALUE ...]
       rlhf-lightning merge --method NAME --models '[A, B]' --output FOLDER [--base FOLDER] [--NAME VALUE ...]
       rlhf-lightning evaluate --models A,B --suite FILE --output FOLDER
       rlhf-lightning contamination --rows SOURCE --against SOURCE [--n N] [--output FILE]
       rlhf-lightning memory [--config FILE ...] [--tokens T] [--card GIB] [--model.NAME VALUE ...]

fit, validate, test, predict   one method on one data set: a LightningCLI, whose --help lists every option
generate                       answers to many prompts, by sampling or by a strategy that searches
chat                           a conversation on the terminal
compress                       answers to prompts after contexts that are compressed, with the figures of what was kept
pipeline                       several stages, each starting from what the one before it exported
label-steps                    rows for process reward models: solutions whose steps are labelled by completing them
merge                          one model of several: TIES, DARE, SLERP, Fisher and others; merge verify FOLDER checks it
evaluate                       answers of models to a suite of prompts, verified and compared, with intervals and tests
contamination                  rows of an evaluation whose n-grams other rows, such as those of training, have as well
memory                         what a micro-batch of fit takes on a device, and the largest that fits a card

--config may be given several times: later files and options win. --print_config shows what they amount to.
fit --model.help=DPOModule and fit --data.help=PreferenceDataModule list the options of a method and of a data set.
--log_level=debug|info|warning|error says which messages are shown, --log_file=FILE where they are also written, with
their times; RLHF_LIGHTNING_LOG_LEVEL and RLHF_LIGHTNING_LOG_FILE do the same.
--debug (or RLHF_LIGHTNING_TRACEBACK=1) shows where an error was raised; --version shows the version."""


class Parser(LightningArgumentParser):
    """A parser that takes values as written, and raises errors of one line.

    Abbreviated options are not accepted.
    """

    _group = ""  # the option group that this parser reads, without its name

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{"parser_mode": yaml_parser.MODE, "allow_abbrev": False, **kwargs})

    def parse_args(self, args: Any = None, *others: Any, **kwargs: Any) -> Any:
        """Parses a command line, or, with ``defaults``, one option nested in another."""
        if args is not None and "defaults" in kwargs:
            args = [
                "=".join((key, *map(yaml_parser.flow, value))) for key, *value in (arg.split("=", 1) for arg in args)
            ]
        return super().parse_args(args, *others, **kwargs)

    def add_instantiator(self, instantiator: Any, *args: Any, **kwargs: Any) -> None:
        """Adds a function that builds objects of a class."""
        super().add_instantiator(yaml_parser.with_plain_arguments(instantiator), *args, **kwargs)

    def instantiate_classes(self, *args: Any, **kwargs: Any) -> Any:
        """Builds every object of a configuration."""
        return yaml_parser.plain(super().instantiate_classes(*args, **kwargs))

    def add_class_arguments(self, theclass: type, nested_key: str | None = None, *args: Any, **kwargs: Any) -> Any:
        """Adds the options of a class; a parser of an option group alone remembers the group."""
        if nested_key is None and isinstance(theclass, type) and issubclass(theclass, OptionGroup):
            self._group = theclass.group
        return super().add_class_arguments(theclass, nested_key, *args, **kwargs)

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Raises ``UsageError`` instead of printing the usage and exiting."""
        values = dict(self._values_of_groups())
        said = explain(message, self._all_options(), _known_classes(), group=self._group, values=values)
        raise UsageError(said) from ex

    def _values_of_groups(self) -> Iterator[tuple[str, str]]:
        """The names that options of replaceable groups may have, and these options: ``dapo``, ``loss.loss_type``."""
        for action in self._actions:
            kind = getattr(action, "_typehint", None)
            if isinstance(kind, type) and issubclass(kind, OptionGroup):
                for name, hint in get_type_hints(kind).items():
                    if get_origin(hint) is Literal:
                        yield from ((value, f"{action.dest}.{name}") for value in get_args(hint))

    def _all_options(self) -> Iterator[str]:
        subcommands = getattr(getattr(self, "_subcommands_action", None), "_name_parser_map", {})
        actions = [action for parser in [self, *subcommands.values()] for action in parser._actions]
        for action in actions:
            if action.dest.rpartition(".")[2] == "help":
                continue
            yield action.dest
            kind = getattr(action, "_typehint", None)
            if isinstance(kind, type) and issubclass(kind, OptionGroup):  # its subclasses have further options
                yield from (f"{action.dest}.{field.name}" for field in fields(kind))


class SaveConfig(SaveConfigCallback):
    """Writes the configuration of a ``fit`` into its log folder, without overwriting another one.

    The file is ``config.yaml``, or ``config-1.yaml`` and so on if that exists with other contents.
    """

    def setup(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, stage: str) -> None:
        """Does nothing: checks that may refuse the run are still to come."""

    def on_fit_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Writes the configuration, after all checks."""
        folder = trainer.log_dir  # a collective: call it on all ranks
        trial = getattr(trainer, "fast_dev_run", False)
        if trial or self.already_saved or folder is None:
            return
        self.already_saved = True
        on_first_rank(lambda: self._write(Path(folder)))

    def _write(self, folder: Path) -> None:
        text = self.parser.dump(self.config, skip_none=False)
        for number in count():
            path = folder / (f"config-{number}.yaml" if number else self.config_filename)
            if not path.exists():
                write_atomically(path, text)
                if number:
                    rank_zero_info(f"the configuration is in {path}: {self.config_filename} is that of another run")
            elif not path.is_file() or path.read_bytes() != text.encode():
                continue
            break


class PostTrainingCLI(LightningCLI):
    """LightningCLI for any post-training module with any datamodule.

    Args:
        args: the command line, without the program's name.
        run: run the subcommand that ``args`` begin with; if False, ``args`` have none, and everything is only built.
        trainer_defaults: defaults of the trainer's options, and callbacks to add to the configured ones.
    """

    def __init__(
        self, args: Sequence[str], *, run: bool = True, trainer_defaults: dict[str, Any] | None = None
    ) -> None:
        for name in _WITH_SHORT_NAMES:
            import_module(f".{name}", __package__)
        # Deprecated jsonargparse calls are in LightningCLI and cannot be fixed here.
        os.environ.setdefault("JSONARGPARSE_DEPRECATION_WARNINGS", "off")
        if run and args and args[0] in _ONE_METHOD:
            # Every subcommand has a parser with all options: only that of the one that is asked for is made.
            asked = {args[0]: self.subcommands()[args[0]]}
            self.subcommands = lambda: asked  # type: ignore[method-assign]
        super().__init__(
            PostTrainingModule,
            lightning.LightningDataModule,
            subclass_mode_model=True,
            subclass_mode_data=True,
            # Otherwise the optimizer would be built before the model is.
            auto_configure_optimizers=False,
            save_config_callback=SaveConfig,
            seed_everything_default=0,
            trainer_defaults=trainer_defaults,
            parser_class=Parser,
            args=[*with_packaged_configs(args)],
            run=run,
        )

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parses ``args`` without LightningCLI's warning, since ``sys.argv`` is not used."""
        self.config = parser.parse_args(args)

    def before_instantiate_classes(self) -> None:
        """Builds all other objects like modules and datamodules, for which Lightning adds an instantiator."""
        self.parser.add_instantiator(lambda class_type, *args, **kwargs: class_type(*args, **kwargs), object)

    def instantiate_trainer(self, **kwargs: Any) -> Any:
        """Builds the trainer, with the precision of its device.

        Contradictory checkpoint options are refused with advice that Lightning does not give.
        """
        from .callbacks import ModelExport
        from .callbacks.training_checkpoint import check_enabled

        given = {**self._get(self.config_init, "trainer", default={}), **kwargs}
        callbacks = given.get("callbacks") or []
        callbacks = callbacks if isinstance(callbacks, list) else [callbacks]
        check_enabled(given.get("enable_checkpointing"), callbacks)
        makes = any(isinstance(callback, Checkpoint) for callback in callbacks)
        exports = any(isinstance(callback, ModelExport) for callback in callbacks)
        if given.get("enable_checkpointing") is None and exports and not makes:
            kwargs["enable_checkpointing"] = False  # the model is exported; Lightning would write it again
        precision = default_precision(given)
        if precision is not None:
            kwargs["precision"] = precision
            rank_zero_info(f"trainer.precision is {precision}, which this GPU has; 32-true computes in fp32")
        return super().instantiate_trainer(**kwargs)

    def _run_subcommand(self, subcommand: str) -> None:
        """Runs the subcommand; without a last checkpoint Lightning would silently use the initial model."""
        from .callbacks.training_checkpoint import check_last

        if subcommand != "fit" and self._get(self.config_init, "ckpt_path") == "last":
            check_last(self.trainer, subcommand)
        super()._run_subcommand(subcommand)

    def _prepare_subcommand_parser(self, klass: type, subcommand: str, **kwargs: Any) -> LightningArgumentParser:
        parser = super()._prepare_subcommand_parser(klass, subcommand, **kwargs)
        if subcommand == "predict":
            parser.add_argument("--output", type=str | None, help="where predictions go: a JSON Lines file")
        return parser

    def before_predict(self) -> None:
        """Adds a writer of predictions.

        Raises:
            UsageError: no output is given.
        """
        from .callbacks import PredictionWriter

        trainer: Any = self.trainer
        output, callbacks = self._get(self.config, "output"), trainer.callbacks
        if output is not None:
            callbacks.append(PredictionWriter(output))
        elif not any(isinstance(callback, BasePredictionWriter | PredictionWriter) for callback in callbacks):
            raise UsageError("no file for the predictions is given: pass --output=FILE.jsonl")

    def predict(self, **kwargs: Any) -> None:
        """Predicts without keeping results in memory: a callback writes them."""
        self.trainer.predict(**{**kwargs, "return_predictions": False})

    def _parse_ckpt_path(self) -> None:
        """Keeps the configuration, and warns if a checkpoint was made with a different one.

        LightningCLI would replace it by the checkpoint's hyper-parameters, even where the command line sets others.
        """
        config = self.config.get(self.config.get("subcommand"), {})
        path = config.get("ckpt_path")
        if not path or not Path(path).is_file() or not is_zipfile(path):  # loading reports a damaged one
            return
        stored = torch.load(path, weights_only=True, map_location="cpu", mmap=True).get("hyper_parameters", {})
        options = _plain(config["model"].get("init_args", {}))
        given, stored = _flat({k: v for k, v in options.items() if k in stored}), _flat(stored)
        both = (given.keys() & stored.keys()) | {n for n in given.keys() ^ stored.keys() if n.endswith(".class_path")}
        changed = [
            f"{name}={given.get(name)!r} (the checkpoint: {stored.get(name)!r})"
            for name in sorted(both)
            if given.get(name) != stored.get(name)
        ]
        if changed:
            rank_zero_warn(
                f"the checkpoint was made with other values; those given here are used: {', '.join(changed)}"
            )


def main(args: Sequence[str] | None = None) -> None:
    """Runs a command line.

    Args:
        args: without the program's name; ``sys.argv`` by default.

    Raises:
        SystemExit: 2 after a mistake in the arguments, 1 after an error while running, 128 plus its number after a
            signal.
    """
    arguments = list(sys.argv[1:] if args is None else args)
    debug = "--debug" in arguments or os.environ.get("RLHF_LIGHTNING_TRACEBACK", "0") not in ("", "0")
    arguments = [argument for argument in arguments if argument != "--debug"]
    try:
        arguments, log_options = take_log_options(arguments)
        with quiet(), log_output(**log_options):
            _dispatch(arguments)
    except Exception as error:
        if debug:
            raise
        print(f"rlhf-lightning: {rank_prefix()}{_said(error)}", file=sys.stderr)
        raise SystemExit(2 if isinstance(error, UsageError) else 1) from None
    except KeyboardInterrupt:
        print("rlhf-lightning: interrupted", file=sys.stderr)
        raise SystemExit(130) from None


def _said(error: Exception) -> str:
    """Describes an error in one line; an unexpected one with its type and how to see the traceback."""
    text = explain(str(error))
    if isinstance(error, RuntimeError) and is_peer_loss(error):
        return f"another rank has failed ({' '.join(str(error).split())[:120]})"
    if isinstance(error, UsageError | ValueError | OSError | ImportError | MisconfigurationException):
        return text or type(error).__name__
    if isinstance(error, torch.OutOfMemoryError):
        return f"{text}: lower the module's micro_batch_tokens, which changes no result"
    return f"{type(error).__name__}{': ' * bool(text)}{text} (--debug shows where)"


def _dispatch(arguments: list[str]) -> None:
    if arguments[:1] == ["--version"]:
        from . import __version__

        print(__version__)
    elif not arguments or arguments[0] in ("-h", "--help"):
        print(_USAGE)
    elif arguments[0] in _COMMANDS:
        import_module(_COMMANDS[arguments[0]], __package__).run_command(arguments[1:])
    elif arguments[0] in _ONE_METHOD or arguments[0].startswith("-"):
        find_own_modules()
        PostTrainingCLI(arguments)
    else:
        known = (*_ONE_METHOD, *_COMMANDS)
        near = did_you_mean(arguments[0], known) or f": use one of {', '.join(known)}"
        raise UsageError(f"no subcommand {arguments[0]!r}{near}")


def _known_classes() -> Iterator[type]:
    """Yields every imported module, datamodule and callback class."""
    waiting: list[type] = list(_CLASSES)
    while waiting:
        cls = waiting.pop()
        yield cls
        waiting.extend(cls.__subclasses__())


def _plain(value: Any) -> Any:
    return value.as_dict() if hasattr(value, "as_dict") else value


def _flat(options: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Names options in groups as on the command line, ``loss.epsilon``; with the class of a group that is not ours."""
    found: dict[str, Any] = {}
    for name, value in options.items():
        if not isinstance(value, Mapping):
            found[f"{prefix}{name}"] = list(value) if isinstance(value, tuple) else value
            continue
        inner = {**value, **(value.get("init_args") or {})}
        inner.pop("init_args", None)
        if str(inner.get("class_path")).startswith(f"{__package__}."):
            del inner["class_path"]
        found |= _flat(inner, f"{prefix}{name}.")
    return found
