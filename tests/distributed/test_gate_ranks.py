"""On two ranks, a rejected candidate leaves no trace, and information is that of one rank."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from rlhf_lightning import SFTModule
from rlhf_lightning.callbacks import ElasticWeightConsolidation

from ..callbacks.test_capability_gate import forget_gate
from ..integration.test_resume import DEMONSTRATIONS, LORA, assert_same

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.distributed
@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_two_ranks_go_back_together(tiny_model_folder, tmp_path, strategy):
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in DEMONSTRATIONS))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command += ["-m", "tests.distributed.gate_worker", str(tiny_model_folder()), str(tmp_path), strategy]
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "ignore"}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=250, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    plain, again = (
        torch.load(tmp_path / name / "checkpoints" / "step=9.ckpt", weights_only=True) for name in ("plain", "again")
    )
    states = [forget_gate(checkpoint) for checkpoint in (plain, again)]
    assert_same(again, plain)
    first, second = plain["post_training"]["random"]
    assert not torch.equal(first["torch"], second["torch"])
    kls = [[entry["kl"] for entry in next(iter(state.values()))["history"]] for state in states]
    # The checkpoint of the last step is made before that step is judged, for the second time.
    assert kls[1][:4:2] == kls[1][1:4:2] == kls[0]
    assert len(set(kls[0])) == 2

    plain, again = (
        torch.load(tmp_path / name / "checkpoints" / "step=9.ckpt", weights_only=True)
        for name in ("rounds", "rounds again")
    )
    for checkpoint in (plain, again):
        forget_gate(checkpoint)
        assert len(checkpoint["callbacks"]["SameSeeds"]["history"]) >= 1
    assert_same(again, plain)
    for file in (tmp_path / "rounds/own").iterdir():
        assert (tmp_path / "rounds again/own" / file.name).read_bytes() == file.read_bytes()

    if strategy == "ddp":
        checkpoint = torch.load(tmp_path / "ewc" / "checkpoints" / "step=9.ckpt", weights_only=True)
        found = next(v for k, v in checkpoint["callbacks"].items() if k.startswith("ElasticWeightConsolidation"))
        torch.manual_seed(1)
        module = SFTModule(str(tiny_model_folder()), lora=LORA)
        module.configure_model()
        with torch.no_grad():
            for name, weight in module.named_parameters():
                if name in found["center"]:
                    weight.copy_(found["center"][name])
        keep = ElasticWeightConsolidation()
        keep.consolidate(module, DEMONSTRATIONS)
        assert keep.information.keys() == found["information"].keys()
        for name, value in keep.information.items():
            torch.testing.assert_close(found["information"][name], value, rtol=1e-5, atol=1e-7)
