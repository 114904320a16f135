"""Accuracy of generated completions, which a loss on given texts does not measure."""

from __future__ import annotations

from typing import Any

import lightning

from ..core import PostTrainingModule
from ..distributed.collectives import sum_over_ranks
from ..distributed.unshard import gathered
from ..evaluation.answers import answer_prompts, load_verifier, read_prompts
from ..inference import LocalEngine, SamplingParams
from ..inference.answering import StrategyOption
from ..sequences import Example, ExampleBatch


class GenerationAccuracy(lightning.Callback):
    """Logs ``val/accuracy``: the mean reward of greedy completions, after every validation and before training.

    With ``strategy``, the rewarded completions are the results of searches with the policy. Behind a compressor, rows
    have a column ``context``, which the policy sees compressed.

    Each rank answers its own share of the prompts. The value before the first step is sent to the loggers only: early
    stopping and ``ModelExport`` compare only values measured during training.

    Args:
        prompts: source of the prompts, as for ``PromptDataModule``; rows need the columns that the verifier reads.
        verifier: dotted path of a reward function, called as ``fn(prompts, completions, **columns)``.
        max_new_tokens: maximum number of tokens of a completion, at least 1.
        limit: number of prompts to use, from the first, at least 1; all if omitted.
        name: logged as ``val/<name>``.
        before_training: also measure before the first step.
        chat_template_kwargs: passed to the chat template; the rows' own override them by name; by default those of
            the trainer's datamodule.
        strategy: as in ``inference.build_strategy``; its ``sampling``, by default at temperature 1, draws samples of
            at most ``max_new_tokens``. Its scorers are loaded once.

    Example::

        accuracy = GenerationAccuracy("sums:prompts?split=validation&rows=200", max_new_tokens=64)
        stop = EarlyStopping("val/accuracy", mode="max", patience=3)
        lightning.Trainer(callbacks=[accuracy, stop], val_check_interval=8).fit(module, data)
    """

    def __init__(
        self,
        prompts: str | list[str],
        verifier: str = "rlhf_lightning.rewards.exact_answer",
        max_new_tokens: int = 256,
        limit: int | None = None,
        name: str = "accuracy",
        before_training: bool = True,
        chat_template_kwargs: dict[str, Any] | None = None,
        strategy: str | dict[str, Any] | None = None,
    ) -> None:
        self.prompts = prompts
        self.verifier = load_verifier(verifier)
        self.sampling = SamplingParams(max_new_tokens=max_new_tokens, temperature=0.0)
        self.limit = limit
        self.name = f"val/{name}"
        self.before_training = before_training
        self.chat_template_kwargs = chat_template_kwargs
        self.strategy = StrategyOption(strategy, own_sampling=True)
        self._examples: list[Example] | None = None
        self._read_with: tuple[Any, Any] | None = None  # tokenizer and settings of the prompts
        self._measured: tuple[int, int] | None = None  # id of the module, and step

    def on_train_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Measures the model before training."""
        if not self.before_training or trainer.global_step > 0 or self._measured == (id(pl_module), 0):
            return
        # Logged directly: Lightning has no step before the first.
        value = self.measure(trainer, pl_module)
        for logger in trainer.loggers:
            logger.log_metrics({self.name: value}, step=0)

    def on_validation_epoch_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Measures the model that has just been validated."""
        if not trainer.sanity_checking:
            value = self.measure(trainer, pl_module)
            pl_module.log(self.name, value, prog_bar=True, on_epoch=True, batch_size=1)

    def measure(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> float:
        """Answers the prompts and returns the mean reward over all ranks.

        Raises:
            ValueError: the module is not a ``PostTrainingModule``, or has a compressor and the callback a strategy, or
                the verifier rewards no prompt.
        """
        if not isinstance(pl_module, PostTrainingModule):
            raise ValueError(
                f"GenerationAccuracy needs a PostTrainingModule; it was given a {type(pl_module).__name__}"
            )

        if pl_module.front is not None and self.strategy.spec is not None:
            raise ValueError(
                "GenerationAccuracy has a strategy, and the module a compressor, whose contexts searches do not "
                "follow: leave strategy out"
            )

        # The prompts are rendered with the settings of training.
        settings = self.chat_template_kwargs
        if settings is None:
            settings = getattr(getattr(trainer, "datamodule", None), "chat_template_kwargs", None)
        if self._examples is None or self._read_with != (pl_module.tokenizer, settings):
            self._read_with = (pl_module.tokenizer, settings)
            self._examples = read_prompts(
                self.prompts, pl_module.tokenizer, limit=self.limit, chat_template_kwargs=settings
            )

        # Each rank answers its share. Sums are added, since shares may differ in size.
        local_examples = self._examples[trainer.global_rank :: trainer.world_size]
        engine = self.strategy.on(LocalEngine(pl_module.model, pl_module.tokenizer))
        sampling = self.strategy.sampling(engine, self.sampling)
        # In the precision of training. Searches take different numbers of rounds on each rank.
        with trainer.precision_plugin.forward_context(), gathered(pl_module.model):
            contexts = None
            if pl_module.front is not None:
                local_examples = pl_module.front.follow(ExampleBatch(local_examples)).examples
                contexts = pl_module.front.contexts(local_examples)
            groups = answer_prompts(engine, local_examples, self.verifier, sampling=sampling, contexts=contexts)
        rewards = [answer.reward for group in groups for answer in group if answer.reward is not None]
        sums = {"reward": float(sum(rewards)), "rows": float(len(rewards))}
        totals = sum_over_ranks(sums)
        if not totals["rows"]:
            raise ValueError(f"no reward for any of the prompts {self.prompts!r}: they lack what the verifier reads")
        self._measured = (id(pl_module), trainer.global_step)
        return totals["reward"] / totals["rows"]
