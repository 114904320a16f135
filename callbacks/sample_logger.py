"""Shows completions of a policy during training."""

from __future__ import annotations

from typing import Any

import lightning
from lightning.fabric.utilities.rank_zero import rank_zero_only
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from ..rl.on_policy_module import OnPolicyModule
from ..rl.rollouts import Rollouts


class SampleLogger(lightning.Callback):
    """Shows completions of the current batch with their rewards: on the screen, and as tables in W&B.

    Samples are from rank 0's share. Every logger with a method ``log_table`` (``WandbLogger``) gets a table
    ``train/samples`` or ``val/samples`` with the step, prompt, completion, its length, whether it ended, the reward,
    and the value of every reward function.

    Args:
        every_n_batches: training iterations between two tables, at least 1; every validation shows one, too.
        num_prompts: prompts in a table, at least 1.
        num_samples: completions of each prompt, at least 1.
        screen: whether to print the table.

    Example::

        lightning.Trainer(callbacks=[SampleLogger(every_n_batches=10)]).fit(module, data)
    """

    def __init__(
        self, every_n_batches: int = 10, num_prompts: int = 2, num_samples: int = 4, screen: bool = True
    ) -> None:
        for name, value in (
            ("every_n_batches", every_n_batches),
            ("num_prompts", num_prompts),
            ("num_samples", num_samples),
        ):
            if value < 1:
                raise ValueError(f"{name} is {value}; it must be at least 1")
        self.every_n_batches = every_n_batches
        self.num_prompts = num_prompts
        self.num_samples = num_samples
        self.screen = screen

    def setup(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, stage: str) -> None:
        """Refuses, on every rank, a module that does not sample.

        Raises:
            ValueError: it is neither a GRPO nor a PPO module.
        """
        if not isinstance(pl_module, OnPolicyModule):
            name = type(pl_module).__name__
            raise ValueError(f"SampleLogger needs GRPOModule or PPOModule; {name} writes nothing: remove it")

    def on_train_batch_end(
        self,
        trainer: lightning.Trainer,
        pl_module: lightning.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Shows samples of the first iteration and of every n-th."""
        if batch_idx % self.every_n_batches == 0:
            self._show(trainer, pl_module, "train")

    def on_validation_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Shows samples of the last validation batch."""
        if not trainer.sanity_checking:
            self._show(trainer, pl_module, "val")

    @rank_zero_only
    def _show(self, trainer: lightning.Trainer, module: lightning.LightningModule, stage: str) -> None:
        assert isinstance(module, OnPolicyModule)
        if module.last_rollouts is None:
            return
        columns = ["step", "prompt", "completion", "tokens", "ended", "reward", *module.rewards.names]
        rows = self._rows(module, module.last_rollouts, trainer.global_step)
        # The step of this batch's metrics in Lightning; without one, W&B would use that of the previous metrics.
        place = trainer.fit_loop.epoch_loop._batches_that_stepped
        # Only loggers that know tables, as that of W&B.
        for logger in trainer.loggers:
            if hasattr(logger, "log_table"):
                logger.log_table(f"{stage}/samples", columns=columns, data=rows, step=place)
        if self.screen and rows:
            table = Table(
                *map(escape, columns[1:]), title=f"{stage} samples, step {trainer.global_step}", show_lines=True
            )
            for row in rows:
                # As plain text, since a completion may look like markup.
                table.add_row(*(Text(f"{value:.3g}" if isinstance(value, float) else str(value)) for value in row[1:]))
            Console().print(table)

    def _rows(self, module: OnPolicyModule, rollouts: Rollouts, step: int) -> list[list[Any]]:
        totals = [part.tolist() for part in module.combined(rollouts.rewards_SK).split(rollouts.sizes)]
        rewards = [part.tolist() for part in rollouts.rewards_SK.split(rollouts.sizes)]
        rows = []
        for n, prompt in enumerate(rollouts.prompts[: self.num_prompts]):
            text = module.prompt_text(prompt)
            for m, sample in enumerate(rollouts.completions[n][: self.num_samples]):
                ended = sample.finish_reason == "stop"
                row = [step, str(text), sample.text, len(sample.token_ids), ended, totals[n][m], *rewards[n][m]]
                rows.append(row)
        return rows
