"""Random numbers addressed by (seed, tensor, row): the same at every layout and on every number of ranks.

Owns: counter-based normal variates (Philox, Salmon et al. 2011, as in NumPy).
Does not own: which tensors are random and with what deviation (``model.init``, ``growth``).
"""

from __future__ import annotations

import hashlib

import numpy as np

_ROW_WORD = 2  # word of the 256-bit counter that holds the row; a row uses the two words below it


def normal_rows(seed: int, name: str, rows: range, row_numel: int) -> np.ndarray:
    """Standard normal variates of some rows of a tensor.

    Every row has a stream of its own, keyed by ``seed``, ``name`` and its global index, so any split of the rows over
    ranks gives the same bits.

    Returns: float32 ``[len(rows), row_numel]``.
    """
    digest = hashlib.blake2b(f"{seed}:{name}".encode(), digest_size=16).digest()
    bits = np.random.Philox(key=np.frombuffer(digest, dtype=np.uint64))
    state = bits.state
    generator = np.random.Generator(bits)
    out = np.empty((len(rows), row_numel), dtype=np.float32)
    for position, row in enumerate(rows):
        state["state"]["counter"][:] = 0
        state["state"]["counter"][_ROW_WORD] = row
        bits.state = state  # restarts the stream: buffer position and cached halves come from the fresh state
        generator.standard_normal(dtype=np.float32, out=out[position])
    return out
