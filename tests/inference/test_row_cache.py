from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from rlhf_lightning.inference.decoder import Decoder
from rlhf_lightning.inference.lanes import remaining
from rlhf_lightning.inference.planes import EightBitPlane, WholePlane
from rlhf_lightning.inference.row_cache import RowCache
from rlhf_lightning.models.own_attention import using_attention
from rlhf_lightning.sequences import register_attention

from ..helpers import ARCHITECTURES, VOCAB_SIZE, tiny_model

PROMPTS = [[5, 6, 7], [(3 + 5 * i) % VOCAB_SIZE for i in range(11)], [9], [(4 + 3 * i) % VOCAB_SIZE for i in range(7)]]


@contextmanager
def decoding(model: PreTrainedModel) -> Iterator[Decoder]:
    with torch.no_grad(), using_attention(model, register_attention()):
        yield Decoder(model)


def alone(model: PreTrainedModel, tokens: list[int]) -> Tensor:
    """The scores after every token, by the model's own forward without a cache."""
    with using_attention(model, "eager"):
        return model(input_ids=torch.tensor([tokens]), use_cache=False).logits[0]  # type: ignore[no-any-return]


class Checked:
    """A cache with the tokens that its rows hold; every forward is compared with one without a cache."""

    def __init__(self, model: PreTrainedModel, decoder: Decoder, cache: RowCache, atol: float) -> None:
        self.model, self.decoder, self.cache, self.atol = model, decoder, cache, atol
        self.rows: list[list[int]] = []

    def admit(self, prompts: list[list[int]], copies: int = 1) -> None:
        logits_PV, states = self.decoder.prefill(prompts)
        for number, prompt in enumerate(prompts):
            self._check(logits_PV[number], prompt)
            self.cache.admit(states, number, len(prompt), copies)
            self.rows += [list(prompt) for _ in range(copies)]

    def step(self, tokens: list[int]) -> None:
        logits_NV = self.decoder.step(torch.tensor(tokens), self.cache)
        for row, token, logits_V in zip(self.rows, tokens, logits_NV, strict=True):
            row.append(token)
            self._check(logits_V, row)

    def extend(self, tokens: list[list[int]]) -> None:
        logits_NQV = self.decoder.extend(tokens, self.cache)
        assert logits_NQV.shape[:2] == (len(tokens), max(map(len, tokens)))
        for row, new, logits_QV in zip(self.rows, tokens, logits_NQV, strict=True):
            for token, logits_V in zip(new, logits_QV, strict=False):
                row.append(token)
                self._check(logits_V, row)

    def rollback(self, counts: list[int]) -> None:
        self.cache.rollback(counts)
        self.rows = [row[: len(row) - count] for row, count in zip(self.rows, counts, strict=True)]

    def leave(self, *rows: int) -> None:
        order = remaining(len(self.rows), rows)
        self.cache.keep(order)
        self.rows = [self.rows[row] for row in order]

    def _check(self, logits_V: Tensor, row: list[int]) -> None:
        expected_V = alone(self.model, row)[-1]
        torch.testing.assert_close(logits_V, expected_V, rtol=0, atol=self.atol * float(expected_V.abs().max()))


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("fixed", [False, True])
def test_rows_of_any_length_get_the_scores_of_forwards_without_a_cache(arch: str, fixed: bool) -> None:
    model = tiny_model(arch)
    with decoding(model) as decoder:
        assert decoder.agrees_in_rows()
        rows = Checked(model, decoder, RowCache(WholePlane, 6, 60, fixed_shapes=fixed), atol=1e-4)
        rows.admit(PROMPTS[:2])
        if not fixed:
            rows.step([8, 9])
        rows.extend([[11, 12, 13], [14]])
        rows.rollback([2, 0])
        rows.admit(PROMPTS[2:], copies=2)
        rows.extend([[21], [], [22, 23], [24, 25, 26, 27], [28], [29]])
        rows.rollback([0, 5, 1, 4, 0, 0])
        rows.leave(0, 3)
        assert rows.cache.lengths[:4].tolist() == [len(row) for row in rows.rows] == [8, 8 - fixed, 2, 8]
        rows.extend([[31, 32]] * 4)
        rows.extend([[33]] * 4)


def test_any_order_of_operations_keeps_the_scores() -> None:
    draw = random.Random(0)
    model = tiny_model("gemma2")
    with decoding(model) as decoder:
        rows = Checked(model, decoder, RowCache(WholePlane, 8, 100), atol=1e-4)
        for _ in range(25):
            some = range(len(rows.rows))
            tokens = [[draw.randrange(3, VOCAB_SIZE) for _ in range(draw.randrange(4))] for _ in some]
            if len(rows.rows) < 6 and draw.random() < 0.4:
                rows.admit([draw.choice(PROMPTS) for _ in range(2)])
            elif any(tokens) and draw.random() < 0.6:
                rows.extend(tokens)
                rows.rollback([draw.randint(0, len(new)) for new in tokens])
            elif len(rows.rows) > 1 and draw.random() < 0.5:
                rows.leave(*sorted(draw.sample(list(some), draw.randint(1, len(rows.rows) - 1))))
            elif rows.rows:
                rows.step([draw.randrange(3, VOCAB_SIZE) for _ in some])


def test_rows_that_are_not_alive_stay_as_they_are() -> None:
    model = tiny_model("qwen3")
    with decoding(model) as decoder:
        cache = RowCache(WholePlane, 4, 30, fixed_shapes=True)
        rows = Checked(model, decoder, cache, atol=1e-4)
        rows.admit(PROMPTS[:3])
        shapes: set[Any] = set()
        for alive in ([True, True, True, False], [True, False, True, False], [True, False, True, False]):
            alive_N = torch.tensor(alive)
            logits_NV = decoder.step(torch.tensor([7, 8, 9, 0]), cache, alive_N)
            shapes.add((tuple(logits_NV.shape), cache._width))
            for row, token, lives, logits_V in zip(rows.rows, [7, 8, 9], alive, logits_NV, strict=False):
                if lives:
                    row.append(token)
                    rows._check(logits_V, row)
        assert shapes == {((4, VOCAB_SIZE), 64)}
        assert cache._device_lengths().tolist() == [[6], [12], [4], [0]]
        rows.leave(1)
        assert cache.lengths[:2].tolist() == [6, 4]
        rows.extend([[11, 12], [13]])


@pytest.mark.parametrize(("size", "share"), [(8, 0.3125), (64, 0.27), (80, 0.26)])
def test_states_in_eight_bits(size: int, share: float) -> None:
    generator = torch.Generator().manual_seed(0)
    states = torch.randn((2, 3, 9, size), generator=generator) * torch.rand((2, 3, 9, 1), generator=generator) * 50
    states[0, 0, 4] = 0.0
    states[0, 1, 2] = 1e-30
    states[1, 1, 1, 0] = 1e30
    plane, whole = EightBitPlane(states, 4, 20), WholePlane(states, 4, 20)
    assert plane.nbytes <= share * whole.nbytes
    plane.fill(slice(1, 3), states[0])
    plane.put((torch.arange(2)[:, None], torch.tensor([[9, 10], [20, 0]])), states[:, :, :2])
    found = plane.get(3, 20)
    assert found.dtype == states.dtype
    assert found.shape == (3, 3, 20, size)
    for mine, exact in (
        (found[2, :, :9], states[0]),
        (found[1, :, 1:9], states[0, :, 1:]),
        (found[0, :, 9:11], states[0, :, :2]),
        (found[1, :, 0], states[1, :, 1]),
    ):
        groups = exact.unflatten(-1, (-1, 32 if size == 64 else size))
        allowed = groups.abs().amax(-1, keepdim=True).expand_as(groups).flatten(-2) / 250
        assert ((mine - exact).abs() <= allowed).all()
    plane.move(torch.tensor([0]), torch.tensor([2]), 9)
    assert torch.equal(plane.get(1, 9)[0], found[2, :, :9])


def test_scores_over_eight_bits_are_close() -> None:
    model = tiny_model("llama")
    with decoding(model) as decoder:
        rows = Checked(model, decoder, RowCache(EightBitPlane, 6, 60), atol=0.05)
        rows.admit(PROMPTS)
        rows.extend([[11, 12], [13], [], [14, 15, 16]])
        rows.step([21, 22, 23, 24])


def test_models_without_attention_by_name_do_not_agree_in_rows() -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    options = {"hidden_size": 32, "num_hidden_layers": 2, "vocab_size": VOCAB_SIZE, "n_head": 4}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("bloom", **options)).eval()
    with decoding(model) as decoder:
        assert not decoder.agrees_in_rows()
