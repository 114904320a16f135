"""Models with tokenizers of their own: a model and its twin, whose tokens have other numbers, answer alike."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from rlhf_lightning.cli import main
from rlhf_lightning.evaluation import divergence, evaluate, own_samples
from rlhf_lightning.evaluation.answers import read_prompts
from rlhf_lightning.inference import EnsemblePolicy, LocalEngine, SamplingParams
from rlhf_lightning.models import load_tokenizer
from rlhf_lightning.pipeline.judging import Judge, criteria_of
from rlhf_lightning.pipeline.self_play_stage import run_self_play
from rlhf_lightning.pipeline.stages import SelfPlayStage

from ..helpers import EOS_ID, VOCAB_SIZE, char_tokenizer, save_tiny_model

PROMPTS = [f"{n}+{n + 1}=?" for n in range(8)]
SAMPLING = {"max_new_tokens": 6, "temperature": 0.0}
VERIFIER = f"{__name__}.code_of_first"
# Every token of the twin has another number, those of the end and of padding included.
NUMBERS = [(number + 7) % VOCAB_SIZE for number in range(VOCAB_SIZE)]
DIFFER = "the token '<pad>' is 0 in one and 7 in the other"


def code_of_first(prompts: list[Any], completions: list[str], **columns: Any) -> list[float]:
    return [float(ord(text[0]) % 2) if text else 0.0 for text in completions]


def save_twin(source: Path, folder: Path) -> str:
    """Writes a model with the tokens of another, numbered in another way."""
    model = AutoModelForCausalLM.from_pretrained(source)
    places = torch.tensor(NUMBERS)
    for layer in (model.get_input_embeddings(), model.get_output_embeddings()):
        moved = torch.empty_like(layer.weight)
        moved[places] = layer.weight.detach()
        layer.weight.data.copy_(moved)
    model.config.eos_token_id = model.generation_config.eos_token_id = NUMBERS[EOS_ID]
    model.config.pad_token_id = model.generation_config.pad_token_id = NUMBERS[0]
    model.save_pretrained(folder)
    plain = char_tokenizer()
    backend = json.loads(plain.backend_tokenizer.to_str())
    backend["model"]["vocab"] = {token: NUMBERS[number] for token, number in backend["model"]["vocab"].items()}
    for added in backend["added_tokens"]:
        added["id"] = NUMBERS[added["id"]]
    special = {"pad_token": "<pad>", "eos_token": "<eos>", "unk_token": "<unk>"}
    twin = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(backend)), **special)
    twin.chat_template = plain.chat_template
    twin.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("models")
    plain = save_tiny_model(folder / "plain", "llama", seed=3)
    return {"plain": str(plain), "twin": save_twin(plain, folder / "twin")}


@pytest.fixture
def prompts(tmp_path: Path) -> str:
    file = tmp_path / "prompts.jsonl"
    file.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in PROMPTS))
    return str(file)


def suite_of(prompts: str, **options: Any) -> dict[str, Any]:
    task = {"name": "first", "prompts": prompts, "verifier": VERIFIER, "sampling": SAMPLING}
    return {"name": "tokens", "tasks": [{**task, **options}]}


class Judge5050:
    """Finds both answers equally good."""

    def __call__(self, texts: list[str]) -> list[float]:
        return [0.5] * len(texts)


def test_the_twin_s_numbers_are_others_and_its_words_the_same(models):
    """The control: read with the other tokenizer, the twin says something else."""
    own, other = load_tokenizer(models["twin"]), load_tokenizer(models["plain"])
    assert own("1+1=?<eos>")["input_ids"] == [NUMBERS[n] for n in other("1+1=?<eos>")["input_ids"]]
    twin = LocalEngine.from_pretrained(models["twin"])
    params = SamplingParams(**SAMPLING)
    words = [group[0].text for group in twin.generate(PROMPTS, 1, params)]
    plain = LocalEngine.from_pretrained(models["plain"]).generate(PROMPTS, 1, params)
    assert words == [group[0].text for group in plain]
    assert len(set(words)) > 3
    mistaken = LocalEngine(twin.model, other).generate(PROMPTS, 1, params)
    assert words != [group[0].text for group in mistaken]


WINS: dict[str, Any] = {"reward": "reward", "judge": {"judge": {"class_path": f"{__name__}.Judge5050"}}}


@pytest.mark.parametrize("wins", WINS.values(), ids=WINS)
def test_each_model_is_evaluated_with_its_own_tokenizer(models, prompts, wins):
    report = evaluate(models, suite_of(prompts, win_rate=wins))
    plain, twin = (report.result(name, "first") for name in models)
    texts = [[prompt.samples[0].text for prompt in found.prompts] for found in (plain, twin)]
    assert texts[0] == texts[1]
    assert plain.scores == twin.scores
    assert 0 < plain.accuracy.value < 1
    assert plain.metrics == twin.metrics  # lengths in tokens among them
    # By texts: what is said alike is a tie.
    (found,) = report.wins
    assert (found.rate.wins, found.rate.ties, found.rate.losses) == (0, len(PROMPTS), 0)


def test_divergences_of_different_tokens_are_refused(models, prompts):
    plain, twin = (LocalEngine.from_pretrained(folder) for folder in models.values())
    assert plain.model.config.vocab_size == twin.model.config.vocab_size
    rows = own_samples(plain, read_prompts(prompts, plain.tokenizer), sampling=SamplingParams(**SAMPLING))
    assert divergence(plain, plain, rows).forward == 0.0
    with pytest.raises(ValueError, match=re.escape(f"differ: {DIFFER}; distributions over different tokens")):
        divergence(plain, twin, rows)


def test_a_gate_compares_answers_and_refuses_a_limit_on_the_divergence(models, prompts, tmp_path):
    said: list[str] = []

    def judge(folder: str, **criteria: Any) -> Judge:
        written = criteria_of({"accept": "not_worse", **criteria})
        return Judge(suite_of(prompts), written, tmp_path / folder, 0, "float32", models["plain"], said.append)

    decision, _ = judge("a").decide(models["plain"], models["twin"])
    assert (decision.difference, decision.kl) == (0.0, None)
    assert len(said) == 2
    with pytest.raises(ValueError, match="the token '<' is 0 in one and 57 in the other") as raised:
        judge("b", max_kl=0.1).decide(models["plain"], models["twin"])
    assert str(raised.value).endswith("be compared: criteria.max_kl is 0.1 and needs one tokenizer, so leave it out")
    # Before any of the two has answered.
    assert len(said) == 2
    assert not (tmp_path / "b").exists()


def test_players_read_prompts_with_their_own_tokenizers(models, prompts, tmp_path):
    options: dict[str, Any] = {"rows": ["samples"], "sampling": SAMPLING, "verifier": VERIFIER}
    stage = SelfPlayStage(model=models["plain"], opponents=[models["twin"]], prompts=prompts, **options)
    found = run_self_play(stage, tmp_path, 0, "float32")
    assert (found["win_rate"], found["elo"]) == (0.5, 1000.0)
    rows = [json.loads(line) for line in (tmp_path / "samples.jsonl").read_text().splitlines()]
    answers = [[row["completion"] for row in rows if row["prompt"] == prompt] for prompt in PROMPTS]
    assert all(one == other for one, other in answers)


def test_an_ensemble_of_different_tokens_is_refused(models, prompts, tmp_path, capsys):
    message = f"the tokenizers of {models['plain']!r} and {models['twin']!r} differ: {DIFFER}; only models of one"
    with pytest.raises(ValueError, match=re.escape(message)):
        EnsemblePolicy(list(models.values()))
    # Before anything is sampled, or a file begun.
    with pytest.raises(ValueError, match=re.escape(message)):
        evaluate({"plain": models["plain"], "both": list(models.values())}, suite_of(prompts), output=tmp_path / "out")
    assert not (tmp_path / "out").exists()
    output, both = tmp_path / "out.jsonl", json.dumps(list(models.values()))
    with pytest.raises(SystemExit):
        main(["generate", f"--model={both}", f"--prompts={prompts}", f"--output={output}"])
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert message in line
    assert not output.exists()
