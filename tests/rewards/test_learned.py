"""Learned models as rewards, against transformers' own forward of one sequence at a time."""

from __future__ import annotations

import math
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModel, BertConfig, BertForSequenceClassification, LlamaForSequenceClassification

from rlhf_lightning import GRPOModule, ProcessRewardModule, RewardModule, rewards
from rlhf_lightning.rewards.learned import ProcessModelReward, ProcessModelSteps, RewardModelReward
from rlhf_lightning.rewards.specs import build_rewards

from ..helpers import EOS_ID, PAD_ID, char_tokenizer, save_tiny_model, tiny_config
from ..modules.naive import step
from ..rl.fixed_rollouts import prompts as some_prompts

CPU = torch.device("cpu")
PROMPTS = ["1+1=", "what?", "1+1="]
TEXTS = ["2", "no idea", "3 or so"]


def ids(text: str) -> list[int]:
    return list(char_tokenizer()(text)["input_ids"])


def moved(module: Any, seed: int = 1) -> Any:
    """Other weights than those drawn, so that a head or decoder that is not loaded shows."""
    module.configure_model()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return module


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_tiny_model(tmp_path_factory.mktemp("model"), "llama"))


@pytest.fixture(scope="module")
def ensemble(folder: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Any]:
    module = moved(RewardModule(folder, num_models=3))
    target = str(tmp_path_factory.mktemp("rm") / "model")
    module.save_pretrained(target)
    return target, module


@pytest.fixture(scope="module")
def single(folder: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Any]:
    module = moved(RewardModule(folder))
    target = str(tmp_path_factory.mktemp("one") / "model")
    module.save_pretrained(target)
    return target, module


def last_state(module: Any, tokens: list[int]) -> Tensor:
    with torch.no_grad():
        found: Tensor = module.model.model(input_ids=torch.tensor([tokens])).last_hidden_state[0, -1]
    return found


def naive(module: Any, tokens: list[int]) -> Tensor:
    """``(M,)``: each member's weights times the last state."""
    return (module.head.weight[:, 0] @ last_state(module, tokens)).detach()


def policy(tokenizer: Any = None) -> Any:
    return SimpleNamespace(device=CPU, tokenizer=tokenizer or char_tokenizer())


@pytest.mark.parametrize("budget", [1, 8192])
def test_mean_less_deviations(budget: int, ensemble: tuple[str, Any]) -> None:
    target, module = ensemble
    reward = RewardModelReward(target, uncertainty_penalty=0.5, micro_batch_tokens=budget)
    expected = []
    for prompt, text in zip(PROMPTS, TEXTS, strict=True):
        members = naive(module, [*ids(prompt), *ids(text), EOS_ID])
        mean = sum(members.tolist()) / 3
        std = (sum((m - mean) ** 2 for m in members.tolist()) / 3) ** 0.5
        assert std > 0.01
        expected.append(mean - 0.5 * std)
    assert reward(PROMPTS, TEXTS) == pytest.approx(expected, abs=1e-4)
    plain = RewardModelReward(target)(PROMPTS, TEXTS)
    assert plain == pytest.approx(module.score(PROMPTS, TEXTS), abs=1e-5)


def test_sampled_tokens_are_scored_as_they_are(folder: str, tmp_path: Path) -> None:
    """Tokens that the tokenizer would not make of their text: 1 and 2, where it writes 12."""
    tokenizer = char_tokenizer()
    last = len(tokenizer) - 1
    path = tmp_path / "base"
    save_tiny_model(path, "llama")
    file = path / "tokenizer.json"
    character = tokenizer.convert_ids_to_tokens(last)
    written = file.read_text().replace(f'"{character}": {last}'.replace('"""', '"\\""'), f'"12": {last}')
    file.write_text(written.replace('"merges": []', '"merges": [["1", "2"]]'))
    module = moved(RewardModule(str(path)))
    merged = module.tokenizer
    assert merged("12")["input_ids"] == [last], "the case shows nothing"
    one, two = ids("1")[0], ids("2")[0]
    module.save_pretrained(str(tmp_path / "rm"))
    reward = RewardModelReward(str(tmp_path / "rm"))
    again = RewardModule.from_pretrained(str(tmp_path / "rm"))
    given = {"prompt_ids": [[one], [one], [one]], "completion_ids": [[one, two, EOS_ID], [last], [one, two]]}
    as_sampled = [[one, one, two, EOS_ID], [one, last, EOS_ID], [one, one, two, EOS_ID]]
    as_text = [one, last, EOS_ID]

    def expected(rows: list[list[int]]) -> list[float]:
        return [float(naive(again, row)) for row in rows]

    # Nobody has said what the policy's tokens are; they are others; they are the same.
    assert reward(["1"] * 3, ["12"] * 3, **given) == pytest.approx(expected([as_text] * 3), abs=1e-5)
    reward.attach(policy())
    assert reward(["1"] * 3, ["12"] * 3, **given) == pytest.approx(expected([as_text] * 3), abs=1e-5)
    reward.attach(policy(merged))
    assert reward(["1"] * 3, ["12"] * 3, **given) == pytest.approx(expected(as_sampled), abs=1e-5)
    assert abs(expected(as_sampled)[0] - expected([as_text])[0]) > 1e-3
    # A stop string has been cut off the text.
    assert reward(["1"], ["1"], [[one]], [[one, two]]) == pytest.approx(expected([[one, one, EOS_ID]]), abs=1e-5)
    # Nothing but the end.
    assert reward(["1"], [""], [[one]], [[EOS_ID]]) == pytest.approx(expected([[one, EOS_ID]]), abs=1e-5)


def test_chats(single: tuple[str, Any]) -> None:
    """As in training, with and without tokens: the template's prompt, the answer, the end-of-sequence token."""
    target, _ = single
    reward = RewardModelReward(target)
    again = RewardModule.from_pretrained(target)
    chat = [{"role": "user", "content": "2+2?"}]
    prompt = ids("<user>2+2?\n<assistant>")
    expected = [float(naive(again, [*prompt, *ids("4"), EOS_ID]))]
    assert reward([chat], ["4"]) == pytest.approx(expected, abs=1e-5)
    reward.attach(policy())
    assert reward([chat], ["4"], [prompt], [[*ids("4"), EOS_ID]]) == pytest.approx(expected, abs=1e-5)
    other = char_tokenizer()
    other.chat_template = other.chat_template.replace("'<'", "'['")
    reward.attach(policy(other))
    assert reward([chat], ["4"], [ids("[user>")], [[*ids("4"), EOS_ID]]) == pytest.approx(expected, abs=1e-5)


def test_a_sample_that_is_too_long_fails_alone(single: tuple[str, Any]) -> None:
    rewards = build_rewards([RewardModelReward(single[0])])
    scores = rewards(PROMPTS, ["2", "9" * 200, "3"])
    assert scores.failures == {"RewardModelReward": 1}
    assert scores.values[[0, 2], 0].tolist() == pytest.approx(single[1].score(["1+1="] * 2, ["2", "3"]), abs=1e-5)
    message = "ValueError: prompt and completion have 206 tokens, and the reward model reads 128 at most"
    assert scores.errors["RewardModelReward"] == message


def test_the_reward_model_is_no_part_of_the_policy(folder: str, single: tuple[str, Any]) -> None:
    """From a YAML-like spec; trained with, its weights stay, and only the policy's are the module's."""
    spec = {"class_path": "rlhf_lightning.rewards.RewardModelReward", "init_args": {"model": single[0]}}
    module = GRPOModule(folder, rewards=[spec], num_generations=4, max_completion_length=6)
    [reward] = module.rewards.functions
    scorer = reward.scorer.model  # type: ignore[attr-defined]
    before = {name: value.clone() for name, value in scorer.state_dict().items()}
    found = step(module, some_prompts(3))
    assert any(float(gradient.norm()) > 0 for gradient in found.gradient.values())
    assert all(name.startswith("model.") for name in module.state_dict())
    plain = GRPOModule(folder, rewards=[lambda completions: [0.0] * len(completions)])
    plain.configure_model()
    assert module.state_dict().keys() == plain.state_dict().keys()
    assert all(torch.equal(value, before[name]) for name, value in scorer.state_dict().items())
    assert not any(p.requires_grad for p in scorer.parameters())
    assert module.hparams["rewards"] == [spec]
    # Training tokens are the sampled ones.
    rollouts = module.last_rollouts
    assert rollouts is not None
    for n, (prompt, group) in enumerate(zip(rollouts.prompts, rollouts.completions, strict=True)):
        for k, sample in enumerate(group):
            if scorer.tokenizer.decode(sample.token_ids, skip_special_tokens=True) == sample.text:
                tokens = [*prompt.root.tokens.tolist(), *sample.token_ids]
                tokens += [EOS_ID] * (tokens[-1] != EOS_ID)
                assert float(rollouts.rewards_SK[sum(rollouts.sizes[:n]) + k, 0]) == pytest.approx(
                    float(naive(scorer, tokens)), abs=1e-4
                )


# Other sequence classifiers.


def test_a_decoder_with_a_classifying_head(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = tiny_config("llama", id2label={0: "bad", 1: "good"}, label2id={"bad": 0, "good": 1})
    model = LlamaForSequenceClassification(config).eval()
    model.save_pretrained(tmp_path)
    char_tokenizer().save_pretrained(tmp_path)
    reward = RewardModelReward(str(tmp_path), label="good")
    expected = []
    for prompt, text in zip(PROMPTS, TEXTS, strict=True):
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([[*ids(prompt), *ids(text), EOS_ID]])).logits[0]
        expected.append(float(logits[1]))
    assert reward(PROMPTS, TEXTS) == pytest.approx(expected, abs=1e-5)
    assert reward.scorer.__class__.__name__ == "PackedScorer"
    with pytest.raises(ValueError, match="has the outputs bad, good: name one with label="):
        RewardModelReward(str(tmp_path))
    with pytest.raises(ValueError, match=re.escape("label is 'fine'; the outputs of ")):
        RewardModelReward(str(tmp_path), label="fine")


@pytest.mark.parametrize("budget", [1, 30, 8192])
def test_an_encoder(budget: int, tmp_path: Path) -> None:
    """Padded, in batches of any size, on pairs; without an end-of-sequence token."""
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=64,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=16,
        max_position_embeddings=40,
        num_labels=1,
        pad_token_id=PAD_ID,
        initializer_range=0.5,
    )
    model = BertForSequenceClassification(config).eval()
    model.save_pretrained(tmp_path)
    tokenizer = char_tokenizer()
    tokenizer.eos_token = None
    tokenizer.save_pretrained(tmp_path)
    reward = RewardModelReward(str(tmp_path), micro_batch_tokens=budget)
    expected = []
    for prompt, text in zip(PROMPTS, TEXTS, strict=True):
        with torch.no_grad():
            expected.append(float(model(**tokenizer(prompt, text, return_tensors="pt")).logits[0, 0]))
    assert reward(PROMPTS, TEXTS, [[5]] * 3, [[6]] * 3) == pytest.approx(expected, abs=1e-5)
    long, short = reward(["1", "1"], ["9" * 50, "2"])
    assert str(long) == "prompt and completion have 51 tokens, and the reward model reads 40 at most"
    assert isinstance(short, float)


# Process reward models.


@pytest.fixture(scope="module")
def process(folder: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Any]:
    module = moved(ProcessRewardModule(folder, aggregation="last"))
    target = str(tmp_path_factory.mktemp("prm") / "model")
    module.save_pretrained(target)
    return target, module


SOLUTIONS = ["1+1=2\n2+1=3\n#3", "", "7"]


def naive_steps(module: Any, prompt: str, solution: str) -> list[float]:
    """The sigmoid of the head's output at every separator, one forward per step."""
    found = []
    tokens = ids(prompt)
    for part in solution.split("\n"):
        tokens += ids(part + "\n")
        found.append(float(torch.sigmoid(module.head.weight[0, 0].detach() @ last_state(module, tokens))))
    return found


@pytest.mark.parametrize("aggregation", ["min", "product", "last", "mean", None])
def test_a_solution_by_its_steps(aggregation: Any, process: tuple[str, Any]) -> None:
    target, module = process
    found = ProcessModelReward(target, aggregation=aggregation)(PROMPTS, SOLUTIONS)
    expected: list[float | None] = []
    for prompt, solution in zip(PROMPTS, SOLUTIONS, strict=True):
        steps = naive_steps(module, prompt, solution) if solution else []
        kinds = {"min": min, "last": lambda s: s[-1], "mean": lambda s: sum(s) / len(s), "product": math.prod}
        expected.append(kinds[aggregation or "last"](steps) if steps else None)
    assert [found[0], found[2]] == pytest.approx([expected[0], expected[2]], abs=1e-5)
    assert found[1] is None


def test_rewards_of_steps(process: tuple[str, Any]) -> None:
    target, module = process
    found = ProcessModelSteps(target, baseline=0.25)(PROMPTS, SOLUTIONS)
    assert found[1] is None
    for n in (0, 2):
        expected = [value - 0.25 for value in naive_steps(module, PROMPTS[n], SOLUTIONS[n])]
        assert found[n] == pytest.approx(expected, abs=1e-5)


def test_steps_in_training(folder: str, process: tuple[str, Any]) -> None:
    """Completions are scored step by step, and the scores land in the rollouts."""
    spec = {"class_path": "rlhf_lightning.rewards.ProcessModelSteps", "init_args": {"model": process[0]}}
    module = GRPOModule(folder, rewards=[], process_reward=spec, num_generations=4, max_completion_length=12)
    found = step(module, some_prompts(3))
    assert any(float(gradient.norm()) > 0 for gradient in found.gradient.values())
    rollouts = module.last_rollouts
    assert rollouts is not None
    steps = [sample for group in rollouts.steps for sample in group]
    samples = [sample for group in rollouts.completions for sample in group]
    texts = [[part for part in sample.text.split("\n") if part] for sample in samples]
    assert [len(sample) for sample in steps] == [len(text) for text in texts]
    assert all(0 <= token < len(s.token_ids) for s, own in zip(samples, steps, strict=True) for token, _ in own)
    assert all(-0.5 < value < 0.5 for sample in steps for _, value in sample)
    assert module.hparams["process_reward"] == spec


# Folders that are something else.


def test_what_is_no_reward_model(
    folder: str, process: tuple[str, Any], single: tuple[str, Any], tmp_path: Path
) -> None:
    learned = moved(ProcessRewardModule(folder, boundaries="learned"))
    learned.save_pretrained(str(tmp_path / "learned"))
    cases: list[tuple[Any, str]] = [
        (lambda: RewardModelReward(folder), "holds no reward model but a LlamaForCausalLM: give what RewardModule"),
        (lambda: RewardModelReward(process[0]), "holds a process_reward model, no reward model: a process reward"),
        (lambda: RewardModelReward(str(tmp_path / "nothing")), "/nothing' to load the reward model from"),
        (lambda: RewardModelReward(single[0], uncertainty_penalty=0.5), "is no ensemble: use 0, or train a"),
        (lambda: RewardModelReward(single[0], uncertainty_penalty=-1.0), "it must be at least 0"),
        (lambda: RewardModelReward(single[0], dtype="half"), "dtype is 'half'; it must be one of float32"),  # type: ignore
        (lambda: ProcessModelReward(single[0]), "holds no model that ProcessRewardModule exported"),
        (lambda: ProcessModelReward(process[0], aggregation="max"), "aggregation is 'max'; it must be one of"),  # type: ignore
        (lambda: ProcessModelSteps(str(tmp_path / "learned")), "so that its rewards have no tokens to land on"),
    ]
    for make, message in cases:
        with pytest.raises(ValueError, match=re.escape(message)) as error:
            make()
        assert "\n" not in str(error.value)


def test_half_precision_keeps_its_frequencies(single: tuple[str, Any]) -> None:
    reward = RewardModelReward(single[0], dtype="bfloat16")
    module = reward.scorer.model  # type: ignore[union-attr]
    assert next(module.parameters()).dtype == torch.bfloat16
    exact = AutoModel.from_pretrained(single[0]).rotary_emb.inv_freq
    assert torch.equal(module.model.model.rotary_emb.inv_freq, exact)
    assert reward(PROMPTS, TEXTS) == pytest.approx(single[1].score(PROMPTS, TEXTS), abs=0.1)


def test_their_names_are_public(single: tuple[str, Any]) -> None:
    for cls in (RewardModelReward, ProcessModelReward, ProcessModelSteps):
        assert getattr(rewards, cls.__name__) is cls
        assert cls.__name__ in rewards.__all__
    spec = {"class_path": "rlhf_lightning.rewards.RewardModelReward", "init_args": {"model": single[0]}}
    assert isinstance(build_rewards([spec]).functions[0], RewardModelReward)


# Each imports torch anew; that imports go down only, `tests/test_house.py` reads off the sources.
@pytest.mark.slow
@pytest.mark.parametrize("first", ["rewards", "core", "datamodules", "callbacks"])
def test_any_part_can_be_imported_first(first: str) -> None:
    subprocess.run([sys.executable, "-c", f"import rlhf_lightning.{first}"], check=True, timeout=120)
