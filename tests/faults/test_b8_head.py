"""The output projection: an adapter's dropout acts on it, and a temperature does not round hidden states again."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from rlhf_lightning import DPOModule, SFTModule
from rlhf_lightning.models.fused_head import OutputHead, fused_logprobs, output_head
from rlhf_lightning.sequences import pack

from ..helpers import save_tiny_model
from ..invariance.methods import demonstrations


@pytest.mark.parametrize("temperature", [0.7, 1.0, 3.0])
@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("scale", [1.0, 0.3])
def test_the_temperature_scales_logits_and_rounds_nothing(
    temperature: float, softcap: float | None, scale: float
) -> None:
    torch.manual_seed(0)
    hidden, weight = torch.randn(40, 64).bfloat16() * 3, torch.randn(90, 64).bfloat16()
    bias, low_in, low_out = torch.randn(90).bfloat16(), torch.randn(2, 64).bfloat16(), torch.randn(90, 2).bfloat16()
    targets = torch.randint(0, 90, (40,))
    head = OutputHead(weight, bias, scale=scale, softcap=softcap)
    # Gradients of bf16 tensors are rounded once, so they are compared in fp32 leaves of the same values.
    for adapter in (False, True):
        leaves = [t.float().requires_grad_() for t in (hidden, weight, bias, low_in, low_out)]
        h, w, b, a_in, a_out = leaves
        logits = h @ w.T + b + (0.5 * (h @ a_in.T) @ a_out.T if adapter else 0)
        logits = logits * scale
        logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
        expected = (logits / temperature).log_softmax(-1).gather(1, targets[:, None])[:, 0]
        if not adapter:
            found = fused_logprobs(hidden, head, targets, temperature=temperature).logprobs
            assert (found - expected).abs().max() < 1e-4  # bf16 steps at these logits are 0.25
        parts = {"lora_in": a_in, "lora_out": a_out, "lora_scaling": 0.5} if adapter else {}
        exact = OutputHead(w, b, scale=scale, softcap=softcap, **parts)
        found = fused_logprobs(h, exact, targets, temperature=temperature).logprobs
        assert torch.allclose(found, expected, atol=1e-4)
        used = leaves if adapter else leaves[:3]
        gradients = torch.autograd.grad(expected.square().sum(), used)
        for one, other in zip(torch.autograd.grad(found.square().sum(), used), gradients, strict=True):
            assert (one - other).norm() <= 1e-4 * other.norm()


def test_an_adapted_head_drops_of_its_own_input(tmp_path: Path) -> None:
    folder = str(save_tiny_model(tmp_path, "llama"))
    lora = {"r": 2, "lora_dropout": 0.5, "target_modules": ["lm_head"]}
    batch = pack(demonstrations(4))

    def logprobs(module: SFTModule | DPOModule) -> tuple[torch.Tensor, torch.Tensor]:
        module.configure_model()
        layer = module.model.get_base_model().lm_head
        with torch.no_grad():
            layer.lora_B["default"].weight.normal_()
        torch.manual_seed(7)
        found = module.token_stats(batch).logprobs
        # By hand: the layer's own forward on the hidden states, with the same masks.
        decoder = module.model.get_base_model().model
        rows = []
        for example in batch.examples:
            for path in example.root.paths():
                ids = torch.tensor([int(t) for segment in path for t in segment.tokens])
                rows.append(decoder(input_ids=ids[None]).last_hidden_state[0])
        read = torch.stack(
            [rows[s][d] for s, d in zip(batch.sequence_index.tolist(), batch.source_depth.tolist(), strict=True)]
        )
        torch.manual_seed(7)
        logits = layer(read)
        return found, logits.log_softmax(-1).gather(1, batch.target_ids[:, None])[:, 0]

    found, expected = logprobs(SFTModule(folder, lora=lora, share_prefix=False, layout="padded"))
    assert torch.allclose(found, expected, atol=1e-4)
    plain, _ = logprobs(DPOModule(folder, lora=lora))
    assert (plain - found).abs().max() > 1e-3


def test_the_head_knows_its_dropout_only_where_there_is_an_adapter(tmp_path: Path) -> None:
    module = SFTModule(str(save_tiny_model(tmp_path, "llama")), lora={"r": 2, "lora_dropout": 0.5})
    module.configure_model()
    assert output_head(module.model).lora_dropout is None  # all-linear leaves the output projection out
