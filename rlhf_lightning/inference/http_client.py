"""JSON over HTTP to a server that may be slow, busy, restarting or away: retries, time limits, one-line errors."""

from __future__ import annotations

import http.client
import json
import math
import os
import queue
import re
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

from ..utils.messages import one_line

T = TypeVar("T")
R = TypeVar("R")

_LONGEST_PAUSE = 30.0
# Statuses worth a retry: too early, too slow, too many requests; and server failures (5xx), except for the ones that
# mean that the server cannot do this at all.
_PASSING = (408, 425, 429)
_FINAL_FAILURES = (501, 505)
_KEY = re.compile(r"[!-~]+")
_LOOPBACK = ("localhost", "127.0.0.1", "::1")


class ServerError(ValueError):
    """A request to a server that failed.

    Attributes:
        status: the HTTP status of its last answer; ``None`` without an answer that could be read.
    """

    def __init__(self, message: str, status: int | None = None) -> None:
        super().__init__(message)
        self.status = status


class _FailedAttemptError(Exception):
    """One failed attempt: holds the message in case it was the last, and whether another may succeed."""

    def __init__(self, message: str, *, passing: bool, status: int | None = None, pause: float = 0.0) -> None:
        super().__init__(message)
        self.passing = passing
        self.status = status
        self.pause = pause


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    """Follows no redirect, which would send the key to another address."""

    def redirect_request(self, *args: Any) -> None:
        return None


class Endpoint:
    """A client for a server's base address, with retries and time limits.

    A request that finds no server, times out, gets half an answer, or one of the statuses 408, 425, 429 and 5xx (but
    501 and 505) is repeated after a pause, which doubles each time up to half a minute; a server's ``Retry-After`` is
    honoured up to that. Other errors are final. Redirects are not followed; proxies of the environment are used, except
    for the local machine. No message contains the key, even where the server repeats it.

    Args:
        url: such as ``http://localhost:8000`` or ``https://host/v1``; an address without a path gets ``/v1``. It holds
            no user, password or query: addresses are written into records and messages.
        api_key: sent as a bearer token, of visible ASCII characters; ``None`` for none.
        timeout: seconds without a byte after which a request is given up, above 0.
        max_retries: further attempts after the first, at least 0.
        backoff: seconds before the second attempt, at least 0.

    Raises:
        ValueError: for an invalid address, or a number out of range.

    Example:
        >>> Endpoint("localhost:8000")
        Traceback (most recent call last):
        ...
        ValueError: url='localhost:8000' is not allowed: write it with http:// or https://, as http://localhost:8000
    """

    def __init__(
        self,
        url: str,
        *,
        api_key: str | None = None,
        timeout: float = 600.0,
        max_retries: int = 4,
        backoff: float = 0.5,
    ) -> None:
        parts = _split(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            rest = url.rpartition("://")[2] or "localhost:8000"
            raise ValueError(f"url={url!r} is not allowed: write it with http:// or https://, as http://{rest}")
        if api_key is not None and not _KEY.fullmatch(api_key):
            raise ValueError(
                f"the api_key has {len(api_key)} characters, some of them not visible ASCII (a line break, a "
                "blank): write the key alone"
            )
        for name, value, valid, allowed in (
            ("timeout", timeout, 0 < timeout < math.inf, "above 0 seconds"),
            ("max_retries", max_retries, max_retries >= 0, "at least 0; 4 is usual"),
            ("backoff", backoff, 0 <= backoff < math.inf, "at least 0 seconds"),
        ):
            if not valid:
                raise ValueError(f"{name}={value} is not allowed: it must be {allowed}")

        # Servers put the protocol below /v1: added to an address without a path.
        self.url = url.rstrip("/") if parts.path.strip("/") else f"{parts.scheme}://{parts.netloc}/v1"
        self.timeout = timeout
        self.max_retries = max_retries
        self.backoff = backoff
        self._headers = {"Content-Type": "application/json", "Accept": "application/json"}
        self._api_key = api_key
        if api_key is not None:
            self._headers["Authorization"] = f"Bearer {api_key}"

        # A proxy cannot reach this machine's own loopback.
        proxies = [urllib.request.ProxyHandler({})] if parts.hostname in _LOOPBACK else []
        self._opener = urllib.request.build_opener(_NoRedirects, *proxies)

    def get(self, path: str, stopped: threading.Event | None = None) -> dict[str, Any]:
        """Fetches an object from a path below the base address, such as ``models``."""
        return self._request(path, None, stopped)

    def post(self, path: str, body: Mapping[str, Any], stopped: threading.Event | None = None) -> dict[str, Any]:
        """Sends an object to a path below the base address, and returns the one that comes back.

        Args:
            path: such as ``completions``.
            body: the object.
            stopped: once it is set, no further attempt is made.

        Raises:
            ServerError: after the last attempt.
        """
        return self._request(path, json.dumps(body).encode(), stopped)

    def _request(self, path: str, data: bytes | None, stopped: threading.Event | None) -> dict[str, Any]:
        request = urllib.request.Request(f"{self.url}/{path}", data, self._headers)
        for attempt in range(self.max_retries + 1):
            try:
                return self._attempt(request)
            except _FailedAttemptError as failed:
                said = self._without_key(str(failed))
                if not failed.passing:
                    raise ServerError(said, failed.status) from None
                # Exponential backoff, or as long as the server asks for.
                pause = min(max(self.backoff * 2.0**attempt, failed.pause), _LONGEST_PAUSE)
                if attempt == self.max_retries or _is_stopped(pause, stopped):
                    tried = f"{attempt + 1} attempts" if attempt else "1 attempt"
                    raise ServerError(f"{said} ({tried})", failed.status) from None
        raise AssertionError("unreachable")

    def _without_key(self, text: str) -> str:
        return text if self._api_key is None else text.replace(self._api_key, "***")

    def _attempt(self, request: urllib.request.Request) -> dict[str, Any]:
        try:
            with self._opener.open(request, timeout=self.timeout) as response:
                content = response.read()
        except urllib.error.HTTPError as error:
            with error:
                raise self._refused(error, request) from None
        except (OSError, http.client.HTTPException) as error:
            raise self._unreachable(error) from None
        try:
            answer = json.loads(content)
        except ValueError:  # a JSON or a UTF-8 error
            answer = None
        if not isinstance(answer, dict):
            shown = one_line(content[:60].decode(errors="replace"))
            said = f"the server at {self.url} did not answer with a JSON object: {shown!r}"
            raise _FailedAttemptError(said, passing=True)
        return answer

    def _unreachable(self, error: Exception) -> _FailedAttemptError:
        reason = getattr(error, "reason", error)
        if isinstance(reason, TimeoutError):
            return _FailedAttemptError(
                f"the server at {self.url} gave no answer within {self.timeout:g} s: raise timeout, or ask for less at "
                "once with max_concurrency",
                passing=True,
            )
        if isinstance(reason, http.client.HTTPException | ConnectionResetError | BrokenPipeError):
            said = f"the server at {self.url} ended its answer early: {one_line(reason) or type(reason).__name__}"
            return _FailedAttemptError(said, passing=True)
        return _FailedAttemptError(
            f"no server answers at {self.url}: {one_line(reason)}; start one, for instance with vllm serve MODEL, or "
            "correct the url",
            passing=True,
        )

    def _refused(self, error: urllib.error.HTTPError, request: urllib.request.Request) -> _FailedAttemptError:
        # The body explains the status, if it can be read.
        status = error.code
        passing = status in _PASSING or (status >= 500 and status not in _FINAL_FAILURES)
        try:
            detail = _detail(error.read())
        except (OSError, http.client.HTTPException):
            detail = ""
        said = f"{status} {detail or error.reason}"
        if status in (401, 403):
            said += "; put its key into an environment variable and name that in api_key_variable"
        verb = "fails at" if status >= 500 else "refuses"
        return _FailedAttemptError(
            f"the server {verb} {request.get_method()} {request.full_url}: {said}",
            passing=passing,
            status=status,
            pause=_seconds(error.headers.get("Retry-After")),
        )


def _is_stopped(pause: float, stopped: threading.Event | None) -> bool:
    """Waits for ``pause`` seconds, or until ``stopped`` is set; returns whether it is."""
    if stopped is not None:
        return stopped.wait(pause)
    time.sleep(pause)
    return False


def _split(url: str) -> urllib.parse.SplitResult:
    """Splits an address, and refuses one with a user, a password or a query, which must not appear in records."""
    try:
        parts = urllib.parse.urlsplit(url)
        hidden = (
            "@" in parts.netloc or "@" in url.rpartition("://")[2].partition("/")[0] or parts.query or parts.fragment
        )
    except ValueError as error:
        raise ValueError(f"url is not allowed: {error}") from None
    if hidden:
        raise ValueError(
            "the url holds a user, a password or a query, which would be written into records and messages: write the "
            "address alone, put the key into an environment variable, and name that in api_key_variable"
        )
    return parts


def _detail(content: bytes) -> str:
    """The message of a refusal, from one of the usual fields of its body."""
    try:
        found = json.loads(content)
    except ValueError:
        return one_line(content.decode(errors="replace"), 200)
    # Servers nest the message differently.
    for key in ("error", "message", "detail"):
        while isinstance(found, dict) and key in found:
            found = found[key]
    return one_line(found if isinstance(found, str) else json.dumps(found), 300)


def _seconds(text: str | None) -> float:
    """The seconds of a ``Retry-After`` header; 0 for a date, which is not parsed."""
    return float(text) if text and text.strip().isdigit() else 0.0


def in_parallel(
    call: Callable[[T], R], items: Sequence[T], limit: int, stopped: threading.Event | None = None
) -> list[R]:
    """Calls a function on every item, at most ``limit`` at a time, in threads.

    The threads are daemons: neither an error nor Ctrl-C waits for running calls.

    Args:
        call: the function.
        items: one per call.
        limit: calls at once, at least 1.
        stopped: set as soon as a call has raised or the caller has left, to stop the running calls.

    Returns:
        The results, in the order of the items.

    Raises:
        Exception: the first that a call raised; no further call is begun then.

    Example:
        >>> in_parallel(str, [1, 2, 3], limit=2)
        ['1', '2', '3']
    """
    # Daemon threads and a queue instead of a pool, which would wait for slow requests after an error or Ctrl-C.
    waiting = iter(enumerate(items))
    lock = threading.Lock()
    stopped = stopped or threading.Event()
    done: queue.SimpleQueue[tuple[int, R | None, Exception | None]] = queue.SimpleQueue()

    def work() -> None:
        while not stopped.is_set():
            with lock:
                following = next(waiting, None)
            if following is None:
                return
            number, item = following
            try:
                done.put((number, call(item), None))
            except Exception as error:  # raised again by the waiting thread
                stopped.set()
                done.put((number, None, error))

    for _ in range(min(limit, len(items))):
        threading.Thread(target=work, daemon=True).start()
    results: dict[int, Any] = {}
    try:
        while len(results) < len(items):
            number, result, error = done.get()
            if error is not None:
                raise error
            results[number] = result
    finally:
        stopped.set()
    return [results[number] for number in range(len(items))]


def read_api_key(variable: str | None) -> str | None:
    """Reads a key from an environment variable; ``None`` names none.

    Raises:
        ValueError: the variable is not set.
    """
    if variable is None:
        return None
    key = os.environ.get(variable, "").strip()
    if not key:
        raise ValueError(f"api_key_variable={variable!r} is not set: put the key into that environment variable")
    return key
