"""One rule makes token sequences, whether they are trained, scored or sampled."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from rlhf_lightning.data.formats import Row
from rlhf_lightning.data.text_tokens import decode
from rlhf_lightning.data.tokenization import RowTokenizer
from rlhf_lightning.datamodules import PromptDataModule
from rlhf_lightning.inference import LocalEngine, RemoteEngine, SamplingParams
from rlhf_lightning.modules import RewardModule
from rlhf_lightning.rewards import RewardModelReward
from tests.templates import FAMILIES, family_tokenizer, spell

EVERY = pytest.mark.parametrize("name", FAMILIES)
pytestmark = pytest.mark.filterwarnings("ignore:the chat template's generation prompt opens")
LETTERS = "▁ 0123456789abcdefghijklmnopqrstuvwxyz+=\n"


def blank_in_front(kind: str) -> PreTrainedTokenizerFast:
    """A tokenizer that begins every text with a blank; a blank and a 3 are one token."""
    vocab = {token: index for index, token in enumerate(["<eos>", "<bos>", *LETTERS, "▁3"])}
    inner = Tokenizer(models.BPE(vocab=vocab, merges=[("▁", "3")]))
    if kind == "prepend":
        inner.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        inner.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    else:
        inner.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=kind, split=False)
        inner.decoder = decoders.Metaspace(prepend_scheme=kind)
    return PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<eos>", bos_token="<bos>")


BLANKS = pytest.mark.parametrize("kind", ["always", "first", "prepend"])


@BLANKS
def test_no_blank_is_put_between_a_prompt_and_what_continues_it(kind: str) -> None:
    tokenizer = blank_in_front(kind)
    rows = RowTokenizer(tokenizer)
    root = rows.answers(Row("1+2=", ("3", " 3", "3 a")))
    assert spell(tokenizer, root.tokens.tolist()) == "▁1+2="
    assert [spell(tokenizer, child.tokens.tolist()) for child in root.children] == ["3<eos>", "▁3<eos>", "3▁a<eos>"]
    steps = rows.steps(Row("1+2=", ("3", "4")), "\n").children[0]
    assert spell(tokenizer, steps.tokens.tolist()) == "3\n4\n"
    # And back: the text of sampled tokens is what stands in the text.
    for child, text in zip(root.children, ("3", " 3", "3 a"), strict=True):
        assert decode(tokenizer, child.tokens.tolist()) == text


def tiny(tokenizer: PreTrainedTokenizerFast, seed: int = 0, **options: Any) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=512,
        initializer_range=0.5,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
        pad_token_id=None,
        **options,
    )
    return LlamaForCausalLM(config).eval()


@pytest.fixture
def reward_folder(tmp_path: Path, request: pytest.FixtureRequest) -> str:
    """A reward model with the tokenizer of the family that the test is about."""
    tokenizer = family_tokenizer(request.node.callspec.params["name"])
    tiny(tokenizer).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    module = RewardModule(str(tmp_path / "model"))
    module.configure_model()
    with torch.no_grad():
        module.head.weight.normal_(generator=torch.Generator().manual_seed(1))
    module.save_pretrained(str(tmp_path / "reward"))
    return str(tmp_path / "reward")


class Policy:
    """The tokenizer and template of the policy that a reward model reads."""

    device = torch.device("cpu")

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        self.tokenizer = tokenizer


@EVERY
def test_a_reward_reads_of_sampled_tokens_what_it_was_trained_on(name: str, reward_folder: str) -> None:
    tokenizer, chat = family_tokenizer(name), [{"role": "user", "content": "2+2?"}]
    rows = RowTokenizer(tokenizer)
    trained = rows.answers(Row(chat, ([{"role": "assistant", "content": "4"}],)))
    answer = trained.children[0].tokens.tolist()
    expected = RewardModule.from_pretrained(reward_folder).score([chat], ["4"])[0]
    reward = RewardModelReward(reward_folder)
    reward.attach(Policy(tokenizer))
    # As it was sampled: to its end, cut off before it, or ended by the end-of-sequence token instead.
    tail = rows.ended([], chat=True)
    cut = answer[: len(answer) - len(tail)]
    for ids in (answer, cut, [*cut, rows.eos], [*answer, rows.eos]):
        found = reward([chat], [decode(tokenizer, ids)], [trained.tokens.tolist()], [ids])
        assert found == pytest.approx([expected], abs=1e-5), spell(tokenizer, ids)
    assert reward([chat], ["4"]) == pytest.approx([expected], abs=1e-5)


@EVERY
def test_a_rendered_chat_is_sampled_from_as_the_row_is(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The text of a rendered chat gives the prompt's own tokens: nothing is put in front of it a second time."""
    tokenizer = family_tokenizer(name)
    data = PromptDataModule(predict=[{"prompt": [{"role": "user", "content": "2+2?"}]}], tokenizer=tokenizer)
    data.setup("predict")
    (example,) = (e for batch in data.predict_dataloader() for e in batch)
    text = spell(tokenizer, example.root.tokens.tolist())
    if FAMILIES[name].opening and not text.startswith("<bos>"):
        pytest.fail("a template of a tokenizer that opens texts writes the opening")
    engine = LocalEngine(tiny(tokenizer), tokenizer)
    sampling = SamplingParams(max_new_tokens=4, seed=1)
    by_text = engine.generate([text], 2, sampling)
    by_tokens = engine.generate([example.root.tokens.tolist()], 2, sampling)
    assert [s.token_ids for s in by_text[0]] == [s.token_ids for s in by_tokens[0]]
    remote = RemoteEngine("http://localhost:1", "served", tokenizer=tokenizer)
    sent = remote._prompt(0, text)["prompt"]
    assert list(tokenizer(sent)["input_ids"]) == example.root.tokens.tolist()


@EVERY
def test_sampling_ends_where_trained_answers_end(name: str) -> None:
    """A model that writes nothing but what ends a trained answer stops at its first token."""
    tokenizer = family_tokenizer(name)
    rows = RowTokenizer(tokenizer)
    trained = rows.answers(Row([{"role": "user", "content": "a"}], ([{"role": "assistant", "content": "b"}],)))
    end = int(trained.children[0].tokens[-1])
    assert end in rows.end_tokens
    assert rows.end_tokens[-1] == rows.eos or end == rows.eos
    model = tiny(tokenizer)
    with torch.no_grad():
        model.lm_head.weight.zero_()
        model.lm_head.weight[end] = 1e3 * model.model.norm.weight
        model.model.embed_tokens.weight.abs_()
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
    (sample,) = LocalEngine(model, tokenizer).generate(
        [trained.tokens.tolist()], 1, SamplingParams(max_new_tokens=5, temperature=0.0)
    )[0]
    assert (sample.token_ids, sample.finish_reason) == ([end], "stop")
    settings = RemoteEngine("http://localhost:1", "served", tokenizer=tokenizer)._settings(SamplingParams())
    assert end == rows.eos or end in settings["stop_token_ids"]
