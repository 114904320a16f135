"""Merging methods under the preset ``mergekit`` against mergekit's own, tensor by tensor and from disk to disk."""

from __future__ import annotations

import warnings
from itertools import count

import pytest
import torch

pytest.importorskip(
    "mergekit", reason="these tests need the `merge-parity` extra: pip install rlhf-lightning[merge-parity]"
)

with warnings.catch_warnings():
    # It asks numpy 2 for names that have moved.
    warnings.simplefilter("ignore", DeprecationWarning)
    from mergekit.config import MergeConfiguration
    from mergekit.merge import run_merge
    from mergekit.merge_methods import registry
    from mergekit.merge_methods.base import TensorGroup
    from mergekit.options import MergeOptions

from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

from rlhf_lightning.merging import merge
from rlhf_lightning.merging.methods import (
    Breadcrumbs,
    Dare,
    DareTies,
    Della,
    Karcher,
    Linear,
    ModelStock,
    Slerp,
    TaskArithmetic,
    Ties,
    merge_tensors,
)
from rlhf_lightning.merging.methods.dare import random_block

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
SHAPES = {"w": (16, 33), "b": (29,), "v": (5, 3)}
WEIGHTS = (0.2, 0.8, -0.5)
POSITIVE = (0.2, 0.8, 0.5)
# mergekit draws masks and applies them in fp32 on a CPU, whatever the tensors' precision.
FP32 = 2e-6


def tensors(seed: int, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {n: torch.randn(s, generator=generator, dtype=torch.float64).to(dtype) for n, s in SHAPES.items()}


def models(number: int, dtype: torch.dtype = torch.float64):
    """A base and models, whose differences to it have a common part."""
    start, common = tensors(0, dtype), tensors(9, dtype)
    drawn = [tensors(1 + n, dtype) for n in range(number)]
    return start, [{n: start[n] + 0.3 * common[n] + 0.4 * state[n] for n in SHAPES} for state in drawn]


def theirs(name: str, tensor: str, these, start, dtype: torch.dtype, **parameters) -> torch.Tensor:
    inputs = [state[tensor] for state in ([start, *these] if start is not None else these)]
    group = TensorGroup.from_tensors(inputs, base_index=None if start is None else 0)
    (found,) = registry.get(name)([group], parameters=parameters, dtype=dtype)
    return found


MERGEKIT = {"preset": "mergekit"}
CASES = {
    "linear": (Linear(weights=POSITIVE), {"weight": POSITIVE}, 3),
    "task_arithmetic": (TaskArithmetic(weights=WEIGHTS, scale=0.7), {"weight": WEIGHTS, "lambda": 0.7}, 3),
    "ties": (
        Ties(weights=WEIGHTS, density=0.4, scale=1.3, **MERGEKIT),
        {"weight": WEIGHTS, "density": 0.4, "lambda": 1.3},
        3,
    ),
    "breadcrumbs": (
        Breadcrumbs(weights=WEIGHTS, density=0.6, gamma=0.1),
        {"weight": WEIGHTS, "density": 0.6, "gamma": 0.1},
        3,
    ),
    "karcher": (Karcher(), {"max_iter": 200, "tol": 1e-9}, 3),
    "model_stock": (ModelStock(), {}, 3),
}
SAMPLED = {
    "dare_linear": (Dare(weights=WEIGHTS, density=0.6, **MERGEKIT), {"weight": WEIGHTS, "density": 0.6}),
    "dare_ties": (DareTies(weights=WEIGHTS, density=0.6, **MERGEKIT), {"weight": WEIGHTS, "density": 0.6}),
    "della": (
        Della(weights=WEIGHTS, density=0.6, epsilon=0.2, **MERGEKIT),
        {"weight": WEIGHTS, "density": 0.6, "epsilon": 0.2},
    ),
}


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, FP32)])
@pytest.mark.parametrize("name", CASES)
def test_methods_agree(name, dtype, tolerance):
    method, parameters, number = CASES[name]
    if name == "karcher":
        tolerance = max(tolerance, 1e-8)  # both iterate up to a tolerance
    start, these = models(number, dtype)
    found = merge_tensors(method, these, start if method.needs_base else None, dtype=dtype)
    for tensor in SHAPES:
        expected = theirs(name, tensor, these, start if method.needs_base else None, dtype, **parameters)
        torch.testing.assert_close(found[tensor], expected, rtol=tolerance, atol=tolerance, msg=tensor)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, FP32)])
def test_slerp_agrees(dtype, tolerance):
    start, (other,) = models(1, dtype)
    found = merge_tensors(Slerp(t=0.3), [start, other], dtype=dtype)
    for tensor in SHAPES:
        expected = theirs("slerp", tensor, [other], start, dtype, t=0.3)
        torch.testing.assert_close(found[tensor], expected, rtol=tolerance, atol=tolerance, msg=tensor)


@pytest.mark.parametrize("name", SAMPLED)
def test_methods_with_masks_agree_on_the_same_masks(name, monkeypatch):
    method, parameters = SAMPLED[name]
    start, these = models(3)
    found = merge_tensors(method, these, start, dtype=torch.float64)
    for tensor in SHAPES:
        model = count()

        def drawn(probabilities, tensor=tensor, model=model):
            rows = probabilities if probabilities.ndim > 1 else probabilities[None]
            mask = random_block(rows.shape, method.seed, next(model), tensor, 0) < rows
            return mask.to(probabilities.dtype).reshape(probabilities.shape)

        monkeypatch.setattr(torch, "bernoulli", drawn)
        expected = theirs(name, tensor, these, start, torch.float64, **parameters)
        monkeypatch.undo()
        torch.testing.assert_close(found[tensor], expected, rtol=FP32, atol=FP32, msg=tensor)


def test_a_merge_from_disk_to_disk_agrees(tmp_path):
    config = LlamaConfig(
        vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2
    )
    for number, name in enumerate(("base", "a", "b")):
        torch.manual_seed(0)
        model = LlamaForCausalLM(config)
        generator = torch.Generator().manual_seed(number)
        with torch.no_grad():
            for weight in model.parameters():
                weight += 0.05 * number * torch.randn(weight.shape, generator=generator)
        model.save_pretrained(tmp_path / name)
    entries = [
        {"model": str(tmp_path / name), "parameters": {"weight": weight, "density": 0.3}}
        for name, weight in (("a", 0.7), ("b", 0.4))
    ]
    given = {"merge_method": "ties", "base_model": str(tmp_path / "base"), "models": entries, "dtype": "float32"}
    options = MergeOptions(quiet=True, copy_tokenizer=False, write_model_card=False)
    run_merge(MergeConfiguration.model_validate(given), str(tmp_path / "theirs"), options=options)
    merge(
        "ties",
        base=tmp_path / "base",
        models=[tmp_path / "a", tmp_path / "b"],
        output=tmp_path / "ours",
        weights=[0.7, 0.4],
        density=0.3,
        preset="mergekit",
    )
    expected = {k: v for path in (tmp_path / "theirs").glob("*.safetensors") for k, v in load_file(path).items()}
    found = load_file(tmp_path / "ours" / "model.safetensors")
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=FP32, atol=FP32, msg=name)
