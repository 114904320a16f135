"""Ensembles of adapters: a member is what it would be alone, and what leaves comes back."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from rlhf_lightning import RewardModule, SFTModule
from rlhf_lightning.core.reward_rows import bootstrap_weights
from rlhf_lightning.datamodules import PreferenceDataModule
from rlhf_lightning.models.reward_ensemble import MEMBER_ADAPTERS, member_state, using_member
from rlhf_lightning.sequences import Example, ExampleBatch

from ..helpers import char_tokenizer, save_tiny_model
from ..invariance.harness import trainer
from ..invariance.methods import pairs
from ..modules.naive import step

ROWS = [{"prompt": f"{n}+{n}=", "chosen": f"{2 * n}", "rejected": f"{n * n + 1} or so"} for n in range(1, 9)]
PROMPTS = ["1+1=", "2+2=", "1+1=", "2+2="]
COMPLETIONS = ["2", "four", "three or more", "4"]
ADAPTERS: dict[str, Any] = {"ensemble": "adapters", "num_models": 3, "lora": {"r": 4, "lora_dropout": 0.0}}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_tiny_model(tmp_path_factory.mktemp("model"), "gpt2", initializer_range=0.1))


def trained(folder: str, **options: Any) -> RewardModule:
    torch.manual_seed(0)
    module = RewardModule(folder, optimizer=partial(torch.optim.AdamW, lr=1e-2), **{**ADAPTERS, **options})
    trainer("32-true", max_epochs=2).fit(module, PreferenceDataModule(train=ROWS, global_batch_size=4))
    return module


@pytest.fixture(scope="module")
def ensemble(folder: str) -> RewardModule:
    return trained(folder)


def merged_member(module: RewardModule, folder: str, member: int) -> Any:
    """A plain model with a member's adapter added to its weights by hand: W + (alpha / r) B A."""
    model: Any = AutoModelForCausalLM.from_pretrained(folder).eval()
    own = dict(module.model.get_base_model().named_parameters())
    name = f"member_{member}" if member else "default"
    added = 0
    for key, a in own.items():
        if key.endswith(f".lora_A.{name}.weight"):
            layer = key.removesuffix(f".lora_A.{name}.weight")
            b, weight = own[f"{layer}.lora_B.{name}.weight"], model.get_parameter(f"{layer}.weight")
            with torch.no_grad():
                weight += (8 / 4) * (b @ a).T  # gpt2 keeps its weights transposed
            added += 1
    assert added == 8
    return model


def naive_scores(module: RewardModule, folder: str) -> Tensor:
    """(S, M) rewards by plain models, one sequence at a time, before the members' means are taken off."""
    tokenizer, columns = char_tokenizer(), []
    for member in range(module.options.num_models):
        model, column = merged_member(module, folder, member), []
        for prompt, completion in zip(PROMPTS, COMPLETIONS, strict=True):
            tokens = [*tokenizer(prompt + completion)["input_ids"], tokenizer.eos_token_id]
            state = model.base_model(input_ids=torch.tensor([tokens])).last_hidden_state[0, -1]
            column.append(state @ module.head.weight[member, 0])
        columns.append(torch.stack(column))
    return torch.stack(columns, dim=1).detach()


def test_scores_are_those_of_as_many_plain_models(ensemble: RewardModule, folder: str) -> None:
    members = naive_scores(ensemble, folder) - ensemble.reward_model.means.value[:, 0].float()
    found, stds = ensemble.score_with_std(PROMPTS, COMPLETIONS)
    assert found == pytest.approx(members.mean(dim=1).tolist(), rel=1e-4, abs=1e-5)
    assert stds == pytest.approx(members.std(dim=1, correction=0).tolist(), rel=1e-4, abs=1e-5)
    assert min(stds) > 1e-2, "members that learned the same"


@pytest.mark.parametrize("options", [{"layout": "padded"}, {"micro_batch_tokens": 25}, {"share_prefix": False}])
@pytest.mark.filterwarnings("ignore:.*above micro_batch_tokens")
def test_scores_do_not_depend_on_the_layout(options: dict[str, Any], ensemble: RewardModule, tmp_path: Path) -> None:
    ensemble.save_pretrained(str(tmp_path / "export"))
    other = RewardModule.from_pretrained(str(tmp_path / "export"), **options)
    expected, found = (m.score_with_std(PROMPTS, COMPLETIONS) for m in (ensemble, other))
    assert found[0] == pytest.approx(expected[0], rel=1e-5, abs=1e-6)
    assert found[1] == pytest.approx(expected[1], rel=1e-4, abs=1e-6)


def test_a_folder_gives_the_same_scores_again(ensemble: RewardModule, folder: str, tmp_path: Path) -> None:
    export = tmp_path / "export"
    for _ in range(2):  # a folder that is there already is replaced
        ensemble.save_pretrained(str(export))
    again = RewardModule.from_pretrained(str(export))
    assert (again.options.ensemble, again.options.num_models) == ("adapters", 3)
    assert again.score_with_std(PROMPTS, COMPLETIONS) == ensemble.score_with_std(PROMPTS, COMPLETIONS)
    assert json.loads((export / "reward_head.json").read_text())["ensemble"] == "adapters"
    # Of the folder, the first member is an adapter as any other.
    base = AutoModelForCausalLM.from_pretrained(folder)
    first = PeftModel.from_pretrained(base, str(export)).get_base_model().eval()
    ids = torch.tensor([[5, 6, 7]])
    expected = merged_member(ensemble, folder, 0)(input_ids=ids).logits
    torch.testing.assert_close(first(input_ids=ids).logits, expected, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="leave head, num_attributes and num_models as they were trained"):
        RewardModule.from_pretrained(str(export), num_models=2)
    with pytest.raises(ValueError, match="has 3 adapters, which cannot become one model: set merge_adapter=False"):
        ensemble.save_pretrained(str(tmp_path / "merged"), merge_adapter=True)
    state = load_file(export / MEMBER_ADAPTERS)
    save_file(dict(list(state.items())[1:]), export / MEMBER_ADAPTERS)
    with pytest.raises(ValueError, match=f"{MEMBER_ADAPTERS}' are those of another ensemble: leave num_models"):
        RewardModule.from_pretrained(str(export))


@pytest.mark.parametrize("options", [{}, {"micro_batch_tokens": 40}, {"gradient_checkpointing": True}])
def test_a_step_is_that_of_every_member_alone(options: dict[str, Any], folder: str) -> None:
    """Against one-member modules that begin with a member's weights and see rows as often as the member counts them."""
    examples, settings = pairs(5), {**ADAPTERS, **options, "seed": 4}
    counts = bootstrap_weights([e.row_id for e in examples], 3, seed=4)
    assert not torch.equal(counts, torch.ones_like(counts))
    together = RewardModule(folder, **settings)
    found = step(together, examples)
    members = dict(together.model.named_parameters())  # every A is where it began, since every B began at zero
    heads = head_of(folder, 4)
    for member in range(3):
        names = {True: ".default.", False: f".member_{member}."}
        repeated = [e for e, count in zip(examples, counts[:, member].tolist(), strict=True) for _ in range(int(count))]
        repeated = [Example(f"again:{n}", e.root, e.fields) for n, e in enumerate(repeated)]
        single = RewardModule(folder, **{**settings, "num_models": 1})
        single._trainer = trainer("64-true")
        single.configure_model()
        with torch.no_grad():
            single.head.weight.copy_(heads[member : member + 1])
            for name, parameter in single.model.named_parameters():
                if "lora_A" in name:
                    parameter.copy_(members[name.replace(".default.", names[member == 0])])
        own = step(single.double(), repeated)
        assert sum("lora_B" in name for name in own.gradient) == 8
        for name, gradient in own.gradient.items():
            theirs = found.gradient[name.replace(".default.", names[member == 0])]
            theirs = theirs[member : member + 1] if name == "head.weight" else theirs
            # A mean over 5 rows and 3 members, and one over the member's own rows.
            error = float((theirs - len(repeated) / (5 * 3) * gradient).norm())
            assert error <= 1e-9 * max(1e-4, float(theirs.norm())), (member, name)
            assert "lora_B" not in name or float(theirs.norm()) > 1e-6


def head_of(folder: str, seed: int) -> Tensor:
    module = RewardModule(folder, seed=seed, num_models=3)
    module._trainer = trainer("64-true")
    module.configure_model()
    return module.head.weight.detach().double()


def test_members_begin_with_weights_of_their_own_and_all_of_them_learn(ensemble: RewardModule, folder: str) -> None:
    def begun(seed: int) -> dict[str, Tensor]:
        torch.manual_seed(seed + 10)
        module = RewardModule(folder, seed=seed, **ADAPTERS)
        module.configure_model()
        return {name: p.detach().clone() for name, p in member_state(module.model).items()}

    one, again, other = begun(0), begun(0), begun(1)
    names = [name for name in one if "lora_A.member_1" in name]
    assert len(names) == 8
    for name in names:
        assert torch.equal(one[name], again[name])
        assert not torch.equal(one[name], other[name])
        assert not torch.equal(one[name], one[name.replace("member_1", "member_2")])
    moved = {name: p for name, p in member_state(ensemble.model).items() if "lora_B" in name}
    assert len(moved) == 16
    assert all(p.requires_grad and float(p.abs().sum()) > 0 for p in moved.values())
    frozen = [name for name, p in ensemble.model.named_parameters() if not p.requires_grad]
    assert not [name for name in frozen if "lora" in name]


def test_switching_changes_neither_what_is_trained_nor_what_is_active(ensemble: RewardModule) -> None:
    model = ensemble.model
    flags = [p.requires_grad for p in model.parameters()]
    ids = torch.tensor([[5, 6, 7]])
    before = model(input_ids=ids).logits
    with using_member(model, 2):
        inside = model(input_ids=ids).logits
        with using_member(model, 1):
            assert not torch.equal(model(input_ids=ids).logits, inside)
        assert torch.equal(model(input_ids=ids).logits, inside)
        assert [p.requires_grad for p in model.parameters()] == flags
    assert torch.equal(model(input_ids=ids).logits, before)
    assert not torch.equal(before, inside)


def test_validation_and_prediction_are_those_of_the_scores(ensemble: RewardModule) -> None:
    data = PreferenceDataModule(val=ROWS, predict=ROWS, tokenizer=char_tokenizer())
    (metrics,) = trainer("32-true").validate(ensemble, data, verbose=False)
    predicted = trainer("32-true").predict(ensemble, data)
    assert predicted is not None
    rows = [row for batch in predicted for row in batch]
    prompts = [row["prompt"] for row in ROWS for _ in range(2)]
    found, stds = ensemble.score_with_std(prompts, [row[name] for row in ROWS for name in ("chosen", "rejected")])
    assert [value for row in rows for value in row["rewards"]] == pytest.approx(found, rel=1e-4, abs=1e-5)
    assert [value for row in rows for value in row["stds"]] == pytest.approx(stds, rel=1e-4, abs=1e-5)
    assert metrics["val/rewards/disagreement"] == pytest.approx(sum(stds) / len(stds), rel=1e-4)


def test_members_continue_from_a_trained_adapter_as_copies_of_it(folder: str, tmp_path: Path) -> None:
    sft = SFTModule(folder, lora={"r": 4, "init_lora_weights": False})
    sft.save_pretrained(str(tmp_path / "sft"))
    module = RewardModule(str(tmp_path / "sft"), ensemble="adapters", num_models=2)
    module.configure_model()
    own = dict(module.model.named_parameters())
    for name, parameter in member_state(module.model).items():
        assert torch.equal(parameter, own[name.replace("member_1", "default")])
        assert parameter.requires_grad
    assert not [name for name, p in own.items() if ".ref." in name and p.requires_grad]


def test_a_checkpoint_gives_the_same_scores_again(folder: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    module = RewardModule(folder, optimizer=partial(torch.optim.AdamW, lr=1e-2), **ADAPTERS)
    run = trainer("32-true", max_epochs=1)
    run.fit(module, PreferenceDataModule(train=ROWS, global_batch_size=4))
    run.save_checkpoint(tmp_path / "run.ckpt")
    torch.manual_seed(9)
    again = RewardModule.load_from_checkpoint(str(tmp_path / "run.ckpt"))
    assert again.score_with_std(PROMPTS, COMPLETIONS) == module.eval().score_with_std(PROMPTS, COMPLETIONS)


def test_an_empty_batch_and_options_that_cannot_be(folder: str) -> None:
    module = RewardModule(folder, **ADAPTERS)
    module._trainer = trainer("32-true")
    module.configure_model()
    assert module.backward_examples([])[0] == {}
    assert module.predict_step(ExampleBatch([]), 0) == []
    with pytest.raises(ValueError, match="ensemble is 'adapters', but the model has no adapter: give lora="):
        RewardModule(folder, ensemble="adapters", num_models=2).configure_model()
    with pytest.raises(ValueError, match="ensemble is 'models'; it must be one of heads, adapters"):
        RewardModule(folder, ensemble="models")  # type: ignore[arg-type]
