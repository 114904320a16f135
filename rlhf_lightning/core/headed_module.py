"""Base class of the methods that train a reward model, which they hold."""

from __future__ import annotations

from typing import Any, ClassVar, Self

from ..models.backbone import Layout
from ..models.headed_model import HeadedModel
from .module import PostTrainingModule
from .trainer_checks import trainer_dtype


class HeadedModule(PostTrainingModule):
    """Builds, scores with and writes the ``HeadedModel`` that a subclass trains.

    A subclass names the class of its model in ``model_type``, and sets ``options``, ``seed`` and ``head`` (``None``
    until the model is built) in its ``__init__``.

    Args:
        model: Hugging Face id or folder: of a language model, or of a model with a stored head, which is loaded.
        kwargs: options of ``PostTrainingModule``.

    Example:
        >>> from rlhf_lightning import RewardModule
        >>> module = RewardModule("HuggingFaceTB/SmolLM2-135M")
        >>> module.model_type.__name__, module.head is None
        ('RewardModel', True)
    """

    takes_compressor: ClassVar[bool] = False
    model_type: ClassVar[type[HeadedModel]]
    options: Any
    seed: int
    head: Any

    @classmethod
    def from_pretrained(cls, folder: str, **options: Any) -> Self:
        """Loads an exported model into a module, in evaluation mode.

        Args:
            folder: as for ``from_pretrained`` of the model, which needs no module to score texts.
            options: options of the module that override the stored ones.

        Raises:
            ValueError: the folder holds no head, or the head of another method.
        """
        module = cls(folder, **{**cls.model_type.stored_options(folder), **options})
        module.configure_model()
        return module.eval()

    @property
    def reward_model(self) -> Any:
        """The model that is trained: decoder and head, with their scoring; built on first access."""
        self.configure_model()
        return self._held[0]

    @property
    def predicts_tokens(self) -> bool:
        """Whether the decoder's output projection is read, for labels that are tokens; else the head replaces it."""
        return bool(self.options.predicts_tokens)

    @property
    def exports_head(self) -> bool:
        """Whether a head is written with the model; always true here."""
        return True

    @property
    def layout(self) -> Layout:
        """The layout of batches; decided once, when the model is on its device."""
        layout: Layout = self.reward_model.layout
        return layout

    def configure_model(self) -> None:
        """Builds the decoder with its adapters and its head, and loads the stored ones."""
        if self.is_configured:
            return
        super().configure_model()
        held = self.model_type(
            self.model,
            self.options,
            tokenizer=self.tokenizer if self.predicts_tokens else None,
            folder=self.model_source if self.init == "pretrained" else None,
            seed=self.seed,
            dtype=trainer_dtype(self._trainer),
            micro_batch_tokens=self.micro_batch_tokens,
            layout=self._requested_layout,
            share_prefix=self.share_prefix,
        )
        # In a list, so that its weights are registered once, as `model` and `head`.
        self._held, self.head = [held], held.head

    def scorer(self) -> Any:
        """Returns the model with the module's tokenizer, to score texts."""
        model = self.reward_model
        model.tokenizer = self.tokenizer
        return model

    def save_pretrained(self, folder: str, *, merge_adapter: bool = False) -> None:
        """Writes the model with its head, as ``save_pretrained`` of the model does.

        Args:
            folder: destination; written atomically, replacing an existing export.
            merge_adapter: merge the adapter into the weights and write the whole model.
        """
        self.reward_model.save_pretrained(folder, merge_adapter=merge_adapter, tokenizer=self._export_tokenizer())
