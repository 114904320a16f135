from __future__ import annotations

import socket

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.distributed.fsdp import fully_shard

from rlhf_lightning.distributed.unshard import gathered
from rlhf_lightning.inference import LocalEngine, SamplingParams

from ..helpers import tiny_model


def _rank(rank: int, port: int) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    whole, sharded = tiny_model("qwen3"), tiny_model("qwen3")
    for layer in sharded.model.layers:
        fully_shard(layer)
    fully_shard(sharded)
    # Rank 0 has no prompts the first time, and ranks generate for different numbers of steps.
    for prompts in ([[5, 6, 7], [8]][: 2 * rank], [[5, 6, 7], [8]]):
        params = SamplingParams(max_new_tokens=4 + 8 * rank, seed=rank)
        assert LocalEngine(sharded, None).generate(prompts, 2, params) == LocalEngine(whole, None).generate(
            prompts, 2, params
        )
    # Within one gathering, a search makes as many calls as it needs.
    params = SamplingParams(max_new_tokens=4, seed=rank)
    with gathered(sharded):
        for _ in range(1 + 2 * rank):
            assert LocalEngine(sharded, None).generate([[5, 6]], 1, params) == LocalEngine(whole, None).generate(
                [[5, 6]], 1, params
            )
    ids = torch.tensor([[1, 2, 3, 4 + rank]])
    for model in (whole, sharded):
        model(input_ids=ids, labels=ids).loss.backward()
    for (name, parameter), plain in zip(sharded.named_parameters(), whole.parameters(), strict=True):
        assert type(parameter.data).__name__ == "DTensor", name
        dist.all_reduce(plain.grad)
        torch.testing.assert_close(parameter.grad.full_tensor(), plain.grad / 2)
    groups = [module._get_fsdp_state()._fsdp_param_groups[0] for module in (*sharded.model.layers, sharded)]
    assert [group.post_forward_mesh_info is not None for group in groups] == [True, True, False]
    dist.destroy_process_group()


@pytest.mark.distributed
@pytest.mark.slow
def test_ranks_of_a_sharded_model_generate_for_themselves_and_train_on() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.spawn(_rank, args=(port,), nprocs=2)
