"""Writes predictions as JSON Lines, in the order of the rows, for any number of ranks."""

from __future__ import annotations

from itertools import chain, zip_longest
from pathlib import Path
from typing import IO, Any

import lightning

from ..core.checkpoint_io import check_place
from ..distributed.collectives import gather_objects
from ..utils.files import PARTIAL, hidden_sibling, json_line, json_values, on_first_rank

_MISSING = object()


class PredictionWriter(lightning.Callback):
    """Writes the results of ``predict``, a line of JSON per row; ``rlhf-lightning predict --output`` uses it.

    Rows are in the order of the source, for any number of ranks. The file appears when it is complete; until then the
    rows are in a hidden file next to it.

    Args:
        path: the file, which must not exist yet.

    Raises:
        ValueError: it exists, or cannot be written.

    Example::

        writer = PredictionWriter("scores.jsonl")
        lightning.Trainer(callbacks=[writer]).predict(module, data, return_predictions=False)
    """

    def __init__(self, path: str) -> None:
        self.path = Path(path).expanduser()
        self.num_rows = 0
        self._file: IO[str] | None = None

    def setup(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, stage: str) -> None:
        """Checks that the file can be written."""
        if stage == "predict" and not getattr(trainer, "fast_dev_run", False):
            on_first_rank(self._check_path)

    def _check_path(self) -> None:
        if self.path.exists():
            raise ValueError(f"output {str(self.path)!r} already exists: remove it, or write to another file")
        check_place(self.path.parent, "predictions")

    def on_predict_batch_end(
        self,
        trainer: lightning.Trainer,
        pl_module: lightning.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Writes the rows of a global batch, which ranks hold in turn."""
        ranks: list[list[Any]] = gather_objects(list(outputs or ()))
        if not getattr(trainer, "fast_dev_run", False):
            on_first_rank(lambda: self._append(ranks))

    def _append(self, ranks: list[list[Any]]) -> None:
        if self._file is None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = hidden_sibling(self.path, PARTIAL).open("w", encoding="utf-8")
        # Rank r has the rows r, r + world_size, ...: taking one of each rank in turn restores the order.
        for row in chain.from_iterable(zip_longest(*ranks, fillvalue=_MISSING)):
            if row is not _MISSING:
                self._file.write(json_line(json_values(row)))
                self.num_rows += 1

    def on_predict_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Moves the complete file to its place."""
        on_first_rank(self._finish)

    def _finish(self) -> None:
        if self._file is not None:
            self._file.close()
            hidden_sibling(self.path, PARTIAL).replace(self.path)
            self._file = None

    def on_exception(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, exception: BaseException
    ) -> None:
        """Removes the incomplete file."""
        if self._file is not None:
            self._file.close()
            hidden_sibling(self.path, PARTIAL).unlink(missing_ok=True)
            self._file = None
