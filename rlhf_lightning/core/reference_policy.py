"""The reference policy: the policy as it was when training began, for preference losses and KL penalties."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import torch
from torch import nn

from ..distributed.collectives import Rows, copy_from_first_rank, gather_objects
from ..distributed.strategy import FSDP2Strategy
from ..models import AdapterReference, FrozenReference, Reference, evaluating, folder_fingerprint
from ..models.reference import trained_beside_adapters
from ..sequences import Example, ExampleBatch, SequenceBatch
from ..utils.progress import progress
from ..utils.transfer import to_host
from ..utils.validation import check_choice
from .device_precision import autocast_dtype

ReferenceKind = Literal["auto", "frozen", "adapter", "precomputed"]


class ReferencePolicy:
    """Builds, scores with, and saves the reference policy of a module, which holds it as ``reference``.

    The module's ``reference_rows(batch, model)`` computes what a loss needs of it.

    Args:
        module: a ``PostTrainingModule``; no reference is built while its ``uses_reference`` is false, unless ``kind``
            asks for one.
        kind: ``"frozen"``: a second model in memory, part of no checkpoint unless it was drawn at random;
            ``"adapter"``: the LoRA policy with its adapter off (or, where training starts from a loaded adapter, a
            frozen copy of it); ``"precomputed"``: log-probs of all rows, computed before the first step, with no
            reference in memory afterwards; ``"auto"``: ``adapter`` with LoRA, else ``frozen``.

    Raises:
        ValueError: ``kind`` is another word.

    Example:
        >>> from rlhf_lightning import DPOModule
        >>> DPOModule("HuggingFaceTB/SmolLM2-135M", reference="precomputed").reference.kind
        'precomputed'
    """

    def __init__(self, module: Any, kind: ReferenceKind) -> None:
        check_choice("reference", kind, ("auto", "frozen", "adapter", "precomputed"))
        self.module = module
        self.kind = kind
        self.policies: list[Reference] = []  # one, or none
        self._table: dict[str, Rows] = {}
        self._lost_table = False
        self._shared = False

    @property
    def models(self) -> list[nn.Module]:
        """The frozen copy, which runs in the policy's layout with the policy's attention."""
        return [reference.model for reference in self.policies if isinstance(reference, FrozenReference)]

    def build(self) -> None:
        """Builds the reference from the policy that was just loaded."""
        module = self.module
        if self.kind == "auto" and not module.uses_reference:
            return

        has_adapter = hasattr(module.model, "peft_config")

        # With an adapter that does not begin at zero, the model without it is not the initial policy.
        drawn = module.lora is not None and module.lora.get("init_lora_weights", True) is False
        if self.kind == "adapter" and drawn:
            raise ValueError(
                "reference is 'adapter', but lora's init_lora_weights is false, so that the adapter does not begin at "
                "zero: use reference='frozen'"
            )
        if self.kind == "adapter" and not has_adapter:
            raise ValueError(
                "reference is 'adapter', but the model has no adapter: give lora={'r': 16}, or use 'frozen'"
            )

        # Trained weights outside the adapter are swapped while the reference scores. Shards cannot be swapped: another
        # rank may need them in the same pass.
        strategy = None if module._trainer is None else module._trainer.strategy
        mixed = has_adapter and isinstance(strategy, FSDP2Strategy) and bool(trained_beside_adapters(module.model))
        if self.kind == "adapter" and mixed:
            name = next(iter(trained_beside_adapters(module.model)))
            raise ValueError(
                f"reference is 'adapter' with strategy 'fsdp2', but {name} is trained in addition to the adapter: use "
                "reference='frozen', or lora's bias='none'"
            )

        if self.kind == "precomputed":
            return
        if has_adapter and self.kind != "frozen" and not drawn and not mixed:
            self.policies = [AdapterReference(module.model)]
        else:
            self.policies = [
                FrozenReference.copy_of(module.model, rebuildable=module.init == "pretrained" and not drawn)
            ]

    def rows(self, batch: SequenceBatch) -> Rows:
        """Returns the reference's rows of a batch: computed now, or looked up if they were precomputed."""
        rows: Rows
        if self.policies:
            with self.policies[0].scoring() as model:
                rows = self.module.reference_rows(batch, model)
            return rows
        if not self._table:  # nothing was trained or precomputed: the policy is its own reference
            rows = self.module.reference_rows(batch, self.module.model)
            return rows
        extra = self.module.extra(batch)
        return {name: extra[name] for name in self._names}

    @property
    def _names(self) -> list[str]:
        return list(next(iter(self._table.values()), {}))

    def arrays(self, examples: Sequence[Example]) -> dict[str, np.ndarray]:
        """Looks the rows of examples up, if they were precomputed and are used; otherwise returns an empty dict.

        Raises:
            ValueError: an example was not there when they were computed.
        """
        if self.policies or not self._table:
            return {}
        try:
            found = [self._table[example.content_hash()] for example in examples]
        except KeyError:
            missing = next(e.row_id for e in examples if e.content_hash() not in self._table)
            raise ValueError(
                f"row {missing} was not there when the reference's log-probs were precomputed: use reference='frozen', "
                "or start again with this data"
            ) from None
        return {name: torch.stack([row[name] for row in found]).numpy() for name in self._names}

    def begin_fit(self) -> None:
        """Precomputes the reference's rows with ``reference="precomputed"``."""
        if self.kind == "precomputed" and not self._table:
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
        trainer = self.module._trainer
        fitting = trainer is not None and trainer.state.fn == "fit"
        for reference in self.policies:
            # Weights that validation's inference mode moves could not be used outside of it.
            with torch.inference_mode(False):
                reference.remember()
                reference.to(self.module.device)
            if fitting and isinstance(reference, FrozenReference) and not self._shared:
                if not reference.rebuildable:
                    copy_from_first_rank([*reference.model.parameters(), *reference.model.buffers()])
                self._shared = True
            if fitting and isinstance(reference, FrozenReference):
                reference.hold(autocast_dtype(trainer))

    def _precompute(self) -> None:
        """Scores every training and validation row with the untrained policy, which is the reference."""
        datamodule: Any = getattr(self.module.trainer, "datamodule", None)
        if datamodule is None or not hasattr(datamodule, "all_examples"):
            raise ValueError(
                "reference='precomputed' reads its rows from one of rlhf_lightning.datamodules in memory; "
                "use reference='frozen' with other loaders or streaming data"
            )
        module = self.module
        rank, world = module.global_rank, module.trainer.world_size
        table: dict[str, Rows] = {}
        for examples in progress(datamodule.all_examples(), "scoring the reference, batches"):
            local = module.validate_batch(ExampleBatch(examples[rank::world]))
            autocast = module.trainer.precision_plugin.forward_context()
            with autocast, evaluating(module.model), torch.no_grad():
                rows = to_host(
                    module.micro_batching.map(local, lambda batch: module.reference_rows(batch, module.model))
                )
            for n, example in enumerate(local):
                table[example.content_hash()] = {name: value[n].clone() for name, value in rows.items()}
        self._table = {key: row for part in gather_objects(table) for key, row in part.items()}

    # Checkpoints hold only what cannot be rebuilt.

    def save(self, checkpoint: dict[str, Any]) -> None:
        """Adds the reference state that cannot be rebuilt, and a fingerprint of the weights that it starts from."""
        state: dict[str, Any] = {"fingerprint": folder_fingerprint(self.module.model_source)}
        for reference in self.policies:
            state["weights"] = reference.state_dict()
        if self._table:
            state["table"] = self._table
        checkpoint["reference"] = state

    def load(self, checkpoint: dict[str, Any]) -> None:
        """Restores the reference, and raises if the weights that it starts from have changed."""
        for reference in self.policies:
            reference.remember()  # before weights are loaded
        state = checkpoint.get("reference", {})
        now, then = folder_fingerprint(self.module.model_source), state.get("fingerprint")
        if self.module.init == "pretrained" and now is not None and then is not None and now != then:
            raise ValueError(
                f"the weights in {self.module.model_source} are not the initial ones of this training, and they are "
                "the reference policy: restore them, or start a new run"
            )
        self._table = state.get("table", {})
        self._lost_table = self.kind == "precomputed" and not self._table
        for reference in self.policies:
            reference.load_state_dict(state.get("weights", {}))
