"""Base class of the datamodules: from sources to loaders, with a report of dropped and skipped rows."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar, Literal, get_args

import lightning.pytorch as pl
from lightning.fabric.utilities.rank_zero import rank_zero_info, rank_zero_warn
from lightning.pytorch.trainer.states import TrainerFn
from transformers import PreTrainedTokenizerBase

from ..data.example_cache import LEAST_ROWS, NOT_OF_EXAMPLES, cache_folder, entry_name, read_entry, write_entry
from ..data.example_store import ExampleStore
from ..data.files import RowSource
from ..data.filtered_rows import FilteredRows
from ..data.filters import RowFilter
from ..data.loaders import BatchLoader, Couple, ExampleLoader, StreamLoader
from ..data.row_reader import OnBadRow, RowReader
from ..data.sources import Source, is_remote, open_source
from ..data.tokenization import OnTooLong, RowTokenizer, TokenizerSource, load_tokenizer
from ..data.transformed_rows import Transform, TransformedRows
from ..sequences.example import Example, check_contract
from ..utils.keywords import options_of, refuse_unknown

Split = Literal["train", "val", "test", "predict"]

_STAGES: dict[str, tuple[Split, ...]] = {
    "fit": ("train", "val"),
    "validate": ("val",),
    "test": ("test",),
    "predict": ("predict",),
}
# Names of the splits in a folder or a hub dataset that has several.
_SPLIT_NAMES: dict[Split, str] = {"train": "train", "val": "validation", "test": "test", "predict": "test"}


class ExampleDataModule(pl.LightningDataModule):
    """Serves rows of any source as batches of token trees; subclasses make the examples of a row.

    A source is a file (.jsonl, .json, .csv, .parquet, .arrow), a folder of these, a folder that ``datasets`` saved, an
    id on the hub, an embedded task (``"sums:preference?rows=1000"``), a list of such strings, and in Python a list of
    dictionaries or a ``datasets.Dataset``. :attr:`report` counts, per split: ``rows`` read, ``examples`` made of them,
    ``kept``, ``dropped`` (too long), ``truncated``, ``bad`` (skipped), ``filtered`` (in all, and by each filter),
    ``tokens`` and ``longest``; with ``streaming``, for training rows that this rank has read so far, in all epochs.

    Args:
        train: source of the training rows.
        val: source of the validation rows.
        test: source of the test rows.
        predict: source of the rows to predict.
        tokenizer: folder, hub id or tokenizer object; the module's (``module.tokenizer``) if omitted.
        global_batch_size: examples of one optimizer step, over all ranks; at least 1.
        eval_batch_size: the same for validation, test and prediction; ``global_batch_size`` if omitted.
        max_length: maximum number of tokens of a sequence (of the longer one of a pair); unlimited if omitted.
        on_too_long: ``drop`` the example, ``truncate_start`` (of the prompt, after its beginning-of-sequence token),
            ``truncate_end`` (of the completion, with its end-of-sequence token), or ``error``.
        on_bad_row: ``error`` at the first row that cannot be used, or ``skip`` it; skipped rows are counted and the
            first ones shown.
        columns: new name of a column -> its name in the rows.
        transform: maps a row's columns (already renamed) to new ones, or to ``None`` to drop the row; in YAML the
            function's dotted path. :mod:`~rlhf_lightning.data.transforms` has some.
        filters: of :mod:`~rlhf_lightning.data.filters`, in order, on *training* rows after ``transform`` and
            ``pair_by``: ranges of scores, patterns, duplicates, overlap with an evaluation.
        chat_template_kwargs: passed to the tokenizer's chat template (``enable_thinking: false``); a row's own
            ``chat_template_kwargs`` override them by name.
        seed: seed of the order of training rows, together with the epoch; at least 0.
        shuffle: draw a new order of training rows in each epoch.
        drop_last: drop a last training batch of fewer than ``global_batch_size`` examples.
        group_by_prompt: keep training rows of the same prompt together in every order, and on one rank where the
            batch allows it, so that their prompt is computed once; not with ``streaming``.
        streaming: read training rows on demand instead of tokenising all of them first. The place of a row that is too
            long, bad or dropped then stays empty in the batch.
        shuffle_buffer: with ``streaming``, the rows among which the next one is drawn; at least 1. Rows move by about
            as many places; files (of a list or folder) and Parquet row groups are reordered in each epoch.
        unknown: options that do not exist.

    Raises:
        TypeError: an option does not exist; the message suggests another.
        ValueError: for a value outside its range.
    """

    allowed_on_too_long: ClassVar[tuple[str, ...]] = get_args(OnTooLong)
    # Name of the datamodule whose kind of rows these are; modules refuse others. None: any module takes them.
    contract: ClassVar[str | None] = None

    def __init__(
        self,
        train: Source | None = None,
        *,
        val: Source | None = None,
        test: Source | None = None,
        predict: Source | None = None,
        tokenizer: TokenizerSource | None = None,
        global_batch_size: int = 8,
        eval_batch_size: int | None = None,
        max_length: int | None = None,
        on_too_long: OnTooLong = "drop",
        on_bad_row: OnBadRow = "error",
        columns: dict[str, str] | None = None,
        transform: Transform | None = None,
        filters: list[RowFilter] | None = None,
        chat_template_kwargs: dict[str, Any] | None = None,
        seed: int = 0,
        shuffle: bool = True,
        drop_last: bool = False,
        group_by_prompt: bool = False,
        streaming: bool = False,
        shuffle_buffer: int = 1000,
        **unknown: Any,
    ) -> None:
        refuse_unknown(type(self), unknown)
        super().__init__()
        _check_least("global_batch_size", global_batch_size, 1)
        _check_least("eval_batch_size", 1 if eval_batch_size is None else eval_batch_size, 1)
        _check_least("max_length", 2 if max_length is None else max_length, 2)
        _check_least("seed", seed, 0)
        _check_least("shuffle_buffer", shuffle_buffer, 1)
        _check_choice("on_too_long", on_too_long, self.allowed_on_too_long)
        _check_choice("on_bad_row", on_bad_row, get_args(OnBadRow))
        if group_by_prompt and streaming:
            raise ValueError(
                "group_by_prompt=True needs all training rows at once, which streaming=True never has: set one of them "
                "to false"
            )

        # Options are attributes of the same names: `_entry` reads the ones that examples depend on.
        self.sources: dict[Split, Any] = {"train": train, "val": val, "test": test, "predict": predict}
        self.global_batch_size = global_batch_size
        self.eval_batch_size = global_batch_size if eval_batch_size is None else eval_batch_size
        self.max_length = max_length
        self.on_too_long = on_too_long
        self.on_bad_row = on_bad_row
        self.columns = columns
        self.transform = transform
        self.filters = filters
        self.chat_template_kwargs = chat_template_kwargs
        self.seed = seed
        self.shuffle = shuffle
        self.drop_last = drop_last
        self.group_by_prompt = group_by_prompt
        self.streaming = streaming
        self.shuffle_buffer = shuffle_buffer

        self.report: dict[str, dict[str, int]] = {}
        self._tokenizer = tokenizer
        self._rows: RowTokenizer | None = None
        self._stores: dict[Split, ExampleStore] = {}
        self._coupled: dict[Split, ExampleStore] = {}
        self._made: dict[Split, RowSource] = {}  # rows that replace those of a source: see `replacing`
        self._train_loader: BatchLoader | None = None
        self._train_loader_of: pl.Trainer | None = None
        self._train_state: dict[str, Any] | None = None

    def make_examples(self, row_id: str, columns: dict[str, Any]) -> list[Example]:
        """Makes the examples of one row, of any length.

        Raises:
            ValueError: saying what is wrong with the row (not where it is).
        """
        raise TypeError(f"{type(self).__name__} does not say what its rows become: override make_examples")

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer, loaded on first access.

        Raises:
            ValueError: if neither the datamodule nor the module has one.
        """
        if self._tokenizer is None:
            module = None if self.trainer is None else self.trainer.lightning_module
            self._tokenizer = getattr(module, "tokenizer", None)
        if self._tokenizer is None:
            raise ValueError(
                f"tokenizer=None and the module has none: write {type(self).__name__}(tokenizer='folder or hub id')"
            )
        if isinstance(self._tokenizer, str):
            self._tokenizer = load_tokenizer(self._tokenizer)
        return self._tokenizer

    @property
    def rows(self) -> RowTokenizer:
        """The tokenizer of rows, which makes token trees of them."""
        if self._rows is None:
            self._rows = RowTokenizer(self.tokenizer, self.chat_template_kwargs)
        return self._rows

    def prepare_data(self) -> None:
        """Downloads hub datasets, once per node; local sources are not read."""
        for split, source in self.sources.items():
            if is_remote(source) and not (split == "train" and self.streaming):
                self._open(split)

    def setup(self, stage: str | None = None) -> None:
        """Reads and tokenises the splits of a stage that are not loaded yet.

        Raises:
            ValueError: for a module that does not take rows of this contract, and for a row that cannot be used.
        """
        if self.trainer is not None:
            check_contract(self.trainer.lightning_module, self.contract)
        splits = list(self.sources) if stage is None else _STAGES[stage]
        for split in splits:
            if self.sources[split] is not None and not (split == "train" and self.streaming):
                self._store(split)

    def train_dataloader(self) -> BatchLoader:
        """Returns the training loader; the same trainer gets the same loader again, which continues at its position."""
        if self.sources["train"] is None:
            raise ValueError(f"there are no training rows: write {type(self).__name__}(train='rows.jsonl')")

        # Lightning asks again in every epoch with reload_dataloaders_every_n_epochs: the position must not be lost.
        trainer = self.trainer
        if self._train_loader is None or trainer is None or self._train_loader_of is not trainer:
            self._train_loader, self._train_loader_of = self._make_train_loader(), trainer
        if self._train_state is not None:
            state, self._train_state = self._train_state, None
            self._train_loader.load_state_dict(state)
        return self._train_loader

    def val_dataloader(self) -> list[Any] | ExampleLoader:
        """Returns the loader of the validation batches, in the source's order."""
        return self._eval_loader("val")

    def test_dataloader(self) -> list[Any] | ExampleLoader:
        """Returns the loader of the test batches, in the source's order."""
        return self._eval_loader("test")

    def predict_dataloader(self) -> list[Any] | ExampleLoader:
        """Returns the loader of the batches to predict, in the source's order."""
        return self._eval_loader("predict")

    def state_dict(self) -> dict[str, Any]:
        """Returns the training loader's position.

        Lightning saves that of any stateful loader too, but restores it only in the middle of an epoch and only if the
        loader was not requested before; it always restores a datamodule's state.
        """
        return {} if self._train_loader is None else {"train": self._train_loader.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores the training loader's position from a checkpoint."""
        # `validate` and `test` read weights from a checkpoint, and no position.
        fitting = self.trainer is None or self.trainer.state.fn == TrainerFn.FITTING
        state = state_dict.get("train") if fitting else None
        if state is not None and self._train_loader is not None and self._train_loader_of is self.trainer:
            self._train_loader.load_state_dict(state)
        else:
            self._train_state = state

    def all_examples(self) -> Iterator[list[Example]]:
        """Yields the training and the validation examples in the sources' order, a global batch at a time.

        Raises:
            ValueError: with ``streaming``, which never has all examples.
        """
        if self.streaming and self.sources["train"] is not None:
            raise ValueError("streaming=True never has all examples at once: set streaming=False")
        sizes: tuple[tuple[Split, int], ...] = (("train", self.global_batch_size), ("val", self.eval_batch_size))
        for split, size in sizes:
            if self.sources[split] is not None:
                store = self._store(split)
                yield from (store[start : start + size] for start in range(0, len(store), size))

    def couple(self) -> Couple | None:
        """Returns a function that changes examples jointly: of a global batch in training, else of a whole split."""
        return None

    def _open(self, split: Split) -> RowSource:
        stream = self.streaming and split == "train"
        source = open_source(self.sources[split], split=_SPLIT_NAMES[split], streaming=stream, columns=self.columns)
        return source if self.transform is None else TransformedRows(source, self.transform)

    def _source(self, split: Split) -> RowSource:
        if split in self._made:
            return self._made[split]
        source = self._open(split)
        return FilteredRows(source, self.filters) if self.filters and split == "train" else source

    def _placed(self) -> dict[str, int]:
        trainer = self.trainer
        if trainer is None:
            return {"rank": 0, "world_size": 1}
        return {"rank": trainer.global_rank, "world_size": trainer.world_size}

    def _reader(self, split: Split) -> RowReader:
        _ = self.rows  # load the tokenizer first: its errors must not be reported as a row's
        reader = RowReader(
            self._source(split),
            self.make_examples,
            max_length=self.max_length,
            on_too_long=self.on_too_long,
            on_bad_row=self.on_bad_row,
            opening=self.rows.first_tokens if self.on_too_long == "truncate_start" else (),
        )
        self.report[split] = reader.report
        return reader

    def _make_train_loader(self) -> BatchLoader:
        placed = self._placed()
        if self.global_batch_size < placed["world_size"]:
            few = f"global_batch_size={self.global_batch_size} over {placed['world_size']} ranks"
            rank_zero_warn(f"{few} leaves some of them without an example in every step")
        settings: dict[str, Any] = {"seed": self.seed, "drop_last": self.drop_last, "couple": self.couple(), **placed}
        # Lightning's `overfit_batches` repeats the same few batches.
        shuffle = self.shuffle and not getattr(self.trainer, "overfit_batches", 0)
        loader: BatchLoader
        if self.streaming:
            reader = self._reader("train")
            buffer = self.shuffle_buffer if shuffle else 0
            loader = StreamLoader(reader.source, reader.read, self.global_batch_size, shuffle_buffer=buffer, **settings)
        else:
            store = self._store("train")
            loader = ExampleLoader(
                store,
                self.global_batch_size,
                shuffle=shuffle,
                group_by_prompt=self.group_by_prompt,
                fingerprint=store.fingerprint(),
                **settings,
            )
        if self.drop_last and loader.num_rows is not None and loader.num_rows < self.global_batch_size:
            kind = "rows" if self.streaming else "examples"
            raise ValueError(
                f"drop_last=True leaves no batch of {loader.num_rows} training {kind} with global_batch_size="
                f"{self.global_batch_size}: set drop_last=False, or a global_batch_size of at most {loader.num_rows}"
            )

        # Set last, since a fraction needs the loader's length.
        loader.limit = self._limit(loader)
        loader.contract = self.contract
        return loader

    def _limit(self, loader: BatchLoader) -> int | None:
        """Returns the trainer's limit, so that the loader's epoch ends with the trainer's."""
        limit = None if self.trainer is None else self.trainer.limit_train_batches
        if limit is None or limit == 0 or (isinstance(limit, float) and limit == 1.0):
            return None
        if isinstance(limit, int):
            return limit
        # A fraction of the batches, if their number is known.
        return None if loader.num_rows is None else max(1, int(len(loader) * limit))

    def _eval_loader(self, split: Split) -> list[Any] | ExampleLoader:
        if self.sources[split] is None:
            if self.trainer is not None and self.trainer.state.fn == TrainerFn.FITTING:
                return []
            raise ValueError(f"there are no {split} rows: write {type(self).__name__}({split}='rows.jsonl')")
        couple, store = self.couple(), self._store(split)
        if couple is not None and split not in self._coupled:
            # Over the whole split, so that no result depends on the evaluation batch size.
            self._coupled[split] = ExampleStore(couple(list(store)))
        placed = self._placed()
        loader = ExampleLoader(
            self._coupled.get(split, store),
            self.eval_batch_size,
            shuffle=False,
            seed=self.seed,
            rank=placed["rank"],
            world_size=placed["world_size"],
        )
        loader.contract = self.contract
        return loader

    def _store(self, split: Split) -> ExampleStore:
        if split not in self._stores:
            reader = self._reader(split)
            entry = self._entry(reader.source)
            # Tokenized in an earlier run from the same rows, tokenizer, options and code.
            kept = None if entry is None else read_entry(entry)
            if kept is None:
                self._stores[split] = reader.read_all()
                if entry is not None:
                    write_entry(entry, self._stores[split], reader.report)
            else:
                self._stores[split], report = kept
                reader.report.update(report)
                rank_zero_info(f"{reader.describe()} (tokenized before)")
        return self._stores[split]

    def _entry(self, source: RowSource) -> str | None:
        """Returns the name under which examples are cached; ``None`` where they are not."""
        # Only the package's own datamodules: the code of a user's class is not part of the key.
        few = cache_folder() is None or (source.num_rows or 0) < LEAST_ROWS
        if few or type(self).__module__.rpartition(".")[0] != __package__:
            return None
        names = sorted(options_of(type(self)) - set(NOT_OF_EXAMPLES))
        options = {name: getattr(self, name) for name in names}
        return entry_name(source, self.tokenizer, {"class": type(self).__qualname__, **options})


def _check_least(name: str, value: int, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{name}={value!r}, expected a whole number of at least {least}")


def _check_choice(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{name}={value!r}, expected one of {', '.join(allowed)}")
