"""The front of a module, if it has one: made where the option is given, and compared with that of a checkpoint."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .compressor_front import CompressorFront

_KEY = "front"


def front_of(module: Any, folder: str | None) -> CompressorFront | None:
    """Makes the front of a module, if it has a compressor.

    Raises:
        ValueError: the method does not learn from rows after compressed contexts.
    """
    if folder is None:
        return None
    if not module.takes_compressor:
        raise ValueError(
            f"compressor is {str(folder)!r}, and {type(module).__name__} does not learn from compressed contexts: "
            "leave it out"
        )
    # Imported here, since most runs have no compressor: a method's own imports leave all that belongs to one out.
    from .compressor_front import CompressorFront

    return CompressorFront(module, folder)


def save_front(front: CompressorFront | None, checkpoint: dict[str, Any]) -> None:
    """Adds a fingerprint of the compressor, which is no part of a checkpoint."""
    if front is not None:
        checkpoint[_KEY] = front.fingerprint()


def check_front(front: CompressorFront | None, checkpoint: dict[str, Any]) -> None:
    """Checks that a run continues with the compressor that it began with.

    Raises:
        ValueError: the compressor is another, or only one of the two runs has one.
    """
    then, now = checkpoint.get(_KEY), None if front is None else front.fingerprint()
    if then == now:
        return
    if now is None:
        raise ValueError("the checkpoint is of a policy with a compressor: set compressor to its folder")
    assert front is not None
    if then is None:
        raise ValueError(
            f"the checkpoint is of a policy without compressor: leave {str(front.folder)!r} out, or start a new run"
        )
    raise ValueError(
        f"the compressor in {str(front.folder)!r} is not the one of the checkpoint: restore it, or start a new run"
    )
