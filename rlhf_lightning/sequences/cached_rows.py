"""The geometry of new tokens in rows that have a cache.

Every row begins at column 0 of its keys and values, so that a token's column is its position. Rows have lengths of
their own; what lies after a row's end is left over from others and not read.

Legend: N rows, Q new tokens, C columns of keys.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


class CachedRows:
    """Tells attention which keys each new token sees; travels through a model's forward as ``cached_rows``.

    Args:
        columns_NQ: the column of each new token: it sees the keys up to this one.
        num_columns: columns of the keys that attention is given.
        all_seen: whether there is one new token per row, in the last of these columns.

    Example:
        >>> rows = CachedRows(torch.tensor([[2], [0]]), num_columns=3)
        >>> rows.mask(None, torch.float32)[:, 0, 0].tolist()
        [[0.0, 0.0, 0.0], [0.0, -inf, -inf]]
        >>> rows.mask(2, torch.float32)[0, 0, 0].tolist()
        [-inf, 0.0, 0.0]
    """

    def __init__(self, columns_NQ: Tensor, num_columns: int, *, all_seen: bool = False) -> None:
        self._columns_NQ = columns_NQ
        self._num_columns = num_columns
        self._all_seen = all_seen
        self._masks: dict[tuple[int | None, torch.dtype], Tensor] = {}

    def mask(self, window: int | None, dtype: torch.dtype) -> Tensor | None:
        """The bias added to the scores, ``(N, 1, Q, C)``: made once for all layers; ``None`` where every key is seen.

        Args:
            window: a token sees keys less than this many positions before it.
            dtype: of the scores.
        """
        if self._all_seen and (window is None or window >= self._num_columns):
            return None
        if (window, dtype) not in self._masks:
            keys = torch.arange(self._num_columns, device=self._columns_NQ.device)
            distance_NQC = self._columns_NQ[..., None] - keys
            hidden_NQC = distance_NQC < 0
            if window is not None:
                hidden_NQC = hidden_NQC | (distance_NQC >= window)
            mask_NQC = torch.zeros(hidden_NQC.shape, dtype=dtype, device=keys.device)
            self._masks[window, dtype] = mask_NQC.masked_fill_(hidden_NQC, -math.inf)[:, None]
        return self._masks[window, dtype]
