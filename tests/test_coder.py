"""The adaptive coder: what is read is what was written, in about the bytes that the entropy says."""

import hashlib

import numpy as np
import pytest

from common.formats import coder
from common.formats.coder import LARGEST_CODE
from common.formats.trellis import NO_TRELLIS, TRELLIS


def gaussian(columns, rows, scale, seed=0):
    return np.rint(np.random.default_rng(seed).normal(size=(columns, rows)) * scale).astype(np.int32)


def read(data, matrices):
    reader = coder.Reader(np.frombuffer(data, np.uint8))
    found = [reader.matrix(codes.shape, trellis) for codes, trellis in matrices]
    reader.finish()
    return found


def test_codes_of_every_size_are_read_back():
    edges = [
        0,
        1,
        13,
        14,
        15,
        16,
        17,
        *(2**k + d for k in range(5, 24) for d in (-1, 0, 1) if 2**k + d <= LARGEST_CODE),
    ]
    edges = np.array([edges + [-e for e in edges]], np.int32)
    edges[0, -1] = LARGEST_CODE
    matrices = [(gaussian(50, 30, s), t) for s in (0.02, 0.7, 5, 3000) for t in (NO_TRELLIS, TRELLIS)]
    matrices += [(edges, NO_TRELLIS), (np.ascontiguousarray(edges.T), TRELLIS), (np.zeros((3, 0), np.int32), TRELLIS)]
    for found, (codes, _) in zip(read(coder.write(matrices), matrices), matrices, strict=True):
        assert np.array_equal(found, codes)


@pytest.mark.parametrize("scale", [0.3, 1.0, 4.0])
def test_size_is_close_to_the_entropy(scale):
    codes = gaussian(800, 128, scale)
    counts = np.unique(codes, return_counts=True)[1]
    ideal = -(counts * np.log2(counts / counts.sum())).sum() / 8
    assert ideal < len(coder.write([(codes, NO_TRELLIS)])) < 1.012 * ideal


def test_rows_of_unlike_size_take_fewer_bytes_than_one_table_could_give():
    scales = np.exp(np.random.default_rng(1).normal(size=128))
    codes = np.rint(np.random.default_rng(0).normal(size=(400, 128)) * scales).astype(np.int32)
    counts = np.unique(codes, return_counts=True)[1]
    ideal = -(counts * np.log2(counts / counts.sum())).sum() / 8
    assert len(coder.write([(codes, NO_TRELLIS)])) < 0.94 * ideal


def test_carries_pass_through_bytes_of_255():
    """Decisions that the coder thinks improbable, in long runs, move the low end of the range by all it can."""
    codes = np.zeros((1, 40_000), np.int32)
    codes[0, ::97] = 1
    codes[0, 20_000:] = np.random.default_rng(0).integers(-1, 2, 20_000)
    assert np.array_equal(read(coder.write([(codes, NO_TRELLIS)]), [(codes, NO_TRELLIS)])[0], codes)


def test_too_few_and_too_many_bytes_are_refused():
    matrices = [(gaussian(60, 40, 2), TRELLIS)]
    data = coder.write(matrices)
    for wrong, message in ((data[:-1], "end before"), (data[:3], "end before"), (b"", "end"), (data + b"\0", "go on")):
        with pytest.raises(ValueError, match=message):
            read(wrong, matrices)


def test_any_bytes_at_all_are_read_or_refused():
    random = np.random.default_rng(0)
    for length in (0, 1, 5, 100, 4000):
        for _ in range(20):
            try:
                read(random.bytes(length), [(np.zeros((40, 30), np.int32), TRELLIS)])
            except ValueError as error:
                assert "codes" in str(error) or "a code is larger" in str(error)


def test_bytes_are_those_of_every_machine():
    """Integers alone decide, so a file of today is read for ever; a change of these bytes needs a new version."""
    data = coder.write([(gaussian(30, 20, 1.5), TRELLIS), (gaussian(1, 50, 200), NO_TRELLIS)])
    assert hashlib.sha256(data).hexdigest()[:16] == "d2eddfb310b5f6fd"
