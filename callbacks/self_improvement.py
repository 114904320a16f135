"""Replaces the training rows, round by round, by rows made of the policy's own samples."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import lightning
from lightning.fabric.utilities.rank_zero import rank_zero_info

from ..core import PostTrainingModule
from ..core.rewind import forget_loader
from ..data.loaders import BatchLoader
from ..datamodules import ExampleDataModule
from ..datamodules.replacing import forget_train, replace_train, restore_train
from ..distributed.collectives import gather_objects
from ..distributed.unshard import gathered
from ..evaluation.answers import read_prompts
from ..inference import Engine, LocalEngine, SamplingParams, derive_seed
from ..inference.answering import StrategyOption
from ..self_improvement.replay import kept_lines
from ..self_improvement.row_makers import Row
from ..self_improvement.row_options import RowOptions
from ..self_improvement.samples import ScoredPrompt, check_samples, sample_prompts
from ..self_improvement.scorers import load_scorer
from ..sequences import Example
from ..utils.files import check_shared, claim, json_line, on_first_rank, write_atomically
from ..utils.messages import one_line
from ..utils.validation import check_choice, check_count

Kind = Literal["demonstrations", "pairs", "unpaired", "spin"]
_KINDS = ("demonstrations", "pairs", "unpaired", "spin")
_PROMPTS_AT_ONCE = 64
_KIND = "folder of rounds"  # of its list
_KEPT = ".replay"  # rows that are kept for the next round
_NAMES = re.compile(r"round-\d+(-attempt-\d+)?(\.replay)?\.jsonl")


class SelfImprovement(lightning.Callback):
    """Trains in rounds on rows of the policy's own samples.

    The first ``every_n_epochs`` epochs train on the datamodule's rows. Then, before every so many epochs, the policy
    answers the next prompts, the answers are scored, and the rows made of them (with seed rows) take over as training
    rows: for ``SFTModule`` demonstrations (rejection sampling), for DPO and SimPO pairs or, with demonstrations among
    the prompts' columns, the pairs of SPIN, for KTO unpaired rows. The optimizer continues, and so does the reference
    of DPO; ``ReferenceSync`` moves it. A round without a single row keeps the rows of the one before.

    Rows are in ``folder/round-N.jsonl``, with seed and score of their samples and the step of the policy that drew them
    in ``provenance``. They are a function of the policy, the seed and the round, whatever the number of ranks, and a
    resumed run reads them again: it needs the folder. Rounds have epochs of different lengths: use ``max_steps``, or a
    learning rate without decay.

    With a ``CapabilityGate`` a round is made, trained on and tested, in this order; the next one is made by the policy
    that was accepted. Where the gate goes back, so do the round, its rows, the place in them and ``history``; rounds
    that are made again have seeds of their own, and rows in ``folder/round-N-attempt-A.jsonl``, with the number A of
    rejections in succession before them.

    Args:
        prompts: a source of ``PromptDataModule``.
        folder: where the rows go; those of an earlier run are replaced, other files are not.
        verifier: any reward function, as in ``self_improvement.load_scorer``.
        rows: kind of the rows.
        every_n_epochs: length of a round, at least 1.
        prompts_per_round: taken in turn, from the first again after the last; by default all in every round.
        num_samples: of each prompt, at least 1.
        sampling: options of ``SamplingParams`` without a seed.
        strategy: as in ``inference.build_strategy``: each sample is the result of a search with the policy. Its scorers
            are loaded once.
        threshold: least score of a right sample: of demonstrations (``None`` takes any), and of the labels of KTO.
        keep: of demonstrations, largest number of a prompt; ``None`` for all.
        margin: of pairs, their scores differ by more.
        pairing: of pairs, ``best_worst`` of each prompt or ``all``.
        demonstration: of ``spin``, the prompts' column with demonstrations.
        seed_rows: source of rows that are mixed in.
        seed_ratio: their share, in [0, 1).
        replay: options of ``self_improvement.RowReplay``: rows of earlier rounds come back, except those of rounds
            that a gate has taken back.
        seed: of samples, replayed rows and seed rows.
        chat_template_kwargs: passed to the chat template; by default those of the trainer's datamodule.

    Attributes:
        history: of each round: its number and attempt, the step, its samples, rows, and mean score.
        attempt: rejections in succession, by which a ``CapabilityGate`` numbers what is tried again.

    Raises:
        ValueError: an option out of its range; in training, another module or datamodule, or a file in the folder that
            is named as rows of a round and was not written by this callback.

    Example::

        rounds = SelfImprovement("sums:prompts?rows=2000", "runs/own", prompts_per_round=500, num_samples=8)
        lightning.Trainer(max_epochs=4, callbacks=[rounds]).fit(SFTModule("runs/sft/model"), data)
    """

    def __init__(
        self,
        prompts: str | list[str],
        folder: str,
        verifier: str | dict[str, Any] = "rlhf_lightning.rewards.exact_answer",
        rows: Kind = "demonstrations",
        every_n_epochs: int = 1,
        prompts_per_round: int | None = None,
        num_samples: int = 4,
        sampling: dict[str, Any] | None = None,
        strategy: str | dict[str, Any] | None = None,
        threshold: float | None = 0.5,
        keep: int | None = 1,
        margin: float = 0.0,
        pairing: Literal["best_worst", "all"] = "best_worst",
        demonstration: str = "completion",
        seed_rows: str | list[str] | None = None,
        seed_ratio: float = 0.0,
        replay: dict[str, Any] | None = None,
        seed: int = 0,
        chat_template_kwargs: dict[str, Any] | None = None,
    ) -> None:
        check_choice("rows", rows, _KINDS)
        check_count("every_n_epochs", every_n_epochs, "1 is usual")
        if prompts_per_round is not None:
            check_count("prompts_per_round", prompts_per_round, "null takes all prompts in every round")
        self.options = RowOptions(
            rows=[rows],
            threshold=threshold,
            keep=keep,
            margin=margin,
            pairing=pairing,
            demonstration=demonstration,
            seed_rows=seed_rows,
            seed_ratio=seed_ratio,
            replay=replay,
        )
        self.options.check()
        _check_replay(replay)
        self.prompts, self.folder, self.rows = prompts, Path(folder).expanduser(), rows
        self.scorer = load_scorer(verifier)
        self.every_n_epochs, self.prompts_per_round, self.num_samples = every_n_epochs, prompts_per_round, num_samples
        self.sampling = SamplingParams(**(sampling or {}))
        if self.sampling.seed is not None:
            raise ValueError(f"sampling.seed is {self.sampling.seed}: write seed, which is that of all samples")
        check_samples(num_samples, self.sampling, [rows], strategy=strategy)
        self.strategy = StrategyOption(strategy)
        self.seed, self.chat_template_kwargs = seed, chat_template_kwargs
        self._module: PostTrainingModule | None = None
        self._examples: list[Example] | None = None
        self._read_with: tuple[Any, Any] | None = None  # tokenizer and settings of the prompts
        self._forget()

    def _forget(self) -> None:
        self.round = 0
        self.history: list[dict[str, Any]] = []
        self.attempt = 0
        self._rows_of = (0, 0)  # the round and attempt whose rows are trained on; of round 0 the datamodule's
        self._is_loaded = False

    def setup(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, stage: str) -> None:
        """Refuses a module or datamodule whose rows cannot be replaced, and asks for new rows in every epoch.

        Raises:
            ValueError: naming it.
        """
        if stage != "fit":
            return
        data = trainer.datamodule  # type: ignore[attr-defined]
        if not isinstance(pl_module, PostTrainingModule):
            raise ValueError(f"SelfImprovement needs a PostTrainingModule; it was given a {type(pl_module).__name__}")
        if not isinstance(data, ExampleDataModule) or data.streaming:
            name = type(data).__name__ + (" with streaming" if isinstance(data, ExampleDataModule) else "")
            raise ValueError(
                f"SelfImprovement replaces the rows of a datamodule of this package without streaming; the trainer has "
                f"{name}: call trainer.fit(module, datamodule=...) with one"
            )
        kind = getattr(getattr(pl_module, "reference", None), "kind", None)
        if kind == "precomputed":
            raise ValueError(
                f"SelfImprovement makes rows while {type(pl_module).__name__} trains, and reference is 'precomputed', "
                "which has log-probs of the first rows alone: use reference='frozen'"
            )
        on_first_rank(self._check_folder)
        if self._module is not pl_module or trainer.global_step == 0:
            self._forget()
        self._module = pl_module
        trainer.reload_dataloaders_every_n_epochs = 1  # type: ignore[attr-defined]
        ask = type(data).train_dataloader

        def rows_first() -> BatchLoader:
            self._before_rows(trainer, pl_module, data)
            return ask(data)

        vars(data)["train_dataloader"] = rows_first

    def teardown(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, stage: str) -> None:
        """Leaves the datamodule to others, with its own rows."""
        if stage == "fit":
            _leave(trainer)

    def on_exception(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, exception: BaseException
    ) -> None:
        """Leaves the datamodule to others, with its own rows; what is saved after this has the position in the last."""
        if trainer.state.fn == "fit":
            _leave(trainer)

    def _before_rows(self, trainer: lightning.Trainer, module: PostTrainingModule, data: ExampleDataModule) -> None:
        """Makes the rows of a round that begins now, or finds those of the round that a run is resumed in."""
        if self._is_loaded:
            self._is_loaded = False
            if self._rows_of[0]:
                replace_train(data, str(self._file(*self._rows_of)), continues=True)
        due = trainer.current_epoch // self.every_n_epochs
        if due <= self.round:
            return
        self.round = due
        files = self._make(trainer, module)
        if files:
            self._rows_of = (due, self.attempt)
            on_first_rank(lambda: self._write(files))
            replace_train(data, str(self._file(*self._rows_of)))

    def _check_folder(self) -> None:
        present = self.folder.glob("*") if self.folder.is_dir() else ()
        check_shared(self.folder, _KIND, [path.name for path in present if _NAMES.fullmatch(path.name)])

    def _write(self, files: Mapping[Path, str]) -> None:
        claim(self.folder, _KIND, [file.name for file in files])
        for file, text in files.items():
            write_atomically(file, text)

    def _file(self, number: int, attempt: int, kind: str = "") -> Path:
        return self.folder / (f"round-{number}" + (f"-attempt-{attempt}" if attempt else "") + f"{kind}.jsonl")

    def _seed_of(self, kind: str) -> int:
        """Returns the seed of this round's samples or seed rows."""
        again: tuple[int | str, ...] = ("attempt", self.attempt) if self.attempt else ()
        return derive_seed(self.seed, kind, self.round, *again)

    def before_rewind(self, trainer: lightning.Trainer) -> None:
        """Forgets the rows, as the run goes back to a time at which it may have had others."""
        forget_train(trainer.datamodule)  # type: ignore[attr-defined]
        forget_loader(trainer)

    def _make(self, trainer: lightning.Trainer, module: PostTrainingModule) -> dict[Path, str]:
        """Samples and scores the prompts of this round, each rank its share, and makes rows of all.

        Returns:
            The files of the round, with their contents, on every rank; none without a row.
        """
        examples = self._of_round(trainer, module)
        local_numbers = range(trainer.global_rank, len(examples), trainer.world_size)
        drawn: dict[int, ScoredPrompt] = {}
        cause = None
        # A rank that raised alone would leave the others waiting.
        try:
            drawn |= zip(local_numbers, self._sample(module, examples, local_numbers, trainer), strict=True)
        except Exception as error:
            cause = error
        parts = gather_objects((drawn, None if cause is None else one_line(str(cause), 300)))
        if cause is not None:
            raise cause
        if (said := next((message for _, message in parts if message is not None), None)) is not None:
            raise ValueError(f"round {self.round} failed on another rank: {said}")
        merged: dict[int, ScoredPrompt] = {}
        for part, _ in parts:
            merged |= part
        prompts = [merged[n] for n in range(len(examples))]
        rows = self.options.make(self.rows, prompts)
        files, replayed = self._files(rows, prompts) if rows else ({}, 0)
        scores = [s.score for scored in prompts for s in scored.samples if s.score is not None]
        record = {
            "round": self.round,
            "attempt": self.attempt,
            "step": trainer.global_step,
            "samples": sum(len(scored.samples) for scored in prompts),
            "rows": len(rows),
            "mean_score": sum(scores) / len(scores) if scores else None,
        }
        if self.options.replay is not None:
            record["replayed"] = replayed
        self.history.append(record)
        logged = {f"round/{name}": float(value) for name, value in record.items() if value is not None}
        for logger in trainer.loggers:
            logger.log_metrics(logged, step=trainer.fit_loop.epoch_loop._batches_that_stepped)
        rank_zero_info(f"round {self.round}: {json.dumps(record)}" + ("" if rows else ": the rows stay as they are"))
        return files

    def _files(self, rows: list[Row], prompts: Sequence[ScoredPrompt]) -> tuple[dict[Path, str], int]:
        """Returns the files of this round with their contents, and how many rows have come back."""
        replayed: list[Row] = []
        files = {}
        if self.options.replay is not None:
            before = str(self._file(*self._rows_of, _KEPT)) if self._rows_of[0] else None
            options = replace(self.options, replay=self.options.replay | {"round": self.round, "rows": before})
            replayed, kept = options.replayed(rows, options.priorities(prompts), self._seed_of("replay"))
            files[self._file(self.round, self.attempt, _KEPT)] = kept_lines(kept)
        mixed = self.options.mixed([*rows, *replayed], self._seed_of("seed rows"))
        files[self._file(self.round, self.attempt)] = "".join(map(json_line, mixed))
        return files, len(replayed)

    def _of_round(self, trainer: lightning.Trainer, module: PostTrainingModule) -> list[Example]:
        settings = self.chat_template_kwargs
        if settings is None:
            settings = getattr(trainer.datamodule, "chat_template_kwargs", None)  # type: ignore[attr-defined]
        if self._examples is None or self._read_with != (module.tokenizer, settings):
            self._read_with = (module.tokenizer, settings)
            self._examples = read_prompts(self.prompts, module.tokenizer, chat_template_kwargs=settings)
        number = self.prompts_per_round or len(self._examples)
        start = (self.round - 1) * number
        return [self._examples[n % len(self._examples)] for n in range(start, start + number)]

    def _sample(
        self, module: PostTrainingModule, examples: Sequence[Example], local: Sequence[int], trainer: lightning.Trainer
    ) -> list[ScoredPrompt]:
        engine, found = self.strategy.on(LocalEngine(module.model, module.tokenizer)), []
        # Searches take different numbers of rounds on each rank.
        with gathered(module.model):
            for start in range(0, len(local), _PROMPTS_AT_ONCE):
                part = local[start : start + _PROMPTS_AT_ONCE]
                found += self._part(engine, [examples[n] for n in part], part, trainer.global_step)
        return found

    def _part(
        self, engine: Engine, examples: Sequence[Example], places: Sequence[int], step: int
    ) -> list[ScoredPrompt]:
        return sample_prompts(
            engine,
            examples,
            self.scorer,
            num_samples=self.num_samples,
            sampling=self.sampling,
            seed=self._seed_of("round"),
            numbers=places,
            model=f"step {step}",
        )

    # Checkpoints.

    def state_dict(self) -> dict[str, Any]:
        """Returns the round, its attempt, and the ones whose rows are trained on."""
        history = [dict(record) for record in self.history]
        return {"round": self.round, "attempt": self.attempt, "rows_of": list(self._rows_of), "history": history}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores the round of an earlier run.

        Raises:
            ValueError: its rows are not there.
        """
        self.round, self.attempt = state_dict["round"], state_dict["attempt"]
        number, attempt = state_dict["rows_of"]
        self._rows_of = (number, attempt)
        self.history = [dict(record) for record in state_dict["history"]]
        self._is_loaded = True
        for kind in ("",) if self.options.replay is None else ("", _KEPT):
            if number and not self._file(number, attempt, kind).is_file():
                raise ValueError(
                    f"the rows of round {number} are not in {str(self._file(number, attempt, kind))!r}: the run that "
                    "is resumed has written them into its folder: give that folder"
                )


def _check_replay(replay: dict[str, Any] | None) -> None:
    for key in ("rejected", "round", "rows"):
        if key in (replay or {}):
            why = "a gate takes rejected rounds back" if key == "rejected" else "the callback gives it"
            raise ValueError(f"replay.{key} is {(replay or {})[key]!r}, and {why}: leave it out")


def _leave(trainer: Any) -> None:
    data = trainer.datamodule
    if isinstance(data, ExampleDataModule):
        vars(data).pop("train_dataloader", None)
        restore_train(data)
