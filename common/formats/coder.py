"""An adaptive arithmetic coder of matrices of integers: no tables are stored, for it learns the statistics as it goes.

A binary range coder with carry (that of LZMA, by Igor Pavlov) takes binary decisions: is the code zero, which sign has
it, is its magnitude more than 1, more than 2 and so on up to `DIRECT`, and the rest in Elias's gamma code. Each has a
probability, the mean of a fast and a slow running mean of earlier decisions in the same context (as in VVC, ITU-T
H.266, 9.3.4.3). The context is how large codes have been in this row and this column, and the quantizer that the
trellis is at (`common.formats.trellis`). All arithmetic is of integers: every machine reads what another wrote.
"""

import numpy as np
from numba import njit

DIRECT = 14  # magnitudes up to it are counted one by one
REMEMBERED = 10  # decisions that what was learned of the matrix before counts for
CLASSES = 40  # of the magnitude to be expected, four for each octave
QUANTIZERS = 3  # the two of the trellis, and the one of matrices without
FAST, SLOW = 60, 1000  # decisions that the running means look back at, at most
LARGEST_CODE = 2**24 - 1  # of the integers that float32 holds exactly
MOST_BYTES = 96  # that one code can take: 16 + 2 * 24 decisions of 11 bits at most
LARGEST_MEAN = 1023  # magnitudes count up to it where they say what is to be expected
PRIOR = 6  # codes that the expectation at the start of a row or a column counts for
ROW_MEMORY, COLUMN_MEMORY, ALL_MEMORY = 60, 60, 500  # codes that running means of magnitudes look back at, at most

_DECISIONS = DIRECT + 2  # zero, sign, and more than 1, 2, ... DIRECT
_GAMMA = 64  # contexts of the lengths in gamma code
_SIZE = QUANTIZERS * CLASSES * _DECISIONS + _GAMMA
_RATES = (2 * 65536 // (2 * np.arange(1024) + 3)).astype(np.int64)  # 1 / (n + 1.5), in units of 2^-16
_LOW, _RANGE, _CACHE, _PENDING, _PLACE = range(5)  # of a coder's state; when reading, _LOW is the code
_COMPILE = {"cache": True, "nogil": True}


@njit(**_COMPILE)
def _learn(contexts, i, bit):
    seen = contexts[i, 2]
    target = bit << 16
    contexts[i, 0] += ((target - contexts[i, 0]) * _RATES[min(seen, FAST)]) >> 16
    contexts[i, 1] += ((target - contexts[i, 1]) * _RATES[min(seen, SLOW)]) >> 16
    contexts[i, 2] = min(seen + 1, SLOW)


@njit(**_COMPILE)
def _probability(contexts, i):
    """Of a 1, in units of 2^-15, from 16 up, and so of a 0."""
    return min(max((contexts[i, 0] + contexts[i, 1]) >> 2, 16), (1 << 15) - 16)


@njit(**_COMPILE)
def _shift_out(state, out):
    low = state[_LOW]
    if low < 0xFF000000 or low > 0xFFFFFFFF:
        carry, byte = low >> 32, state[_CACHE]
        while state[_PENDING]:
            out[state[_PLACE]] = (byte + carry) & 255
            state[_PLACE] += 1
            state[_PENDING] -= 1
            byte = 255
        state[_CACHE] = (low >> 24) & 255
    state[_PENDING] += 1
    state[_LOW] = (low & 0x00FFFFFF) << 8


@njit(**_COMPILE)
def _write(state, out, share, bit):
    """A bit that is 1 with probability share / 2^15."""
    bound = (state[_RANGE] >> 15) * share
    if bit:
        state[_RANGE] = bound
    else:
        state[_LOW] += bound
        state[_RANGE] -= bound
    while state[_RANGE] < 1 << 24:
        state[_RANGE] <<= 8
        _shift_out(state, out)


@njit(**_COMPILE)
def _read(state, data, share):
    bound = (state[_RANGE] >> 15) * share
    if state[_LOW] < bound:
        state[_RANGE] = bound
        bit = 1
    else:
        state[_LOW] -= bound
        state[_RANGE] -= bound
        bit = 0
    while state[_RANGE] < 1 << 24:
        state[_RANGE] <<= 8
        place = state[_PLACE]
        byte = np.int64(data[place]) if place < data.size else 0
        state[_LOW] = (state[_LOW] << 8) | byte
        state[_PLACE] += 1
    return bit


@njit(**_COMPILE)
def _write_learned(state, out, contexts, i, bit):
    _write(state, out, _probability(contexts, i), bit)
    _learn(contexts, i, bit)


@njit(**_COMPILE)
def _read_learned(state, data, contexts, i):
    bit = _read(state, data, _probability(contexts, i))
    _learn(contexts, i, bit)
    return bit


@njit(**_COMPILE)
def _write_code(state, out, contexts, base, code):
    magnitude = abs(code)
    _write_learned(state, out, contexts, base, 1 if magnitude else 0)
    if magnitude == 0:
        return
    _write_learned(state, out, contexts, base + 1, 1 if code < 0 else 0)
    for step in range(1, DIRECT + 1):
        more = 1 if magnitude > step else 0
        _write_learned(state, out, contexts, base + 1 + step, more)
        if not more:
            return
    rest, length = magnitude - DIRECT, 0  # 1 or more
    while rest >> (length + 1):
        length += 1
    for place in range(length):
        _write_learned(state, out, contexts, _SIZE - _GAMMA + place, 1)
    _write_learned(state, out, contexts, _SIZE - _GAMMA + length, 0)
    for place in range(length - 1, -1, -1):
        _write(state, out, 1 << 14, (rest >> place) & 1)


@njit(**_COMPILE)
def _read_code(state, data, contexts, base):
    """The code; one beyond all that are written where the data are no codes."""
    if not _read_learned(state, data, contexts, base):
        return 0
    sign = -1 if _read_learned(state, data, contexts, base + 1) else 1
    for step in range(1, DIRECT + 1):
        if not _read_learned(state, data, contexts, base + 1 + step):
            return sign * step
    length = 0
    while length < 30 and _read_learned(state, data, contexts, _SIZE - _GAMMA + length):
        length += 1
    rest = 1
    for _ in range(length):
        rest = 2 * rest + _read(state, data, 1 << 14)
    return sign * (DIRECT + rest)


@njit(**_COMPILE)
def _class_of(expected):
    """0 to CLASSES - 1, by the logarithm of a magnitude in units of 1 / 256."""
    value, octave = expected + 16, 4
    while value >> (octave + 1):
        octave += 1
    return min(4 * (octave - 4) + ((value >> (octave - 2)) & 3), CLASSES - 1)


@njit(**_COMPILE)
def _code_matrix(state, data, contexts, codes, next_state, writing):
    """Writes or reads codes (columns, rows), column by column; the trellis starts anew in each."""
    columns, rows = codes.shape
    of_row = np.zeros(rows, np.int64)
    of_all, before, seen = np.int64(256), np.int64(256), 0
    trellis = next_state.shape[0] > 1
    for j in range(columns):
        of_column, at = (of_all + before) >> 1, 0
        for r in range(rows):
            if j == 0:
                of_row[r] = of_all
            expected = of_row[r] * of_column // max(of_all, 1)
            quantizer = at & 1 if trellis else 2
            base = (quantizer * CLASSES + _class_of(expected)) * _DECISIONS
            if writing:
                code = np.int64(codes[j, r])
                _write_code(state, data, contexts, base, code)
            else:
                code = _read_code(state, data, contexts, base)
                codes[j, r] = code
            magnitude = min(abs(code), LARGEST_MEAN) << 8
            of_row[r] += ((magnitude - of_row[r]) * _RATES[min(j + PRIOR, ROW_MEMORY)]) >> 16
            of_column += ((magnitude - of_column) * _RATES[min(r + PRIOR, COLUMN_MEMORY)]) >> 16
            of_all += ((magnitude - of_all) * _RATES[min(seen, ALL_MEMORY)]) >> 16
            seen += 1
            if trellis:
                at = next_state[at, code & 1]
        before = of_column
        if not writing and state[_PLACE] > data.size:
            return


def _new_contexts() -> np.ndarray:
    """(contexts, 3): two probabilities of a 1, in units of 2^-16, and how many decisions they saw."""
    contexts = np.full((_SIZE, 3), 1 << 15)
    contexts[:, 2] = 0
    return contexts


def write(matrices: list[tuple[np.ndarray, np.ndarray]]) -> bytes:
    """The codes (columns, rows), int32, of all matrices, each with the table of its trellis."""
    state, contexts, parts = np.array([0, 0xFFFFFFFF, 0, 1, 0]), _new_contexts(), []
    for codes, next_state in matrices:
        out = np.empty(MOST_BYTES * codes.size + int(state[_PENDING]) + 64, np.uint8)  # more than are ever touched
        state[_PLACE] = 0
        np.minimum(contexts[:, 2], REMEMBERED, out=contexts[:, 2])
        _code_matrix(state, out, contexts, codes, next_state, True)
        parts.append(out[: state[_PLACE]].tobytes())
    out, state[_PLACE] = np.empty(int(state[_PENDING]) + 64, np.uint8), 0
    for _ in range(5):
        _shift_out(state, out)
    return b"".join([*parts, out[: state[_PLACE]].tobytes()])[1:]  # the first byte is always 0


class Reader:
    """Reads what `write` wrote, matrix by matrix; few bytes may stand for many codes, up to 12,000 for each."""

    def __init__(self, data: np.ndarray):
        """data (bytes,): uint8."""
        self._data, self._contexts = data.copy(), _new_contexts()
        first = int.from_bytes(data[:4].tobytes().ljust(4, b"\0"), "big")
        self._state = np.array([first, 0xFFFFFFFF, 0, 0, 4])

    def matrix(self, shape: tuple[int, int], next_state: np.ndarray) -> np.ndarray:
        """Codes, int32, of this shape (columns, rows) and trellis. Raises ValueError where the data end before it, or
        hold a code beyond LARGEST_CODE."""
        codes = np.zeros(shape, np.int32)
        np.minimum(self._contexts[:, 2], REMEMBERED, out=self._contexts[:, 2])
        _code_matrix(self._state, self._data, self._contexts, codes, next_state, False)
        if self._state[_PLACE] > len(self._data):
            raise ValueError("the codes end before the weights do")
        if codes.size and max(codes.max(), -int(codes.min())) > LARGEST_CODE:
            raise ValueError(f"a code is larger than {LARGEST_CODE}")
        return codes

    def finish(self) -> None:
        """Raises ValueError where there is more to read."""
        if self._state[_PLACE] != len(self._data):
            raise ValueError("the codes go on after the weights")
