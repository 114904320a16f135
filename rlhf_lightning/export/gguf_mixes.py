"""K-quants: which type each tensor of such a file has, and llama.cpp's own quantiser, called in its library.

A K-quant rounds blocks of 256 values of a row together, with scales that are quantised themselves. A file mixes types:
tensors that cost most accuracy have more bits, as llama.cpp's program distributes them.
"""

from __future__ import annotations

import ctypes
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]

# The type of most tensors by the type of the file, and that of values and of outputs of the MLP in chosen layers.
MIXES: Final = {
    "q4_k_s": ("q4_k", "q5_k"),
    "q4_k_m": ("q4_k", "q6_k"),
    "q5_k_s": ("q5_k", "q5_k"),
    "q5_k_m": ("q5_k", "q6_k"),
    "q6_k": ("q6_k", "q6_k"),
}
# Values that are rounded together, and the types of rows that they do not divide, in blocks of 32.
BLOCK: Final = 256
NARROW: Final = {"q4_k": "q5_0", "q5_k": "q5_1", "q6_k": "q8_0"}
# Where packages keep the library.
_LIBRARIES: Final = (("llama_cpp", "lib/*ggml-base*"), ("xllamacpp", "xllamacpp*"))
_SUFFIXES: Final = {".so", ".dylib", ".dll", ".pyd"}


def mixed_type(name: str, type: str, *, layers: int, tied: bool) -> str:
    """Returns the type of a matrix in a file of K-quants, if its rows are long enough.

    Args:
        name: in the file.
        type: of the file.
        layers: of the model.
        tied: whether the embedding is the output as well.

    Example:
        >>> [mixed_type(f"blk.{n}.attn_v.weight", "q4_k_m", layers=4, tied=False) for n in range(4)]
        ['q4_k', 'q4_k', 'q6_k', 'q6_k']
    """
    most, more = MIXES[type]
    if name == ("token_embd.weight" if tied else "output.weight"):
        return "q6_k"
    parts = name.split(".")
    if parts[0] != "blk":
        return most
    layer, part = int(parts[1]), parts[2]
    if part == "attn_qkv":
        return {"q4_k_m": "q5_k", "q5_k_m": "q6_k"}.get(type, most)
    if part not in ("attn_v", "ffn_down"):
        return most
    eighth = layers // 8
    if type.endswith("_s"):
        return more if layer < (4 if part == "attn_v" else eighth) else most
    chosen = layer < eighth or layer >= 7 * layers // 8 or (layer - eighth) % 3 == 2
    return more if chosen else most


@cache
def quantiser() -> Any:
    """Finds llama.cpp's function that quantises rows, in the library of an installed package.

    Raises:
        ValueError: no installed package has such a library.
    """
    for package, pattern in _LIBRARIES:
        spec = find_spec(package)
        for place in (spec.submodule_search_locations or ()) if spec else ():
            for file in sorted(Path(place).glob(pattern)):
                function = _function(file) if file.suffix in _SUFFIXES else None
                if function is not None:
                    return function
    raise ValueError(
        "K-quants need llama.cpp's quantiser: pip install 'rlhf-lightning[llama-cpp]' (or pip install xllamacpp, or "
        "llama-cpp-python); or choose q8_0 or q4_0"
    )


def _function(file: Path) -> Any:
    """Declares the function of one library; ``None`` where it has none."""
    try:
        function: Any = ctypes.CDLL(str(file)).ggml_quantize_chunk
    except (OSError, AttributeError):
        return None
    # Type, values, place for blocks, first value, rows, values per row, importance of the values (none here).
    number, pointer = ctypes.c_int64, ctypes.c_void_p
    function.argtypes = [ctypes.c_int, pointer, pointer, number, number, number, pointer]
    function.restype = ctypes.c_size_t
    return function


def quantise(rows_RC: Array, number: int, row_bytes: int) -> Array:
    """Quantises a matrix with llama.cpp.

    Args:
        rows_RC: fp32 values; blocks of the type divide their rows.
        number: of the type in the format.
        row_bytes: of a quantised row.

    Returns:
        The bytes, ``(R, row_bytes)``.
    """
    rows_RC = np.ascontiguousarray(rows_RC, dtype=np.float32)
    found = np.zeros((len(rows_RC), row_bytes), dtype=np.uint8)
    size = quantiser()(number, rows_RC.ctypes.data, found.ctypes.data, 0, *rows_RC.shape, None)
    assert size == found.size
    return found
