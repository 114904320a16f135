"""The engine for the OpenAI protocol: what it asks for, what it makes of answers, and a server of transformers."""

from __future__ import annotations

import importlib.util
import math
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from rlhf_lightning.inference import Completion, Engine, LocalEngine, RemoteEngine, SamplingParams, derive_seed
from rlhf_lightning.inference.http_client import ServerError

from ..helpers import char_tokenizer
from .served import Answer, completion, said, serve

GREEDY = SamplingParams(max_new_tokens=4, temperature=0.0)
PLAIN = SamplingParams(max_new_tokens=4, seed=5)


def engine(url: str, model: str | None = "m", **options) -> RemoteEngine:
    return RemoteEngine(url, model, **{"backoff": 0.0, "timeout": 5.0, "max_retries": 0, **options})


def ask(answer, prompts, num_samples=1, sampling=GREEDY, seeds=None, **options):
    """Returns the engine's completions, and the requests that the server received."""
    with serve(lambda path, body, number: answer(body) if callable(answer) else answer) as served:
        return engine(served.url, **options).generate(prompts, num_samples, sampling, seeds=seeds), served


def test_it_is_an_engine():
    either: Engine = RemoteEngine("http://host")
    assert either.generate([], 3) == []


def test_greedy_samples_are_asked_for_once_and_keep_the_order_of_prompts():
    found, served = ask(lambda body: completion(f"<{body['prompt']}>"), ["a", "b", "c"], num_samples=2)
    assert [[sample.text for sample in group] for group in found] == [["<a>"] * 2, ["<b>"] * 2, ["<c>"] * 2]
    assert sorted(body["prompt"] for body in served.bodies) == ["a", "b", "c"]
    assert all("seed" not in body for body in served.bodies)
    assert {path for path, _, _ in served.asked} == {"/v1/completions"}


def test_every_sample_has_its_own_seed():
    found, served = ask(lambda body: completion(str(body["seed"])), ["a", "b"], num_samples=3, sampling=PLAIN)
    wanted = [[derive_seed(5, row, column) % 2**31 for column in range(3)] for row in range(2)]
    assert [[int(sample.text) for sample in group] for group in found] == wanted
    assert len(served.bodies) == 6
    given, _ = ask(lambda body: completion(str(body["seed"])), ["a"], 2, PLAIN, seeds=[[7, 2**64 - 1]])
    assert [sample.text for sample in given[0]] == ["7", str(2**31 - 1)]


def test_all_settings_are_stated_to_vllm():
    # Omitted options such a server would take from the model's own generation_config.json.
    _, served = ask(completion("x"), [[5, 6]])
    assert served.bodies == [
        {
            "prompt": [5, 6],
            "model": "m",
            "max_tokens": 4,
            "temperature": 0.0,
            "top_p": 1.0,
            "top_k": -1,
            "min_p": 0.0,
            "repetition_penalty": 1.0,
            "stop_token_ids": [],
            "min_tokens": 0,
            "return_token_ids": True,
        }
    ]
    rich = SamplingParams(
        max_new_tokens=9,
        temperature=0.7,
        top_k=20,
        top_p=0.9,
        min_p=0.05,
        repetition_penalty=1.1,
        stop=("\n", "#"),
        stop_token_ids=(3,),
        min_new_tokens=2,
        seed=0,
    )
    _, served = ask(completion("x"), ["a"], sampling=rich, extra_body={"priority": 1, "top_k": 7})
    wanted = {"max_tokens": 9, "temperature": 0.7, "top_k": 7, "top_p": 0.9, "min_p": 0.05, "repetition_penalty": 1.1}
    wanted |= {"stop": ["\n", "#"], "stop_token_ids": [3], "min_tokens": 2, "priority": 1}
    assert wanted.items() <= served.bodies[0].items()


def test_other_servers_get_standard_fields_only():
    _, served = ask(completion("x"), ["a"], sampling=PLAIN, dialect="openai")
    assert served.bodies[0].keys() == {"prompt", "model", "max_tokens", "temperature", "seed"}
    needs = SamplingParams(top_k=5, min_new_tokens=1)
    with pytest.raises(ValueError, match=r"^dialect='openai' has no top_k and no min_tokens: use dialect='vllm'"):
        ask(completion("x"), ["a"], sampling=needs, dialect="openai")


def test_chat():
    talk = [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}]
    found, served = ask(said("fine"), ["hello"], api="chat")
    assert found[0][0].text == "fine"
    assert served.asked[0][0] == "/v1/chat/completions"
    assert served.bodies[0]["messages"] == [{"role": "user", "content": "hello"}]
    _, served = ask(said(None, "tool_calls"), [talk], api="chat")
    assert served.bodies[0]["messages"] == talk
    assert "prompt" not in served.bodies[0]


def test_log_probabilities_of_completions():
    reported = {"tokens": ["token_id:5", "token_id:1"], "token_logprobs": [-0.5, -2]}
    by_name, served = ask(completion("a", logprobs=reported), ["p"], sampling=PLAIN, logprobs=True)
    assert by_name == [[Completion([5, 1], "a", [-0.5, -2.0], "stop")]]
    assert (served.bodies[0]["logprobs"], served.bodies[0]["return_tokens_as_token_ids"]) == (1, True)
    by_number, _ = ask(completion("a", logprobs=reported, token_ids=[5, 1]), ["p"], sampling=PLAIN, logprobs=True)
    assert by_number[0][0].token_ids == [5, 1]
    words = {"tokens": ["a", ""], "token_logprobs": [-0.5, -2]}
    unnamed, _ = ask(completion("a", logprobs=words), ["p"], sampling=PLAIN, logprobs=True, dialect="openai")
    assert unnamed == [[Completion([], "a", [-0.5, -2.0], "stop")]]
    unasked, served = ask(completion("a", token_ids=[8, 9]), ["p"], sampling=PLAIN)
    assert unasked == [[Completion([8, 9], "a", [], "stop")]]
    assert "logprobs" not in served.bodies[0]


def test_log_probabilities_of_chats():
    content = [{"token": "token_id:5", "logprob": -0.25}, {"token": "token_id:6", "logprob": -1.5}]
    answer = said("hi", "length", logprobs={"content": content})
    found, served = ask(answer, ["p"], sampling=PLAIN, logprobs=True, api="chat")
    assert found == [[Completion([5, 6], "hi", [-0.25, -1.5], "length")]]
    assert served.bodies[0]["logprobs"] is True


def test_greedy_tokens_are_certain():
    reported = {"token_logprobs": [-0.5, -2]}
    found, served = ask(completion("a", token_ids=[8, 9]), ["p"], logprobs=True)
    assert found == [[Completion([8, 9], "a", [0.0, 0.0], "stop")]]
    assert "logprobs" not in served.bodies[0]
    asked = SamplingParams(max_new_tokens=4, temperature=0.0, model_logprobs=True)
    found, _ = ask(completion("a", token_ids=[8, 9], logprobs=reported), ["p"], sampling=asked)
    assert found == [[Completion([8, 9], "a", [0.0, 0.0], "stop", [-0.5, -2.0])]]


def test_whose_log_probabilities_they_are():
    reported = completion("a", token_ids=[8], logprobs={"token_logprobs": [-0.5]})
    warm = SamplingParams(max_new_tokens=4, temperature=0.7, seed=0)
    with pytest.raises(ValueError, match=r"^logprobs of the sampling distribution .* --logprobs-mode processed"):
        ask(reported, ["p"], sampling=warm, logprobs=True)
    processed, _ = ask(reported, ["p"], sampling=warm, logprobs=True, server_logprobs="sampling")
    assert processed[0][0].logprobs == [-0.5]
    of_model, _ = ask(
        reported, ["p"], sampling=SamplingParams(max_new_tokens=4, temperature=0.7, seed=0, model_logprobs=True)
    )
    assert (of_model[0][0].logprobs, of_model[0][0].model_logprobs) == ([], [-0.5])
    with pytest.raises(ValueError, match=r"^model_logprobs are not available from a server that reports"):
        ask(
            reported,
            ["p"],
            sampling=SamplingParams(max_new_tokens=4, temperature=0.7, seed=0, model_logprobs=True),
            server_logprobs="sampling",
        )


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (completion("a"), "returns no log-probabilities, which are needed here: use one that does, such as vLLM"),
        (completion("a", logprobs={"token_logprobs": None}), "returns no log-probabilities"),
        (completion("a", token_ids=[1, 2], logprobs={"token_logprobs": [-1.0]}), "1 log-probabilities for 2 tokens"),
        (completion("a", logprobs={"token_logprobs": [None]}), "some that are not numbers"),
        ({"object": "text"}, "without the choices of api='completions': {'object': 'text'}"),
        (said("a"), "without the choices of api='completions'"),
        ({"choices": []}, "without the choices of api='completions'"),
        (completion("a", "abort"), "ended a completion by 'abort', not stop or length"),
    ],
)
def test_answers_that_do_not_do(answer, message):
    with pytest.raises(ServerError, match=message) as caught:
        ask(answer, ["p"], sampling=PLAIN, logprobs=True)
    assert "\n" not in str(caught.value)


def test_text_ends_before_a_stop_string():
    stops = SamplingParams(max_new_tokens=8, temperature=0.0, stop=("#", "\n"))
    assert ask(completion("ab\ncd#e"), ["p"], sampling=stops)[0][0][0].text == "ab"
    late = SamplingParams(
        max_new_tokens=8, temperature=0.0, stop=("#",), min_new_tokens=3
    )  # what comes this early does not end it
    assert ask(completion("a#bcd"), ["p"], sampling=late)[0][0][0].text == "a#bcd"


def test_the_model_may_be_omitted():
    def answer(path, body, number):
        return {"data": [{"id": "only"}]} if path == "/v1/models" else completion(body["model"])

    with serve(answer) as served:
        found = engine(served.url, None)
        assert [found.generate(["p"], sampling=GREEDY)[0][0].text for _ in range(2)] == ["only"] * 2
    assert [path for path, _, _ in served.asked].count("/v1/models") == 1
    with (
        serve(lambda path, body, number: {"data": [{"id": "a"}, {"id": "b"}]}) as served,
        pytest.raises(ServerError, match=r"serves a, b: say which with model$"),
    ):
        engine(served.url, None).generate(["p"])


def test_an_unknown_model():
    def answer(path, body, number):
        missing = Answer(404, {"object": "error", "message": "The model `qwen3-b` does not exist."})
        return {"data": [{"id": "qwen3-8b"}]} if path == "/v1/models" else missing

    with (
        serve(answer) as served,
        pytest.raises(ServerError, match=r"has no model 'qwen3-b': it serves qwen3-8b; did you mean 'qwen3-8b'"),
    ):
        engine(served.url, "qwen3-b").generate(["p"])
    with (
        serve(lambda path, body, number: Answer(404, {"detail": "Not Found"})) as served,
        pytest.raises(ServerError, match=r"refuses POST .*/v1/completions: 404 Not Found$"),
    ):
        engine(served.url).generate(["p"])


def test_one_failure_is_fixed_and_does_not_lose_the_others():
    def answer(path, body, number):
        return Answer(500, {"error": "busy"}) if number in (1, 3) else completion(f"<{body['prompt']}>")

    with serve(answer) as served:
        found = engine(served.url, max_retries=2, max_concurrency=2).generate(list("abcdef"), sampling=GREEDY)
    assert [group[0].text for group in found] == [f"<{name}>" for name in "abcdef"]
    assert len(served.asked) == 8
    assert served.most_at_once <= 2


def test_the_key_comes_from_the_environment(monkeypatch):
    monkeypatch.setenv("JUDGE_KEY", "secret\n")
    with serve(lambda path, body, number: completion("x")) as served:
        engine(served.url, api_key_variable="JUDGE_KEY").generate(["p"])
    assert served.asked[0][2]["Authorization"] == "Bearer secret"
    monkeypatch.delenv("JUDGE_KEY")
    with pytest.raises(ValueError, match=r"^api_key_variable='JUDGE_KEY' is not set"):
        engine("http://host", api_key_variable="JUDGE_KEY")


def test_token_ids_as_text():
    tokenizer = char_tokenizer()
    ids = tokenizer("1+2=?\n")["input_ids"]
    _, served = ask(completion("x"), [ids], text_prompts=True, tokenizer=tokenizer)
    assert served.bodies[0]["prompt"] == "1+2=?\n"
    unknown = tokenizer.unk_token_id
    _, served = ask(completion("x"), [[unknown, *ids]], text_prompts=True, tokenizer=tokenizer)
    assert served.bodies[0]["prompt"] == "<unk>1+2=?\n"
    tokenizer.add_tokens(["12"])
    apart = tokenizer.convert_tokens_to_ids(["1", "2"])
    with pytest.raises(ValueError, match=r"^prompt 0 does not come back from its text '12' as the same tokens"):
        ask(completion("x"), [apart], text_prompts=True, tokenizer=tokenizer)


@pytest.mark.parametrize(
    ("options", "prompts", "message"),
    [
        ({}, [""], "^prompt 0 is empty"),
        ({}, [[1], []], "^prompt 1 is empty"),
        ({}, [[{"role": "user", "content": "u"}]], "^prompt 0 has messages, which api='completions' does not take"),
        ({"api": "chat"}, [[1, 2]], "^prompt 0 has token ids, which api='chat' does not take: use api='completions'"),
        ({"api": "talk"}, ["p"], "^api='talk' is not allowed: use one of completions, chat$"),
        ({"dialect": "x"}, ["p"], "^dialect='x' is not allowed: use one of vllm, openai$"),
        ({"server_logprobs": "x"}, ["p"], "^server_logprobs='x' is not allowed"),
        ({"max_concurrency": 0}, ["p"], "^max_concurrency=0 is not allowed"),
        ({"text_prompts": True}, ["p"], "^text_prompts needs the tokenizer"),
    ],
)
def test_what_cannot_be_asked_is_refused_before_anything_is_sent(options, prompts, message):
    with serve(lambda path, body, number: completion("x")) as served:
        with pytest.raises(ValueError, match=message):
            engine(served.url, **options).generate(prompts)
        with pytest.raises(ValueError, match=r"^num_samples=0 is not allowed"):
            engine(served.url).generate(["p"], 0)
        with pytest.raises(ValueError, match=r"^seeds has 1 rows of lengths"):
            engine(served.url).generate(["p"], 2, seeds=[[1]])
    assert not served.asked


SERVING = ("fastapi", "uvicorn", "openai")


@pytest.fixture(scope="module")
def served_folder(tiny_model_folder, tmp_path_factory):
    """A tiny model's folder, and the address where ``transformers serve`` serves it."""
    missing = [name for name in SERVING if importlib.util.find_spec(name) is None]
    if missing:
        pytest.skip(f"transformers serve needs {', '.join(missing)}: install the extra dev")
    folder = tiny_model_folder()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = tmp_path_factory.mktemp("serve") / "log"
    code = "from transformers.cli.transformers import main; main()"
    arguments = ["serve", str(folder), "--host=127.0.0.1", f"--port={port}", "--device=cpu", "--dtype=float32"]
    with log.open("w") as output:
        process = subprocess.Popen([sys.executable, "-c", code, *arguments], stdout=output, stderr=subprocess.STDOUT)
        try:
            _wait_for(f"http://127.0.0.1:{port}/health", process, log)
            yield folder, f"http://127.0.0.1:{port}"
        finally:
            process.terminate()
            process.wait(timeout=20)


def _wait_for(url: str, process: subprocess.Popen, log: Path) -> None:
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        try:
            with urllib.request.urlopen(url, timeout=1):
                return
        except OSError:
            time.sleep(0.1)
    pytest.fail(f"transformers serve did not start: {log.read_text()[-2000:]}")


@pytest.mark.slow
def test_greedy_output_is_that_of_the_local_engine(served_folder):
    folder, url = served_folder
    tokenizer = char_tokenizer()
    local = LocalEngine(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), tokenizer)
    remote = engine(url, str(folder), tokenizer=tokenizer, dialect="openai", text_prompts=True, timeout=60.0)
    prompts = ["1+2=?\n", "a", "what is 17+5?", "#"]
    params = SamplingParams(max_new_tokens=24, temperature=0.0)
    mine = local.generate(prompts, 2, params)
    theirs = remote.generate(prompts, 2, params)
    assert [[(s.text, s.finish_reason) for s in group] for group in theirs] == [
        [(s.text, s.finish_reason) for s in group] for group in mine
    ]
    assert len({group[0].text for group in mine}) == len(prompts)
    by_tokens = remote.generate([tokenizer(prompt)["input_ids"] for prompt in prompts], 1, params)
    assert [group[0].text for group in by_tokens] == [group[0].text for group in mine]
    stop = mine[0][0].text[5]
    stopping = SamplingParams(max_new_tokens=24, temperature=0.0, stop=(stop,))
    assert [group[0].text for group in remote.generate(prompts, 1, stopping)] == [
        group[0].text for group in local.generate(prompts, 1, stopping)
    ]


@pytest.mark.slow
def test_a_chat_is_rendered_by_the_server(served_folder):
    folder, url = served_folder
    tokenizer = char_tokenizer()
    local = LocalEngine(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), tokenizer)
    talk = [{"role": "user", "content": "1+2=?"}]
    rendered = tokenizer.apply_chat_template(talk, add_generation_prompt=True, return_dict=True)["input_ids"]
    wanted = local.generate([rendered], sampling=GREEDY)[0][0].text
    chat = engine(url, str(folder), api="chat", dialect="openai", timeout=60.0)
    assert chat.generate([talk], sampling=GREEDY)[0][0].text == wanted
    assert chat.generate(["1+2=?"], sampling=GREEDY)[0][0].text == wanted


@pytest.mark.slow
def test_what_this_server_cannot_do_is_one_line(served_folder):
    folder, url = served_folder
    refused = engine(url, "other", dialect="openai")
    with pytest.raises(ServerError, match=r"400 Server is pinned to '.*'; requested 'other'\.$"):
        refused.generate(["a"], sampling=GREEDY)
    with pytest.raises(ServerError, match=r"422 Unexpected fields in the request"):
        engine(url, str(folder)).generate(["a"], sampling=GREEDY)
    with pytest.raises(ServerError, match=r"400 prompt must be a string"):
        engine(url, str(folder), dialect="openai").generate([[5, 6]], sampling=GREEDY)
    with pytest.raises(ServerError, match=r"returns no log-probabilities"):
        engine(url, str(folder), dialect="openai", logprobs=True, timeout=60.0).generate(["a"], sampling=PLAIN)
    assert math.isfinite(sum(engine(url, str(folder), dialect="openai").generate(["a"], 1, GREEDY)[0][0].logprobs))


@pytest.mark.parametrize(
    ("listed", "expected"),
    [
        ({"data": [{"id": "a", "max_model_len": 100}, {"id": "b", "max_model_len": 50}]}, 90),
        ({"data": [{"id": "a"}]}, None),
        ({"data": [{"id": "b", "max_model_len": 50}]}, None),
        (Answer(404, {"error": "no such path"}), None),
    ],
)
def test_how_long_a_prompt_may_be(listed: Any, expected: int | None) -> None:
    """vLLM says how long its context is, and refuses a request that might not fit."""
    with serve(lambda path, body, number: listed) as served:
        assert RemoteEngine(served.url, "a").longest_prompt(SamplingParams(max_new_tokens=10)) == expected
