"""Retried and final errors, against a server that fails by script."""

from __future__ import annotations

import json
import socket
import threading
import time

import pytest

from rlhf_lightning.inference.http_client import Endpoint, ServerError, in_parallel

from .served import Answer, serve

GOOD = {"fine": 1}


def endpoint(url: str, **options) -> Endpoint:
    return Endpoint(url, **{"backoff": 0.0, "timeout": 5.0, **options})


def test_address():
    assert Endpoint("http://host:8000").url == "http://host:8000/v1"
    assert Endpoint("http://host:8000/").url == "http://host:8000/v1"
    assert Endpoint("https://host/v1/").url == "https://host/v1"
    assert Endpoint("https://host/api/openai").url == "https://host/api/openai"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"url": "host:8000"}, r"^url='host:8000' is not allowed: write it .* as http://host:8000$"),
        ({"url": "ftp://host"}, r"^url='ftp://host' is not allowed: .* as http://host$"),
        ({"timeout": 0}, "^timeout=0 is not allowed: it must be above 0 seconds$"),
        ({"max_retries": -1}, "^max_retries=-1 is not allowed"),
        ({"backoff": -1.0}, "^backoff=-1.0 is not allowed"),
    ],
)
def test_options_out_of_range(options, message):
    with pytest.raises(ValueError, match=message):
        Endpoint(**{"url": "http://host", **options})


@pytest.mark.parametrize(
    "failure",
    [
        Answer(500, {"error": {"message": "out of memory"}}),
        Answer(503, b""),
        Answer(429, {"detail": "slow down"}, headers={"Retry-After": "0"}),
        Answer(408, {}),
        Answer(200, b'{"choices": [{"te'),
        Answer(200, b'{"fine": 1}', length=500),
        Answer(200, [1, 2]),
        Answer(200, GOOD, wait=30.0),
    ],
    ids=["500", "503", "429", "408", "half an object", "broken off", "a list", "late"],
)
def test_what_may_pass_is_tried_again(failure):
    with serve(lambda path, body, number: failure if number < 2 else GOOD) as served:
        assert endpoint(served.url, timeout=0.2, max_retries=2).post("x", {"a": 1}) == GOOD
    assert [(path, body) for path, body, _ in served.asked] == [("/v1/x", {"a": 1})] * 3


@pytest.mark.parametrize(
    ("failure", "message", "status"),
    [
        (Answer(500, {"error": {"message": "out\nof memory"}}), "fails at POST .*/v1/x: 500 out of memory", 500),
        (Answer(503, b"<html>"), "fails at POST .*/v1/x: 503 <html>", 503),
        (Answer(200, b'{"choices": [{"te'), r"""did not answer with a JSON object: '\{"choices": \[\{"te'""", None),
        (Answer(200, b'{"fine": 1}', length=500), "ended its answer early: IncompleteRead", None),
        (Answer(200, GOOD, wait=30.0), "gave no answer within 0.2 s: raise timeout", None),
    ],
)
def test_what_does_not_pass_is_one_line(failure, message, status):
    with serve(lambda path, body, number: failure) as served:
        with pytest.raises(ServerError, match=rf"{message}.* \(2 attempts\)$") as caught:
            endpoint(served.url, timeout=0.2, max_retries=1).post("x", {})
        assert len(served.asked) == 2
    assert "\n" not in str(caught.value)
    assert caught.value.status == status


@pytest.mark.parametrize(
    ("failure", "message"),
    [
        (Answer(400, {"object": "error", "message": "too long"}), "refuses POST .*: 400 too long$"),
        (Answer(401, {"error": "Unauthorized"}), "refuses .*: 401 Unauthorized; put its key .* in api_key_variable$"),
        (Answer(404, {"detail": "Not Found"}), "refuses .*: 404 Not Found$"),
        (Answer(422, {"detail": [{"loc": ["n"]}]}), r'refuses .*: 422 \[\{"loc": \["n"\]\}\]$'),
        (Answer(501, b""), "fails at .*: 501 Not Implemented$"),
    ],
)
def test_what_is_final_is_not_repeated(failure, message):
    with serve(lambda path, body, number: failure) as served:
        with pytest.raises(ServerError, match=message):
            endpoint(served.url).post("x", {})
        assert len(served.asked) == 1


def test_no_server():
    with socket.socket() as taken:  # bound, and not listening
        taken.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{taken.getsockname()[1]}"
        with pytest.raises(ServerError, match=rf"^no server answers at {url}/v1: .*refused; start one") as caught:
            endpoint(url, max_retries=2).get("models")
    assert str(caught.value).endswith("(3 attempts)")


def test_pauses_double_and_the_server_may_ask_for_longer(monkeypatch):
    pauses: list[float] = []
    monkeypatch.setattr(time, "sleep", pauses.append)
    headers = {3: "7", 4: "3600", 5: "Wed, 21 Oct 2026 07:28:00 GMT"}

    def answer(path, body, number):
        return Answer(503, {}, headers={"Retry-After": headers[number]} if number in headers else {})

    with serve(answer) as served, pytest.raises(ServerError):
        endpoint(served.url, backoff=0.5, max_retries=7).get("models")
    assert pauses == [0.5, 1.0, 2.0, 7.0, 30.0, 16.0, 30.0]


def test_the_key_goes_to_the_server_and_nowhere_else():
    with serve(lambda path, body, number: GOOD) as other:
        redirect = Answer(302, {}, headers={"Location": f"{other.url}/v1/x"})
        with serve(lambda path, body, number: redirect if number else GOOD) as served:
            guarded = endpoint(served.url, api_key="secret")
            assert guarded.get("models") == GOOD
            with pytest.raises(ServerError, match="302") as caught:
                guarded.post("x", {})
        assert served.asked[0][2]["Authorization"] == "Bearer secret"
        assert not other.asked
    assert "secret" not in f"{caught.value}{vars(caught.value)}"


def test_proxies_are_not_for_this_machine(monkeypatch):
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    monkeypatch.delenv("no_proxy", raising=False)
    with serve(lambda path, body, number: GOOD) as served:
        assert endpoint(served.url).get("models") == GOOD


def test_in_parallel_keeps_order_and_its_limit():
    lock, running, most = threading.Lock(), 0, 0

    def call(number: int) -> str:
        nonlocal running, most
        with lock:
            running += 1
            most = max(most, running)
        time.sleep(0.002 * (number % 3))
        with lock:
            running -= 1
        return json.dumps(number)

    assert in_parallel(call, list(range(20)), limit=3) == [str(number) for number in range(20)]
    assert most == 3
    assert in_parallel(call, [], limit=3) == []


def test_the_first_error_ends_it():
    begun: list[int] = []

    def call(number: int) -> int:
        begun.append(number)
        if number == 1:
            raise ValueError("no")
        return number

    with pytest.raises(ValueError, match=r"^no$"):
        in_parallel(call, list(range(100)), limit=1)
    assert begun == [0, 1]
