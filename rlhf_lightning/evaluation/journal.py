"""Answers of a task that is being evaluated, chunk by chunk, so that what was answered outlives an interruption."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

from ..utils.files import json_line
from .samples import PromptResult

# The results of a chunk, and its seconds of sampling per sampled token.
Chunk = tuple[list[PromptResult], float | None]


class Journal:
    """Keeps chunks in a file, a line for each.

    Args:
        file: is made with the first chunk; chunks that it holds are not computed again.
    """

    def __init__(self, file: Path) -> None:
        self.file = file
        self._chunks: list[Chunk] = []
        lines = file.read_bytes().splitlines(keepends=True) if file.is_file() else []
        whole = [line for line in lines if line.endswith(b"\n")]
        # A crash may leave a part of a line.
        if len(whole) < len(lines):
            file.write_bytes(b"".join(whole))
        for line in whole:
            kept = json.loads(line)
            self._chunks.append((list(map(PromptResult.read, kept["prompts"])), kept["seconds"]))

    def chunk(self, number: int, compute: Callable[[], Chunk]) -> Chunk:
        """Returns a chunk that was kept, or computes and keeps it; the chunks are asked for in turn."""
        if number >= len(self._chunks):
            prompts, seconds = compute()
            self.file.parent.mkdir(parents=True, exist_ok=True)
            with self.file.open("a", encoding="utf-8") as file:
                file.write(json_line({"prompts": list(map(asdict, prompts)), "seconds": seconds}))
            self._chunks.append((prompts, seconds))
        return self._chunks[number]

    def remove(self) -> None:
        """Removes the file: the whole result is kept elsewhere."""
        self.file.unlink(missing_ok=True)
