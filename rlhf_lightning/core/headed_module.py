"""Base class of reward models: a scalar head on a decoder, stored in the same folder."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar, Self

from torch import Tensor

from ..models import base_model
from ..models import save_pretrained as export_pretrained
from ..models.reward_head import (
    RewardHead,
    freeze_output_projection,
    head_files,
    load_head,
    read_head_options,
    read_head_state,
)
from .module import PostTrainingModule
from .trainer_checks import trainer_dtype


class HeadedModule(PostTrainingModule):
    """A module whose model is a decoder with a ``RewardHead``.

    Args:
        model: Hugging Face id or folder: of a language model, or of a model with a stored head, which is loaded.
        seed: seed of the head's initial weights.
        kwargs: options of ``PostTrainingModule``.
    """

    method: ClassVar[str]  # name of the method in an exported folder

    def __init__(self, model: str, *, seed: int = 0, **kwargs: Any) -> None:
        super().__init__(model, **kwargs)
        self.seed = seed
        self.head: Any = None

    def head_shape(self) -> dict[str, Any]:
        """Returns the arguments of ``RewardHead``; an empty dictionary builds no head."""
        raise TypeError(f"{type(self).__name__} must define head_shape()")

    def options(self) -> Mapping[str, Any]:
        """Returns the options that are stored with the head, from which ``from_pretrained`` rebuilds the module."""
        raise TypeError(f"{type(self).__name__} must define options()")

    @property
    def predicts_tokens(self) -> bool:
        """Always false here: the head replaces the output projection."""
        return False

    @property
    def exports_head(self) -> bool:
        """Whether a head is written with the model; always true here."""
        return True

    @classmethod
    def from_pretrained(cls, folder: str, **options: Any) -> Self:
        """Loads an exported model with its head, or a sequence classifier of transformers, in evaluation mode.

        Args:
            folder: folder written by ``save_pretrained``; for an outcome reward model also a folder or hub id of a
                sequence classifier whose head is a linear layer ``score`` without bias.
            options: options of the module that override the stored ones.

        Raises:
            ValueError: the folder holds no head, or the head of another method.
        """
        stored = read_head_options(folder) or _classifier_options(folder)
        if stored.pop("method", None) != cls.method:
            raise ValueError(f"{folder!r} holds no model that {cls.__name__} exported: train one with {cls.__name__}")
        stored.pop("member_means", None)  # no option: EnsembleModule.configure_model reads it
        module = cls(folder, **{**stored, **options})
        module.configure_model()
        return module.eval()

    def configure_model(self) -> None:
        """Builds the decoder and its head, and loads a head that is stored with the model."""
        if self.is_configured:
            return
        super().configure_model()
        assert self.model is not None
        if not self.predicts_tokens:
            freeze_output_projection(self.model)
        shape = self.head_shape()
        if not shape:
            return
        hidden_size = base_model(self.model).config.get_text_config().hidden_size
        self.head = RewardHead(hidden_size, **shape, seed=self.seed, dtype=trainer_dtype(self._trainer))
        if self.init == "pretrained":
            load_head(self.head, self.model_source)

    def head_outputs(self, states_SD: Tensor) -> Tensor:
        """Applies the head: ``(S, D) -> (S, M, K)``."""
        outputs: Tensor = self.head(states_SD)
        return outputs

    def save_pretrained(self, folder: str, *, merge_adapter: bool = False) -> None:
        """Writes the language model or its adapter, with its head in the same folder.

        The head is in ``reward_head.safetensors`` and its options in ``reward_head.json``; ``from_pretrained`` loads
        them.

        Args:
            folder: destination; written atomically, replacing an existing export.
            merge_adapter: merge the adapter into the weights and write the whole model.
        """
        self.configure_model()
        files = self.head_files_writer()
        export_pretrained(self.model, self._export_tokenizer(), folder, merge_adapter=merge_adapter, beside=files)

    def load_head_files(self, folder: str) -> None:
        """Loads the files that ``head_files_writer`` wrote, or the head of a sequence classifier.

        Args:
            folder: folder written by ``save_pretrained`` of a module with the same options.

        Raises:
            ValueError: the folder holds no head, or one of another shape.
        """
        if self.head is not None and not load_head(self.head, folder):
            raise ValueError(f"{folder!r} holds no head: export it again")

    def head_files_writer(self) -> Callable[[Path], None]:
        """Gathers the head on every rank and returns a function that writes it to a folder."""
        return head_files(self.head, {"method": self.method, **self.options()})


def _classifier_options(folder: str) -> dict[str, Any]:
    """Returns the options of an outcome reward model that is stored as a sequence classifier."""
    weight = read_head_state(folder).get("weight")
    return {} if weight is None else {"method": "reward", "num_attributes": weight.shape[1]}
