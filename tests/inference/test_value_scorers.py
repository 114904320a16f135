"""The critic and the policy's certainty as scorers, against one solution at a time and loops over tokens."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from rlhf_lightning import PPOModule, RewardModule
from rlhf_lightning.inference import (
    LocalEngine,
    MajorityVote,
    RemoteEngine,
    SelfCertaintyScorer,
    ValueScorer,
    build_scorer,
    build_strategy,
)
from rlhf_lightning.inference.strategy import Candidate, Query
from rlhf_lightning.models.critic import ValueModel, own_critic

from ..helpers import EOS_ID, char_tokenizer, save_tiny_model
from ..models.test_reward_model import ids
from ..rl.fixed_rollouts import options

LORA = {"r": 2, "init_lora_weights": False}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_tiny_model(tmp_path_factory.mktemp("model"), "llama"))


def engine_of(folder: str) -> LocalEngine:
    return LocalEngine(AutoModelForCausalLM.from_pretrained(folder), char_tokenizer())


def candidate(query: Query, text: str, finish: Any = "stop") -> Candidate:
    tokens = (*ids(text), *([EOS_ID] if finish == "stop" else []))
    return Candidate(query, tokens, text, (), finish)


def query(text: str) -> Query:
    return Query(text, tuple(ids(text)), 0)


ONE, TWO = query("1+1="), query("2+2=")
CANDIDATES = [
    candidate(ONE, "12\n3"),
    candidate(ONE, "12\n34", "length"),
    candidate(TWO, "12\n3", None),
    candidate(ONE, "12\n", None),
    candidate(ONE, "12\n3", None),
    candidate(ONE, ""),
    Candidate(ONE, (), ""),
]


def trained(folder: str, name: str, tmp_path: Path) -> PPOModule:
    """A module with a critic of some kind, and weights as after training."""
    given: dict[str, Any] = {"value": {"head": "mlp" if name == "mlp" else "linear"}}
    if name == "own":
        given["value"]["model"] = str(save_tiny_model(tmp_path / "other", "llama", seed=5))
    if name in ("mean", "heads"):
        pooling, members = ("mean", 1) if name == "mean" else ("last", 3)
        reward = RewardModule(folder, pooling=pooling, num_models=members)
        reward.configure_model()
        if members > 1:
            reward.reward_model.means.update(torch.randn(4, 2, members, 1))
        reward.save_pretrained(str(tmp_path / "reward"))
        given["value"]["model"] = str(tmp_path / "reward")
    module = PPOModule(folder, **options(**given), lora=LORA if name == "adapter" else None)
    module.configure_model()
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return module


@torch.no_grad()
def values_in_training(module: Any, prompt: list[int], tokens: list[int]) -> list[float]:
    """The critic's values after the prompt and after each token, one state at a time."""
    model = module.model if module.critic.model is None else module.critic.model
    decoder = (model.get_base_model() if hasattr(model, "peft_config") else model).model
    found = []
    for end in range(len(prompt), len(prompt) + len(tokens) + 1):
        states = decoder(input_ids=torch.tensor([[*prompt, *tokens][:end]])).last_hidden_state[0]
        state = states[-1]
        if module.critic.options.pooling == "mean" and end > len(prompt):
            state = states[len(prompt) :].mean(dim=0)
        found.append(float(module.critic.values(state[None])))
    return found


@pytest.mark.parametrize("name", ["linear", "mlp", "own", "mean", "heads", "adapter"])
def test_a_critic_is_exported_and_scores_as_in_training(name: str, folder: str, tmp_path: Path) -> None:
    module = trained(folder, name, tmp_path)
    before = {key: value.clone() for key, value in module.state_dict().items()}
    requires = [parameter.requires_grad for parameter in module.parameters()]
    module.save_critic(str(tmp_path / "critic"))
    assert all(torch.equal(value, before[key]) for key, value in module.state_dict().items())
    assert requires == [parameter.requires_grad for parameter in module.parameters()]

    scorer = build_scorer(str(tmp_path / "critic"))
    assert isinstance(scorer, ValueScorer)
    scorer.attach(engine_of(folder))
    found = scorer.score(CANDIDATES)
    # The end of an answer is not read; a solution without tokens is the prompt's state.
    read = [[token for token in c.token_ids if token != EOS_ID] for c in CANDIDATES]
    expected = [
        values_in_training(module, list(c.query.token_ids), tokens)[-1]
        for c, tokens in zip(CANDIDATES, read, strict=True)
    ]
    assert found.values == pytest.approx(expected, rel=1e-4, abs=1e-5)
    assert len({round(value, 4) for value in expected}) > 3
    alone = [scorer.score([c]).values[0] for c in CANDIDATES]
    assert found.values == pytest.approx(alone, abs=1e-6)

    # A critic may be trained further.
    again = own_critic(
        str(tmp_path / "critic"), kind="linear", seed=0, dtype=torch.float32, attention="auto", layout="auto"
    )
    assert torch.equal(again.head.weight, module.critic.head.weight)
    assert again.options == module.critic.options


def test_tokens_of_a_critic_are_counted_once_per_query(folder: str, tmp_path: Path) -> None:
    module = trained(folder, "linear", tmp_path)
    module.save_critic(str(tmp_path / "critic"))
    scorer = ValueScorer(str(tmp_path / "critic"), micro_batch_tokens=1)
    scorer.attach(engine_of(folder))
    # By hand. First query: 4 of the prompt and "12\n3" (8); "4" and "3" before it (2); "\n" as an end (1); "12\n3" is
    # there already; the prompt's last token as an end, once for two. Second query: 4 + 4.
    assert scorer.score(CANDIDATES).tokens == [8, 2, 8, 1, 0, 1, 0]
    assert [scorer.cost(c) for c in CANDIDATES] == [8, 9, 8, 7, 8, 4, 4]


def test_what_a_critic_cannot_read(folder: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"holds no critic: PPOModule\.save_critic writes one"):
        ValueScorer(folder)
    module = trained(folder, "linear", tmp_path)
    module.save_critic(str(tmp_path / "critic"))
    scorer = ValueScorer(str(tmp_path / "critic"))
    other = char_tokenizer()
    other.add_tokens(["zz"])
    with pytest.raises(ValueError, match="the critic has another tokenizer than the policy"):
        build_strategy("BestOfN", LocalEngine(AutoModelForCausalLM.from_pretrained(folder), other), scorer=scorer)
    with pytest.raises(ValueError, match="the tokens of prompts and solutions, which this engine does not report"):
        scorer.score([Candidate(Query("1+1=", (), 0), (), "2")])
    with pytest.raises(ValueError, match="prompt and completion have 130 tokens, and the reward model reads 128"):
        scorer.score([Candidate(ONE, (5,) * 126, "")])
    with pytest.raises(ValueError, match="the prompt alone has one"):
        scorer.score([Candidate(Query([5], (5,), 0), (), "")])
    with pytest.raises(ValueError, match="a critic by ValueScorer"):
        build_scorer({"class_path": "RewardScorer", "init_args": {"model": str(tmp_path / "critic")}})
    with pytest.raises(ValueError, match="micro_batch_tokens is 0"):
        ValueScorer(scorer.model, micro_batch_tokens=0)
    # The folder of a policy is not replaced by a critic.
    module.save_pretrained(str(tmp_path / "policy"))
    with pytest.raises(ValueError, match="policy"):
        module.check_critic_export(str(tmp_path / "policy"))
    assert isinstance(ValueModel.from_pretrained(tmp_path / "critic"), ValueModel)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_self_certainty_is_the_divergence_from_uniform(attention: str, folder: str) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation=attention).train()
    scorer = SelfCertaintyScorer(micro_batch_tokens=20)
    scorer.attach(MajorityVote(LocalEngine(model, char_tokenizer()), n=2))
    found = scorer.score(CANDIDATES)
    plain = AutoModelForCausalLM.from_pretrained(folder).eval()
    for c, value in zip(CANDIDATES, found.values, strict=True):
        total, prompt = 0.0, list(c.query.token_ids)
        for n in range(len(c.token_ids)):
            with torch.no_grad():
                p = plain(input_ids=torch.tensor([[*prompt, *c.token_ids[:n]]])).logits[0, -1].double().softmax(dim=-1)
            uniform = 1 / len(p)
            total += sum(uniform * math.log(uniform / float(each)) for each in p)
        assert value == pytest.approx(total / len(c.token_ids) if c.token_ids else 0.0, rel=1e-4)
    assert model.training
    assert model.config._attn_implementation == attention
    assert sum(found.tokens) == sum(scorer.score(CANDIDATES).tokens) <= sum(map(scorer.cost, CANDIDATES))


def test_self_certainty_needs_the_policy(folder: str) -> None:
    with pytest.raises(ValueError, match="SelfCertaintyScorer has no policy yet"):
        SelfCertaintyScorer().score(CANDIDATES)
    with pytest.raises(ValueError, match="which RemoteEngine does not report"):
        SelfCertaintyScorer().attach(RemoteEngine("http://localhost:1"))
    scorer = SelfCertaintyScorer()
    scorer.attach(engine_of(folder))
    with pytest.raises(ValueError, match="have 130 tokens"):
        scorer.score([Candidate(ONE, (5,) * 126, "")])
