"""Samples come from the distribution that is trained, in half precision too."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model

from rlhf_lightning.inference import LocalEngine, SamplingParams
from rlhf_lightning.models import base_model
from rlhf_lightning.models.fused_head import fused_logprobs, output_head

from ..helpers import EOS_ID, tiny_model


@pytest.mark.parametrize("kind", ["bf16", "fp16", "autocast", "adapted", "saved", "fp32"])
@pytest.mark.parametrize("arch", ["llama", "gemma2"])  # gemma2 caps its logits
def test_sampled_log_probs_are_those_of_the_fused_head(kind: str, arch: str) -> None:
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(kind, torch.float32)
    if kind in ("adapted", "saved"):
        dtype = torch.bfloat16
    model: Any = tiny_model(arch, dtype=dtype)
    if kind in ("adapted", "saved"):
        model.config.tie_word_embeddings = False
        place = {"target_modules": ["lm_head"]} if kind == "adapted" else {"modules_to_save": ["lm_head"]}
        config = LoraConfig(task_type="CAUSAL_LM", r=2, **({"target_modules": ["q_proj"]} | place))
        model = get_peft_model(model, config).eval()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_B" in name or "modules_to_save" in name:
                    parameter.add_(0.3 * torch.randn_like(parameter))
    head: Any = base_model(model).get_output_embeddings()
    seen: list[torch.Tensor] = []
    handle = head.register_forward_pre_hook(lambda module, args: seen.append(args[0][:, -1].clone()))
    context: Any = torch.autocast("cpu", torch.bfloat16) if kind == "autocast" else nullcontext()
    params = SamplingParams(max_new_tokens=6, temperature=0.7, seed=1)
    with context, torch.no_grad():
        engine = LocalEngine(model, None)
        engine.generate([[5, 6, 7]], sampling=params)  # tries the layout
        seen.clear()
        (sample,) = engine.generate([[5, 6, 7]], sampling=params)[0]
        handle.remove()
        states = torch.cat(seen)[: len(sample.token_ids)]
        found = fused_logprobs(states, output_head(model), torch.tensor(sample.token_ids), temperature=0.7).logprobs
    assert sample.token_ids[-1] == EOS_ID or len(sample.token_ids) == 6
    assert torch.tensor(sample.logprobs) == pytest.approx(found, abs=2e-5 if kind != "adapted" else 2e-2)
    assert "forward" not in head.__dict__  # put back
