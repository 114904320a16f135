"""Base class of methods that compare the policy with a reference policy."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import nn

from ..distributed.collectives import Rows, copy_from_first_rank, gather_objects
from ..distributed.strategy import FSDP2Strategy
from ..models import AdapterReference, FrozenReference, Reference, evaluating, folder_fingerprint
from ..models.reference import trained_beside_adapters
from ..sequences import ExampleBatch, SequenceBatch
from ..utils.progress import progress
from ..utils.validation import check_choice
from .module import PostTrainingModule


class ReferencedModule(PostTrainingModule):
    """A module with a reference policy, which is the policy as it was when training began.

    Args:
        model: Hugging Face id or folder.
        reference: ``"frozen"``: a second model in memory, part of no checkpoint unless it was drawn at random;
            ``"adapter"``: the LoRA policy with its adapter off (or, where training starts from a loaded adapter, a
            frozen copy of it); ``"precomputed"``: log-probs of all rows, computed before the first step, with no
            reference in memory afterwards; ``"auto"``: ``adapter`` with LoRA, else ``frozen``.
        kwargs: options of ``PostTrainingModule``.
    """

    def __init__(
        self, model: str, *, reference: Literal["auto", "frozen", "adapter", "precomputed"] = "auto", **kwargs: Any
    ) -> None:
        check_choice("reference", reference, ("auto", "frozen", "adapter", "precomputed"))
        super().__init__(model, **kwargs)
        self.reference_kind = reference
        # In a list, so that it is not registered as a submodule: no optimizer, gradient bucket or checkpoint sees it.
        self._reference: list[Reference] = []
        self._reference_table: dict[str, Rows] = {}
        self._lost_table = False
        self._shared_reference = False

    @property
    def references(self) -> list[Reference]:
        """The reference policy in a list, which is empty where none is in memory."""
        return self._reference

    @property
    def models_alike(self) -> list[nn.Module]:
        """The frozen copy, which runs in the policy's layout with the policy's attention."""
        return [reference.model for reference in self._reference if isinstance(reference, FrozenReference)]

    def reference_rows(self, batch: SequenceBatch, model: nn.Module) -> Rows:
        """Computes the reference's rows of a batch, each from the content of its own example alone."""
        raise TypeError(f"{type(self).__name__} must define reference_rows(batch, model)")

    def configure_model(self) -> None:
        """Builds the policy, then its reference."""
        if self.is_configured:
            return
        super().configure_model()
        assert self.model is not None
        has_adapter = hasattr(self.model, "peft_config")

        # With an adapter that does not begin at zero, the model without it is not the initial policy.
        drawn = self.lora is not None and self.lora.get("init_lora_weights", True) is False
        if self.reference_kind == "adapter" and drawn:
            raise ValueError(
                "reference is 'adapter', but lora's init_lora_weights is false, so that the adapter does not begin at "
                "zero: use reference='frozen'"
            )
        if self.reference_kind == "adapter" and not has_adapter:
            raise ValueError(
                "reference is 'adapter', but the model has no adapter: give lora={'r': 16}, or use 'frozen'"
            )

        # Trained weights outside the adapter are swapped while the reference scores. Shards cannot be swapped: another
        # rank may need them in the same pass.
        strategy = None if self._trainer is None else self._trainer.strategy
        mixed = has_adapter and isinstance(strategy, FSDP2Strategy) and bool(trained_beside_adapters(self.model))
        if self.reference_kind == "adapter" and mixed:
            beside = next(iter(trained_beside_adapters(self.model)))
            raise ValueError(
                f"reference is 'adapter' with strategy 'fsdp2', but {beside} is trained beside the adapter: use "
                "reference='frozen', or lora's bias='none'"
            )

        if self.reference_kind == "precomputed":
            return
        if has_adapter and self.reference_kind != "frozen" and not drawn and not mixed:
            self._reference = [AdapterReference(self.model)]
        else:
            self._reference = [FrozenReference.copy_of(self.model, rebuildable=self.init == "pretrained" and not drawn)]

    def no_grad_reference_rows(self, batch: SequenceBatch) -> Rows:
        """Returns the reference's rows of a batch: computed now, or looked up if they were precomputed."""
        if self._reference:
            with self._reference[0].scoring() as model:
                return self.reference_rows(batch, model)
        if not self._reference_table:  # nothing was trained or precomputed: the policy is its own reference
            return self.reference_rows(batch, self.model)
        try:
            found = [self._reference_table[example.content_hash()] for example in batch.examples]
        except KeyError:
            missing = next(e.row_id for e in batch.examples if e.content_hash() not in self._reference_table)
            raise ValueError(
                f"row {missing} was not there when the reference's log-probs were precomputed: use reference='frozen', "
                "or start again with this data"
            ) from None
        return {name: torch.stack([row[name] for row in found]).to(self.device) for name in found[0]}

    def on_fit_start(self) -> None:
        """Precomputes the reference's rows with ``reference="precomputed"``."""
        super().on_fit_start()
        if self.reference_kind == "precomputed" and not self._reference_table:
            if self._lost_table:
                raise ValueError(
                    "the checkpoint holds no precomputed log-probs, and the policy has moved: resume with the "
                    "reference that it was trained with, reference='frozen'"
                )
            self._precompute()

    def place_on_device(self) -> None:
        """Places the reference on the module's device; before training, all ranks copy that of rank 0.

        DDP broadcasts the policy of rank 0, but a reference of randomly drawn weights was copied before that.
        """
        super().place_on_device()
        fitting = self._trainer is not None and self._trainer.state.fn == "fit"
        for reference in self._reference:
            reference.remember()
            reference.to(self.device)
            if fitting and isinstance(reference, FrozenReference) and not self._shared_reference:
                if not reference.rebuildable:
                    copy_from_first_rank([*reference.model.parameters(), *reference.model.buffers()])
                self._shared_reference = True

    def _precompute(self) -> None:
        """Scores every training and validation row with the untrained policy, which is the reference."""
        datamodule: Any = getattr(self.trainer, "datamodule", None)
        if datamodule is None or not hasattr(datamodule, "all_examples"):
            raise ValueError(
                "reference='precomputed' reads its rows from one of rlhf_lightning.datamodules in memory; "
                "use reference='frozen' with other loaders or streaming data"
            )
        rank, world = self.global_rank, self.trainer.world_size
        table: dict[str, Rows] = {}
        for examples in progress(datamodule.all_examples(), "scoring the reference, batches"):
            own = self.validate_batch(ExampleBatch(examples[rank::world]))
            autocast = self.trainer.precision_plugin.forward_context()
            with autocast, evaluating(self.model), torch.no_grad():
                rows = self.in_micro_batches(own, lambda batch: self.reference_rows(batch, self.model))
            for n, example in enumerate(own):
                table[example.content_hash()] = {name: value[n].cpu() for name, value in rows.items()}
        self._reference_table = {key: row for part in gather_objects(table) for key, row in part.items()}

    # Checkpoints hold only what cannot be rebuilt.

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Adds the reference state that cannot be rebuilt, and a fingerprint of the weights that it starts from."""
        super().on_save_checkpoint(checkpoint)
        state: dict[str, Any] = {"fingerprint": folder_fingerprint(self.model_source)}
        for reference in self._reference:
            state["weights"] = reference.state_dict()
        if self._reference_table:
            state["table"] = self._reference_table
        checkpoint["reference"] = state

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restores the reference, and raises if the weights that it starts from have changed."""
        super().on_load_checkpoint(checkpoint)
        for reference in self._reference:
            reference.remember()  # before weights are loaded
        state = checkpoint.get("reference", {})
        now, then = folder_fingerprint(self.model_source), state.get("fingerprint")
        if self.init == "pretrained" and now is not None and then is not None and now != then:
            raise ValueError(
                f"the weights in {self.model_source} are not those that training began with, and they are the "
                "reference policy: restore them, or start a new run"
            )
        self._reference_table = state.get("table", {})
        self._lost_table = self.reference_kind == "precomputed" and not self._reference_table
        for reference in self._reference:
            reference.load_state_dict(state.get("weights", {}))
