"""Frames of JSON on a descriptor: a bounded length, then as many bytes."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Mapping
from typing import Any, Final

MAX_FRAME: Final = 16 * 2**20
_LENGTH: Final = struct.Struct(">I")


class ProtocolError(Exception):
    """The received bytes are not a valid frame or value."""


def send(channel: int, frame: Mapping[str, Any]) -> None:
    """Sends a frame.

    Raises:
        ProtocolError: it is too long.
    """
    content = json.dumps(frame, separators=(",", ":")).encode()
    if len(content) > MAX_FRAME:
        raise ProtocolError(f"{len(content)} bytes are more than {MAX_FRAME}")
    rest = memoryview(_LENGTH.pack(len(content)) + content)
    while rest:
        rest = rest[os.write(channel, rest) :]


def receive(channel: int) -> dict[str, Any]:
    """Receives a frame.

    Raises:
        EOFError: the other end is closed.
        ProtocolError: it is too long, or not a JSON object.
    """
    (length,) = _LENGTH.unpack(_read(channel, _LENGTH.size))
    if length > MAX_FRAME:
        raise ProtocolError(f"{length} bytes are more than {MAX_FRAME}")
    try:
        frame = json.loads(_read(channel, length))
    except (ValueError, RecursionError) as error:
        raise ProtocolError(f"no JSON: {error}") from None
    if not isinstance(frame, dict):
        raise ProtocolError("no JSON object")
    return frame


def _read(channel: int, length: int) -> bytes:
    parts = bytearray()
    while len(parts) < length:
        part = os.read(channel, min(length - len(parts), 2**20))
        if not part:
            raise EOFError("the other end is closed")
        parts += part
    return bytes(parts)
