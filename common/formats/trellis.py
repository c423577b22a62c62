"""Trellis-coded quantization, the decoder's side: which multiples of a step the integers of a column stand for.

Two quantizers take turns, one of the even multiples of the step, one of zero and the odd ones. The parity of each
integer moves the trellis to the state that says which comes next (Marcellin & Fischer 1990; "dependent quantization" in
VVC, Schwarz et al. 2019, and in NNC, Haase et al. 2020). So the multiples lie twice as densely as the integers that are
stored can say, and a search over all paths finds good ones (`common.choose.trellis_search`).
"""

import numpy as np
from numba import njit

# Parity checks of the code of 8 states (Ungerboeck 1982, "Channel coding with multilevel/phase signals", table I), in
# octal 13 and 04.
_CHECKS, _STATES = (0b1011, 0b0100), 8
NO_TRELLIS = np.zeros((1, 2), np.int32)  # one state: integers are multiples themselves


def _next_states() -> np.ndarray:
    """(8, 2): the state that follows each, for even and for odd integers. Those of odd number take odd multiples."""
    own, free = (check >> 1 for check in _CHECKS)
    return np.array(
        [[state >> 1 ^ (own if state & 1 else 0) ^ (free if odd else 0) for odd in (0, 1)] for state in range(_STATES)],
        np.int32,
    )


TRELLIS = _next_states()


@njit(cache=True, nogil=True)
def multiple(code, state, trellis):
    """The multiple of the step that an integer stands for in a state; trellis: False for NO_TRELLIS."""
    if not trellis:
        return code
    odd = state & 1
    return 2 * code - odd if code > 0 else (2 * code + odd if code < 0 else 0)


@njit(cache=True, nogil=True)
def multiples(codes, next_state):
    """int32 (columns, rows): those of codes (columns, rows). Each column begins in state 0."""
    result, trellis = np.empty(codes.shape, np.int32), next_state.shape[0] > 1
    for j in range(codes.shape[0]):
        state = 0
        for r in range(codes.shape[1]):
            code = codes[j, r]
            result[j, r] = multiple(code, state, trellis)
            state = next_state[state, code & 1]
    return result


def columns_of(array: np.ndarray, axis: int) -> np.ndarray:
    """An array of any shape as (columns, rows), C-contiguous: its rows are the entries along `axis`."""
    moved = np.moveaxis(array, axis, -1)
    return np.ascontiguousarray(moved.reshape(-1, moved.shape[-1]))


def of_columns(columns: np.ndarray, shape: tuple[int, ...], axis: int) -> np.ndarray:
    """The array of `shape` that `columns_of` made `columns` of."""
    rest = [length for i, length in enumerate(shape) if i != axis]
    return np.ascontiguousarray(np.moveaxis(columns.reshape(*rest, shape[axis]), -1, axis))
