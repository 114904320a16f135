"""What reward models have in common: a scalar head on a decoder, kept beside it in folders."""

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
        seed: what the head's first weights are drawn from.
        kwargs: options of ``PostTrainingModule``.
    """

    method: ClassVar[str]  # what a folder says that it holds

    def __init__(self, model: str, *, seed: int = 0, **kwargs: Any) -> None:
        super().__init__(model, **kwargs)
        self.seed = seed
        self.head: Any = None

    def head_shape(self) -> dict[str, Any]:
        """Arguments of ``RewardHead``; none where there is no head."""
        raise TypeError(f"{type(self).__name__} must define head_shape()")

    def options(self) -> Mapping[str, Any]:
        """What ``from_pretrained`` builds the module with again."""
        raise TypeError(f"{type(self).__name__} must define options()")

    @property
    def predicts_tokens(self) -> bool:
        """The head stands in the place of the output projection."""
        return False

    @property
    def exports_head(self) -> bool:
        """Whether a head is written beside the model: always here."""
        return True

    @classmethod
    def from_pretrained(cls, folder: str, **options: Any) -> Self:
        """Loads a model with its head, ready to score: one that was exported, or a sequence classifier of transformers.

        Args:
            folder: what ``save_pretrained`` wrote; for an outcome reward model also a folder or hub id of a sequence
                classifier whose head is a linear layer ``score`` without bias.
            options: of the module, in place of the stored ones.

        Raises:
            ValueError: the folder holds no head, or one of another kind of model.
        """
        stored = read_head_options(folder) or _classifier_options(folder)
        if stored.pop("method", None) != cls.method:
            raise ValueError(f"{folder!r} holds no model that {cls.__name__} exported: train one with {cls.__name__}")
        stored.pop("member_means", None)  # no option: EnsembleModule.configure_model reads it
        module = cls(folder, **{**stored, **options})
        module.configure_model()
        return module.eval()

    def configure_model(self) -> None:
        """Builds the decoder and its head; a head that is stored with the model is loaded."""
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
        """``(S, D) -> (S, M, K)``."""
        outputs: Tensor = self.head(states_SD)
        return outputs

    def save_pretrained(self, folder: str, *, merge_adapter: bool = False) -> None:
        """Writes the language model or its adapter, with its head beside it.

        The head is in ``reward_head.safetensors`` and its options in ``reward_head.json``; ``from_pretrained`` loads
        them.

        Args:
            folder: where to; it appears once it is complete, and replaces one that was there.
            merge_adapter: add the adapter to the weights and write the whole model.
        """
        self.configure_model()
        files = self.files_beside()
        export_pretrained(self.model, self._export_tokenizer(), folder, merge_adapter=merge_adapter, beside=files)

    def load_beside(self, folder: str) -> None:
        """Reads back what ``files_beside`` wrote, or the head of a sequence classifier.

        Args:
            folder: what ``save_pretrained`` of this module, or of one like it, wrote.

        Raises:
            ValueError: the folder holds no head, or another one.
        """
        if self.head is not None and not load_head(self.head, folder):
            raise ValueError(f"{folder!r} holds no head: export it again")

    def files_beside(self) -> Callable[[Path], None]:
        """Gathers what is stored beside the decoder, on every rank; returns what writes it."""
        return head_files(self.head, {"method": self.method, **self.options()})


def _classifier_options(folder: str) -> dict[str, Any]:
    """The options of an outcome reward model that is stored as a sequence classifier."""
    weight = read_head_state(folder).get("weight")
    return {} if weight is None else {"method": "reward", "num_attributes": weight.shape[1]}
