"""A server's answers are checked, and secrets are in no message."""

from __future__ import annotations

import threading
import time
from typing import Any

import pytest

from rlhf_lightning.inference import RemoteEngine, SamplingParams
from rlhf_lightning.inference.http_client import Endpoint, ServerError, in_parallel

from ..inference.served import Answer, completion, said, serve

PLAIN = SamplingParams(max_new_tokens=4, seed=5)


@pytest.mark.parametrize("key", ["first\nsecond", "first\r\nX-Other: 1", "a b", "k\u00e9y", "a\0b", "\ud800"])
@pytest.mark.parametrize("door", ["endpoint", "variable"])
def test_an_invalid_key_is_refused_and_not_shown(key: str, door: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # Some of these cannot be put into an environment.
    monkeypatch.setattr("os.environ", {"KEY": key})
    make, options = (Endpoint, {"api_key": key}) if door == "endpoint" else (RemoteEngine, {"api_key_variable": "KEY"})
    with pytest.raises(ValueError, match="not visible ASCII") as caught:
        make("http://host", **options)  # type: ignore[operator]
    assert str(caught.value) == (
        f"the api_key has {len(key)} characters, some of them not visible ASCII (a line break, a blank): "
        "write the key alone"
    )
    assert caught.value.__cause__ is None


@pytest.mark.parametrize(
    "url",
    [
        "http://user:hunter2@host:8000/v1",
        "http://hunter2@host",
        "https://host/v1?key=hunter2",
        "https://host/v1#hunter2",
        "ftp://user:hunter2@host",
        "user:hunter2@host:8000",
        "http://user:hunter2@[bad",
    ],
)
def test_a_password_in_an_address_is_refused_and_not_shown(url: str) -> None:
    for make in (Endpoint, RemoteEngine):
        with pytest.raises(ValueError, match="url") as caught:
            make(url)
        assert "hunter2" not in str(caught.value)
        assert "api_key_variable" in str(caught.value) or "allowed" in str(caught.value)


@pytest.mark.parametrize("status", [400, 401, 500])
def test_a_server_that_repeats_the_key(status: int) -> None:
    def answer(path: str, body: Any, number: int) -> Answer:
        return Answer(status, {"error": {"message": "invalid header: Bearer sk-hunter2"}})

    with serve(answer) as served, pytest.raises(ServerError, match=r"Bearer \*\*\*") as caught:
        Endpoint(served.url, api_key="sk-hunter2", max_retries=1, backoff=0.0).post("x", {})
    assert "hunter2" not in str(caught.value)
    assert served.asked[0][2]["Authorization"] == "Bearer sk-hunter2"


@pytest.mark.parametrize("status", [400, 404, 500])
def test_no_request_after_an_error(status: int) -> None:
    """Eight at once: the first is refused; the others find the server busy, and do not ask again."""
    together = threading.Barrier(8, timeout=20)

    def answer(path: str, body: Any, number: int) -> Any:
        if path.endswith("models"):
            return {"data": [{"id": "other"}]}
        together.wait()
        return Answer(
            status if body["prompt"] == "p0" else 503, {"error": "no"}, wait=0.0 if body["prompt"] == "p0" else 0.3
        )

    with serve(answer) as served:
        retries = 0 if status == 500 else 4
        engine = RemoteEngine(served.url, "m", max_concurrency=8, max_retries=4, backoff=0.5 if retries else 30.0)
        if not retries:
            engine.endpoint.max_retries = 0
        with pytest.raises(ServerError):
            engine.generate([f"p{n}" for n in range(40)], sampling=SamplingParams(max_new_tokens=4, temperature=0.0))
        time.sleep(1.2)
        assert len(served.bodies) == 8
        assert len(served.asked) - 8 == (status == 404)


def test_all_fail_at_once_and_one_asks_why() -> None:
    together = threading.Barrier(8, timeout=20)

    def answer(path: str, body: Any, number: int) -> Any:
        if path.endswith("models"):
            return {"data": [{"id": "other"}]}
        together.wait()
        return Answer(404, {"error": "no"})

    with serve(answer) as served:
        with pytest.raises(ServerError, match="has no model 'm': it serves other"):
            RemoteEngine(served.url, "m", max_concurrency=8).generate(["p"] * 8)
        time.sleep(0.3)
        assert [path for path, _, _ in served.asked].count("/v1/models") == 1


def test_calls_under_way_are_told() -> None:
    stopped = threading.Event()

    def call(item: int) -> None:
        if item == 0:
            raise ValueError("first")
        assert stopped.wait(20)

    with pytest.raises(ValueError, match="first"):
        in_parallel(call, [0, 1], limit=2, stopped=stopped)


def _ask(answer: Any, api: str = "completions", **options: Any) -> Any:
    with serve(lambda path, body, number: answer) as served:
        engine = RemoteEngine(served.url, "m", api=api, max_retries=0, **options)  # type: ignore[arg-type]
        return engine.generate(["p"], sampling=PLAIN)[0][0]


BAD_IDS: list[Any] = [-1, 1.5, 2.0, True, None, "x", "-1", "1.5", "\u0661", [1]]


@pytest.mark.parametrize("bad", BAD_IDS)
def test_token_ids_are_whole_numbers_from_0(bad: Any) -> None:
    with pytest.raises(
        ServerError, match=r"at http://127.0.0.1:\d+/v1 returns the token id .*, which is not a whole number"
    ):
        _ask(completion("a", token_ids=[1, bad]))
    if isinstance(bad, str):
        names = {"tokens": ["token_id:1", f"token_id:{bad}"], "token_logprobs": [-1.0, -1.0]}
        with pytest.raises(ServerError, match="which is not a whole number"):
            _ask(completion("a", logprobs=names), logprobs=True)
        content = [{"token": f"token_id:{bad}", "logprob": -1.0}]
        with pytest.raises(ServerError, match="which is not a whole number"):
            _ask(said("a", logprobs={"content": content}), api="chat", logprobs=True)


@pytest.mark.parametrize("bad", [0.5, 0.001, float("nan"), float("inf"), None, "-1", True])
def test_log_probabilities_are_at_most_0(bad: Any) -> None:
    with pytest.raises(ServerError, match="2 log-probabilities for 2 tokens, or some that are not numbers of"):
        _ask(completion("a", token_ids=[1, 2], logprobs={"token_logprobs": [-1.0, bad]}), logprobs=True)
    content = [{"token": "a", "logprob": -1.0}, {"token": "b", "logprob": bad}]
    with pytest.raises(ServerError, match="2 log-probabilities for 2 tokens, or some"):
        _ask(said("a", token_ids=[1, 2], logprobs={"content": content}), api="chat", logprobs=True)


def test_rounding_is_no_lie() -> None:
    found = _ask(completion("a", token_ids=[1, 2], logprobs={"token_logprobs": [1e-6, -float("inf")]}), logprobs=True)
    assert found.logprobs == [0.0, -float("inf")]


def test_log_probabilities_of_other_tokens_are_refused() -> None:
    names = {"tokens": ["token_id:1", "token_id:3"], "token_logprobs": [-1.0, -1.0]}
    assert _ask(completion("a", token_ids=[1, 3], logprobs=names), logprobs=True).token_ids == [1, 3]
    for ids in ([1, 2], [3, 1], [1], [1, 3, 4]):
        with pytest.raises(ServerError, match="returns log-probabilities of other tokens"):
            _ask(completion("a", token_ids=ids, logprobs=names), logprobs=True)


def test_text_can_be_written() -> None:
    found = _ask(completion("a\ud83d\ude00b\ud800c"))
    assert found.text == "a\N{GRINNING FACE}b\N{REPLACEMENT CHARACTER}c"
    assert _ask(said("\udfff"), api="chat").text == "\N{REPLACEMENT CHARACTER}"
