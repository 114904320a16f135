"""Two hosts, as two network namespaces of this machine that see each other through one cable, make the steps of one.

Faults between machines that never occur on one (an address that only one side knows, a rank that is counted per host)
shows here. Making namespaces takes the rights of root; without them the test is skipped.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import uuid
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch

from ..helpers import save_tiny_model
from .sharding_jobs import ROOT, run_job

PORT = 29417


def ip(*arguments: str) -> None:
    """Runs ``ip``, and raises where it is refused."""
    subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True, timeout=20)


@pytest.fixture(scope="module")
def hosts() -> Iterator[list[tuple[str, str, str]]]:
    """Two namespaces: name, address and network interface of each."""
    if shutil.which("ip") is None:
        pytest.skip("network namespaces need the command `ip`, which is not installed")
    tag = uuid.uuid4().hex[:6]
    found = [(f"host-{tag}-{n}", f"10.77.31.{n + 1}", f"v{tag}{n}") for n in range(2)]
    made: list[str] = []
    try:
        try:
            for name, _, _ in found:
                ip("netns", "add", name)
                made.append(name)
            ip(
                "link",
                "add",
                found[0][2],
                "netns",
                found[0][0],
                "type",
                "veth",
                "peer",
                found[1][2],
                "netns",
                found[1][0],
            )
            for name, address, interface in found:
                ip("-n", name, "addr", "add", f"{address}/24", "dev", interface)
                ip("-n", name, "link", "set", interface, "up")
                ip("-n", name, "link", "set", "lo", "up")
        except (subprocess.CalledProcessError, OSError) as error:
            reason = str(getattr(error, "stderr", "") or error).strip()
            pytest.skip(f"network namespaces are not allowed here: {reason}")
        yield found
    finally:
        for name in made:
            with suppress(subprocess.CalledProcessError):
                ip("netns", "del", name)


def on_hosts(
    hosts: list[tuple[str, str, str]], jobs: dict[str, Any], folder: Path, strategy: str, per_host: int = 1
) -> dict[str, Any]:
    """Runs jobs with one process, or more, on each host; the results of rank 0."""
    (folder / "jobs.json").write_text(json.dumps(jobs), encoding="utf-8")
    target = folder / f"{strategy}.pt"
    running = []
    for number, (name, _, interface) in enumerate(hosts):
        command = ["ip", "netns", "exec", name, sys.executable, "-m", "torch.distributed.run", "--nnodes=2"]
        command += [f"--node-rank={number}", f"--nproc-per-node={per_host}", f"--master-addr={hosts[0][1]}"]
        command += [
            f"--master-port={PORT}",
            "-m",
            "tests.distributed.sharding_jobs",
            str(folder / "jobs.json"),
            str(target),
            strategy,
        ]
        env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "ignore"}
        env |= {"GLOO_SOCKET_IFNAME": interface}
        pipes: dict[str, Any] = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
        running.append(subprocess.Popen(command, cwd=ROOT, env=env, **pipes))
    try:
        said = [process.communicate(timeout=240)[1] for process in running]
    finally:
        for process in running:
            process.kill()
    assert [process.returncode for process in running] == [0, 0], "\n".join(text[-2000:] for text in said)
    results: dict[str, Any] = torch.load(target)
    return results


@pytest.mark.distributed
@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_two_hosts_make_the_steps_of_one(hosts: list[tuple[str, str, str]], strategy: str, tmp_path: Path) -> None:
    model = str(save_tiny_model(tmp_path / "model", "qwen3"))
    jobs = {method: {"method": method, "model": model} for method in ("sft", "kto", "grpo-live")}
    assert_steps_of_one(jobs, on_hosts(hosts, jobs, tmp_path, strategy))


@pytest.mark.distributed
@pytest.mark.slow
def test_a_copy_on_each_host_makes_the_steps_of_one(hosts: list[tuple[str, str, str]], tmp_path: Path) -> None:
    job = {"model": str(save_tiny_model(tmp_path / "model", "qwen3")), "fsdp2": {"shard_over": "node"}, "sgd": True}
    jobs = {method: job | {"method": method} for method in ("sft", "dpo")}
    assert_steps_of_one(jobs, on_hosts(hosts, jobs, tmp_path, "fsdp2", per_host=2))


def assert_steps_of_one(jobs: dict[str, Any], results: dict[str, Any]) -> None:
    for name, job in jobs.items():
        expected = run_job(job)["weights"]
        found = results[name]["weights"]
        assert found.keys() == expected.keys()
        for weight, value in expected.items():
            torch.testing.assert_close(found[weight], value, rtol=0, atol=1e-8, msg=f"{name}: {weight}")
