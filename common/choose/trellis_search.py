"""Which integers stand for the columns of a weight: a search over the paths of a trellis, with the price of bits.

What is minimised for a column with targets x is the sum of weight_r (x'_r - multiple_r)^2 + price * bits, where x'
holds what the errors of earlier rows add to the targets of later ones. Each path carries its own x' along (per-survivor
processing, Raheli et al. 1995); without such feedback by rows the search is exact (Viterbi). A quantizer without a
trellis has one path.
"""

import numpy as np
from numba import njit

from common.formats.trellis import multiple

_FAR = 1e300


@njit(cache=True, nogil=True)
def _candidates(target, weight, odd, trellis, bits, price, largest, costs, codes):
    """For each parity the code of least cost: of the nearest ones, the next toward zero, and zero."""
    reach = bits.shape[0] // 2
    sign, magnitude, spacing = (1, target, 2) if target >= 0 else (-1, -target, 2)
    if not trellis:
        spacing, odd = 1, 0
    costs[0] = costs[1] = _FAR
    below = min(int((magnitude + odd) / spacing), largest)
    for m in range(max(0, below - 1), min(below + 1, largest) + 1):
        value = spacing * m - odd if m else 0
        cost = weight * (magnitude - value) ** 2 + price * bits[reach + sign * min(m, reach)]
        if cost < costs[m & 1]:
            costs[m & 1], codes[m & 1] = cost, sign * m
    if below > 1:
        cost = weight * magnitude**2 + price * bits[reach]
        if cost < costs[0]:
            costs[0], codes[0] = cost, 0


@njit(cache=True, nogil=True)
def _search(targets, weights, spread, next_state, bits, price, largest, codes, values, paths, cost, back):
    """Codes and multiples (rows,) of one column. paths (2, states, rows): room for x'; cost (2, states); back: (rows,
    states, 2), from where and by which code a state was reached. All is written over."""
    rows, states = len(targets), len(next_state)
    trellis, by_rows = states > 1, len(spread) > 0
    costs, found = np.empty(2), np.zeros(2, np.int64)
    cost[0] = _FAR
    cost[0, 0] = 0.0
    if by_rows:
        paths[0, 0, :] = targets
    for r in range(rows):
        old, new = r & 1, 1 - (r & 1)
        cost[new] = _FAR
        for parity in range(2):  # of the states: without feedback all of a quantizer see the same target
            fresh = True
            for s in range(parity, states, 2):
                if cost[old, s] >= _FAR:
                    continue
                if by_rows or fresh:
                    target = np.float64(paths[old, s, r]) if by_rows else targets[r]
                    _candidates(target, weights[r], parity, trellis, bits[parity], price, largest, costs, found)
                    fresh = False
                for odd in range(2):
                    total, to = cost[old, s] + costs[odd], next_state[s, odd]
                    if total < cost[new, to]:
                        cost[new, to] = total
                        back[r, to, 0], back[r, to, 1] = s, found[odd]
        if by_rows and r + 1 < rows:
            for to in range(states):
                if cost[new, to] < _FAR:
                    s = back[r, to, 0]
                    error = np.float32(paths[old, s, r] - multiple(back[r, to, 1], s, trellis))
                    before, after, shares = paths[old, s, r + 1 :], paths[new, to, r + 1 :], spread[r, r + 1 :]
                    for i in range(rows - r - 1):
                        after[i] = before[i] + error * shares[i]
    state = np.argmin(cost[rows & 1])
    for r in range(rows - 1, -1, -1):
        codes[r], state = back[r, state, 1], back[r, state, 0]
        values[r] = multiple(codes[r], state, trellis)


@njit(cache=True, nogil=True)
def search_block(rest, upper, start, end, weights, spread, next_state, bits, price, largest, codes, values, errors):
    """Rounds columns start..end of `rest` (columns, rows), in steps, hands the error of each on to the later ones of
    these, and leaves it in `errors` (end - start, rows) for those behind.

    upper: see `feedback.Factor`; weights (rows,), spread (rows, rows) or (0, 0), float32: see `feedback.RowFactor`;
    bits (2, 2 * reach + 1): of each code and quantizer, the last for all beyond; price: of a bit in units of a column's
    squared error of weight 1; codes, values (columns, rows): written, integers and their multiples of the step.
    """
    rows, states = rest.shape[1], len(next_state)
    paths = np.empty((2, states, rows if len(spread) else 0), np.float32)
    cost, back = np.empty((2, states)), np.zeros((rows, states, 2), np.int64)
    for j in range(start, end):
        own = upper[j, j]
        of_column = price * own * own
        _search(rest[j], weights, spread, next_state, bits, of_column, largest, codes[j], values[j], paths, cost, back)
        for r in range(rows):
            errors[j - start, r] = (rest[j, r] - values[j, r]) / own
        for i in range(j + 1, end):
            share = upper[j, i]
            for r in range(rows):
                rest[i, r] -= share * errors[j - start, r]
