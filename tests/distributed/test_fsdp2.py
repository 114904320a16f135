"""What ``fully_shard`` is told, and what stays where it is; values over ranks: ``test_strategy.py``."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.fsdp import CPUOffloadPolicy
from torch.distributed.fsdp._fully_shard._fsdp_param import FSDPParam
from torch.distributed.tensor import DTensor, Replicate, Shard
from transformers import GenerationConfig

from rlhf_lightning import DPOModule, FSDP2Strategy
from rlhf_lightning.core.gradients import clip_gradients
from rlhf_lightning.distributed import fsdp2
from rlhf_lightning.distributed.fsdp2 import block_options, copies_of, local_shard, rank_mesh, shard_model, sharded_like
from rlhf_lightning.models import base_model

from ..helpers import save_tiny_model, tiny_model

CPU = torch.device("cpu")


@pytest.fixture
def alone() -> Iterator[None]:
    """A process group of this process."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.fixture
def four_fake_ranks() -> Iterator[None]:
    """Rank 2 of a process group of four that talks to nobody."""
    dist.init_process_group("fake", rank=2, world_size=4)
    yield
    dist.destroy_process_group()


def test_blocks_are_offloaded_on_gpus_alone() -> None:
    gpu: Any = SimpleNamespace(device_type="cuda")
    cpu: Any = SimpleNamespace(device_type="cpu")
    policy = block_options(gpu, cpu_offload=True)["offload_policy"]
    assert isinstance(policy, CPUOffloadPolicy)
    assert policy.pin_memory
    assert block_options(gpu, cpu_offload=False) == {}
    assert block_options(cpu, cpu_offload=True) == {}


def test_offloaded_blocks_stay_where_they_are(alone: None, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[tuple[type, Any]] = []
    fully_shard = fsdp2.fully_shard

    def spy(module: Any, **options: Any) -> Any:
        told.append((type(module), options.get("offload_policy")))
        return fully_shard(module, **options)

    policy = CPUOffloadPolicy(pin_memory=False)
    monkeypatch.setattr(fsdp2, "fully_shard", spy)
    monkeypatch.setattr(fsdp2, "block_options", lambda mesh, cpu_offload: {"offload_policy": policy})
    model = tiny_model("llama")
    shard_model(model, rank_mesh("cpu", 1, 1), CPU, cpu_offload=True)
    assert [(name.__name__, given) for name, given in told] == [
        ("LlamaDecoderLayer", policy),
        ("LlamaDecoderLayer", policy),
        ("ShardedRoot", None),
    ]
    model.to("meta")
    blocks: Any = model.model.layers
    assert {p.device.type for p in blocks.parameters()} == {"cpu"}
    assert next(model.parameters()).device.type == "meta"  # the embeddings tell where a model computes
    blocks.to(torch.float64)
    assert {(p.device.type, p.dtype) for p in blocks.parameters()} == {("cpu", torch.float64)}


def test_a_pair_of_ranks_shares_a_copy(four_fake_ranks: None) -> None:
    mesh = rank_mesh("cpu", 4, 2)
    assert mesh.mesh.tolist() == [[0, 1], [2, 3]]
    like = DTensor.from_local(
        torch.zeros(3, 2), mesh, (Replicate(), Shard(0)), run_check=False, shape=torch.Size((5, 2)), stride=(2, 1)
    )
    assert copies_of(like) == 2
    whole = torch.arange(10.0).view(5, 2)
    assert local_shard(whole, like).tolist() == whole[:3].tolist()  # rank 2 is the first of its pair
    shard = sharded_like(whole, like)
    assert shard.shape == (5, 2)
    assert shard.to_local().tolist() == whole[:3].tolist()
    all_of_them = rank_mesh("cpu", 4, 4)
    assert all_of_them.ndim == 1
    quarter = DTensor.from_local(
        torch.zeros(2, 2), all_of_them, (Shard(0),), run_check=False, shape=torch.Size((8, 2)), stride=(2, 1)
    )
    assert copies_of(quarter) == 1
    assert local_shard(torch.arange(16.0).view(8, 2), quarter).tolist() == [[8, 9], [10, 11]]


def test_a_copy_counts_for_its_part_of_a_norm(four_fake_ranks: None) -> None:
    """A fake group adds nothing up, so the norm is that of this rank's part: half of 3^2 + 4^2 for two copies."""
    parameter = torch.nn.Parameter(
        DTensor.from_local(torch.zeros(2), rank_mesh("cpu", 4, 2), (Replicate(), Shard(0)), run_check=False)
    )
    parameter.grad = DTensor.from_local(
        torch.tensor([3.0, 4.0]), parameter.device_mesh, parameter.placements, run_check=False
    )
    assert float(clip_gradients([parameter], 100.0)) == pytest.approx(12.5**0.5)


def test_a_backend_that_cannot_reach_host_memory_is_refused() -> None:
    with pytest.raises(
        ValueError, match=r"process_group_backend is 'nccl' with cpu_offload=True.*write 'cpu:gloo,cuda:nccl'"
    ):
        FSDP2Strategy("nccl", cpu_offload=True)


def test_ranks_take_over_what_only_the_first_one_has_read(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Rank 1 builds a model without weights: its fingerprint of an adapter's base would be one of nothing."""
    module = DPOModule(save_tiny_model(tmp_path / "policy", "qwen2"), lora={"r": 2})
    module.configure_model()
    own = module.resume.base
    first: dict[str, Any] = {"generation": [GenerationConfig(max_length=7)], "base": {"weights": "rank 0"}}
    first["random"] = torch.Generator().manual_seed(3).get_state()
    sent = []
    monkeypatch.setattr(FSDP2Strategy, "broadcast", lambda self, value: sent.append(value) or first)
    FSDP2Strategy()._agree_on_the_rest(module, [module.model])
    assert own
    assert sent[0]["base"] == own
    assert module.resume.base == {"weights": "rank 0"}
    assert base_model(module.model).generation_config.max_length == 7
    assert torch.equal(torch.get_rng_state(), first["random"])


TOKENS = torch.tensor([[5, 6, 7, 8, 9], [11, 4, 12, 30, 7]])


def pass_of(model: Any) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
        logits = model(input_ids=TOKENS, use_cache=False).logits
        logits.float().logsumexp(-1).sum().backward()
    weights = {n.replace("_sharded_root.", ""): p for n, p in model.named_parameters()}
    return logits.detach(), {
        n: p.grad.full_tensor() if isinstance(p.grad, DTensor) else p.grad for n, p in weights.items()
    }


@pytest.mark.parametrize(
    ("arch", "half"),
    [
        ("llama", torch.bfloat16),
        ("qwen3", torch.bfloat16),
        ("qwen3", None),
        ("gpt2", torch.bfloat16),
        ("qwen3_moe", torch.bfloat16),
    ],
)
def test_blocks_are_gathered_in_the_precision_of_their_products(
    arch: str, half: torch.dtype | None, alone: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Half the bytes, and the results of autocast on whole weights; blocks with other weights stay as they were."""
    model = tiny_model(arch).requires_grad_(True).train().bfloat16().float()
    plain = copy.deepcopy(model)
    expected = pass_of(plain)
    weights = sum(p.numel() for block in fsdp2.decoder_blocks(model) for p in block.parameters())
    shard_model(model, rank_mesh("cpu", 1, 1), CPU, half=half)

    sent: dict[int, int] = {}
    inputs: Any = FSDPParam.all_gather_inputs

    def counted(parameter: Any) -> Any:
        given = inputs.fget(parameter)
        sent[id(parameter)] = sum(tensor.nbytes for tensor in given)
        return given

    monkeypatch.setattr(FSDPParam, "all_gather_inputs", property(counted))
    found = pass_of(model)
    each = 2 if half is not None and arch in ("llama", "qwen3") else 4
    assert sum(sent.values()) == each * weights + 4 * (sum(p.numel() for p in plain.parameters()) - weights)

    assert torch.equal(found[0], expected[0])
    for name, gradient in expected[1].items():
        assert found[1][name].dtype == torch.float32
        # Those of norms are rounded once more; Qwen3's norms of queries and keys return what their weights are in.
        slack = 0.0 if each == 4 else 2**-7 if "norm" in name else 2**-6 if arch == "qwen3" else 0.0
        assert float((found[1][name] - gradient).norm()) <= slack * float(gradient.norm()), name

    # Probes compute without autocast.
    with torch.no_grad():
        torch.testing.assert_close(model(input_ids=TOKENS).logits, plain(input_ids=TOKENS).logits, rtol=0, atol=0)
