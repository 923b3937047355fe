"""The compiled sweep over rows: find runs, join regions, link the corners of their outlines.

Tables are plain arrays, since numba compiles no objects. Numbers that are passed on are np.int64
from the start: numba takes a literal 0 for a type of its own, and compiles all it reaches again.

- A run is a stretch of one label in a row, a row of (start, label, region); its end is the next
  one's start. Columns are counted from a pixel of background before the first, so that lattice
  point x lies between columns x and x + 1. The last run of a row is background beyond the end.
- A node is a corner of a region: (x, y, next node of its ring, region, flag), see `MEETS`.
- A region is (parent in the union-find, label, pixels, sum of probability, last row).
"""

import numba
import numpy as np
import numpy.typing as npt

from wsiseg.classes import IGNORE

UInt8 = npt.NDArray[np.uint8]
Int32 = npt.NDArray[np.int32]
Int64 = npt.NDArray[np.int64]

START, LABEL, REGION = 0, 1, 2
"""Columns of a run."""

X, Y, NEXT, OWNER, FLAG = 0, 1, 2, 3, 4
"""Columns of a node."""

PARENT, CLASS, PIXELS, TOTAL, LAST_ROW = 0, 1, 2, 3, 4
"""Columns of a region."""

MEETS = 1
"""Flag of a node at which another corner of the same label lies: a ring may meet itself there."""

NODES, REGIONS, RUNS = 0, 1, 2
"""Places in the array of counts: nodes, regions, runs of the row above."""


@numba.njit(cache=True)
def find_root(regions: Int64, i: int) -> int:
    """Return the root of a region, halving the path to it."""
    while regions[i, PARENT] != i:
        regions[i, PARENT] = regions[regions[i, PARENT], PARENT]
        i = regions[i, PARENT]
    return int(i)


@numba.njit(cache=True)
def _join(regions: Int64, i: int, j: int) -> int:
    """Make two regions one and return it; the older index stays."""
    i, j = find_root(regions, i), find_root(regions, j)
    if i == j:
        return int(i)
    if j < i:
        i, j = j, i
    regions[j, PARENT] = i
    regions[i, PIXELS] += regions[j, PIXELS]
    regions[i, TOTAL] += regions[j, TOTAL]
    regions[i, LAST_ROW] = max(regions[i, LAST_ROW], regions[j, LAST_ROW])
    return int(i)


@numba.njit(cache=True, nogil=True)
def sweep_rows(
    labels: UInt8,
    probability: UInt8,
    first_row: int,
    first_y: int,
    with_junctions: bool,
    above: Int32,
    falling: Int32,
    rising: Int32,
    counts: Int64,
    nodes: Int32,
    regions: Int64,
) -> int:
    """Sweep rows until all are done or the tables might not hold another; return the next row.

    `probability` may have no rows, if there is none. `with_junctions` also puts a node where the
    straight edge of a region passes a point at which two others part.
    """
    width = labels.shape[1]
    below = np.empty_like(above)
    has_probability = probability.shape[0] > 0
    for row in range(first_row, labels.shape[0]):
        room_needed = 4 * (width + 2)
        if counts[NODES] + room_needed > nodes.shape[0]:
            return row
        if counts[REGIONS] + width + 2 > regions.shape[0]:
            return row
        num_runs = _find_runs(labels[row], below)
        y = first_y + row
        _join_runs(y, above, counts[RUNS], below, num_runs, counts, regions)
        if has_probability:
            _add_probability(probability[row], below, num_runs, regions)
        _link_line(
            y, with_junctions, above, counts[RUNS], below, num_runs, falling, rising, counts, nodes
        )
        for k in range(num_runs):  # assigning slices takes numba seconds to compile
            for column in range(3):
                above[k, column] = below[k, column]
        counts[RUNS] = num_runs
    return int(labels.shape[0])


@numba.njit(cache=True)
def _find_runs(row: UInt8, runs: Int32) -> int:
    """Write the runs of a row, background on either side included; return how many there are."""
    width = row.shape[0]
    runs[0, START], runs[0, LABEL] = 0, 0
    n = 1
    current = 0
    x = 0
    while x < width:
        value = row[x]
        label = 0 if value == IGNORE else value
        if label != current:
            runs[n, START], runs[n, LABEL] = x + 1, label
            n += 1
            current = label
        x += 1
        while x < width and row[x] == value:
            x += 1
    if current != 0:
        runs[n, START], runs[n, LABEL] = width + 1, 0
        n += 1
    return n


@numba.njit(cache=True)
def _join_runs(
    y: int,
    above: Int32,
    num_above: int,
    below: Int32,
    num_below: int,
    counts: Int64,
    regions: Int64,
) -> None:
    """Give each run of the lower row the region of what it touches above, or a new one."""
    i = 0
    for k in range(num_below):
        label = below[k, LABEL]
        if label == 0:
            below[k, REGION] = -1
            continue
        first, end = below[k, START], below[k + 1, START]
        while i + 1 < num_above and above[i + 1, START] <= first:
            i += 1
        region = np.int64(-1)
        j = i
        while j < num_above and above[j, START] < end:
            if above[j, LABEL] == label:
                if region < 0:
                    region = find_root(regions, np.int64(above[j, REGION]))
                else:
                    region = _join(regions, region, np.int64(above[j, REGION]))
            j += 1
        if region < 0:
            region = counts[REGIONS]
            counts[REGIONS] += 1
            regions[region, PARENT], regions[region, CLASS] = region, label
            regions[region, PIXELS], regions[region, TOTAL] = 0, 0
        regions[region, PIXELS] += end - first
        regions[region, LAST_ROW] = y
        below[k, REGION] = region


@numba.njit(cache=True)
def _add_probability(row: UInt8, runs: Int32, num_runs: int, regions: Int64) -> None:
    for k in range(num_runs):
        if runs[k, LABEL] == 0:
            continue
        total = np.int64(0)
        for x in range(runs[k, START] - 1, runs[k + 1, START] - 1):
            total += row[x]
        regions[find_root(regions, np.int64(runs[k, REGION])), TOTAL] += total


@numba.njit(cache=True)
def _add_node(nodes: Int32, counts: Int64, x: int, y: int, region: int, flag: int) -> int:
    n = counts[NODES]
    counts[NODES] += 1
    nodes[n, X], nodes[n, Y], nodes[n, NEXT], nodes[n, OWNER] = x, y, -1, region
    nodes[n, FLAG] = flag
    return int(n)


@numba.njit(cache=True)
def _link_line(
    y: int,
    with_junctions: bool,
    above: Int32,
    num_above: int,
    below: Int32,
    num_below: int,
    falling: Int32,
    rising: Int32,
    counts: Int64,
    nodes: Int32,
) -> None:
    """Find the corners on the lattice line above row `y` and link them.

    Around a lattice point lie the pixels a (upper left), b (upper right), c and d (below). Upper
    edges of regions run to the right: `top` is the node where the open one began. Lower edges run
    to the left: `bottom` is the node where the open one will end. At each point what arrives is
    linked before what departs is stored. `falling[x]` is the upper node of an open right edge,
    which runs down, `rising[x]` that of a left edge, which runs up.
    """
    plain = np.int64(0)
    top, bottom = -1, -1
    i, j = 0, 0
    while i + 1 < num_above or j + 1 < num_below:
        x_above = above[i + 1, START] if i + 1 < num_above else np.int32(2**31 - 1)
        x_below = below[j + 1, START] if j + 1 < num_below else np.int32(2**31 - 1)
        x = min(x_above, x_below) - 1
        a, region_a = above[i, LABEL], above[i, REGION]
        c, region_c = below[j, LABEL], below[j, REGION]
        i += x_above == x + 1
        j += x_below == x + 1
        b, region_b = above[i, LABEL], above[i, REGION]
        d, region_d = below[j, LABEL], below[j, REGION]
        if a == c and b == d:
            continue  # a straight edge
        flag = MEETS if (a == d and a != 0) or (b == c and b != 0) else 0
        if a != 0 and a != b and a != c:
            n = _add_node(nodes, counts, x, y, region_a, flag)
            nodes[falling[x], NEXT] = n
            nodes[n, NEXT] = bottom
        if c != 0 and c != a and c != d:
            n = _add_node(nodes, counts, x, y, region_c, flag)
            nodes[top, NEXT] = n
            falling[x] = n
        if b != 0 and b == c and c == d and a != b:
            n = _add_node(nodes, counts, x, y, region_c, plain)
            nodes[top, NEXT] = n
            nodes[n, NEXT] = rising[x]
        if a != 0 and a == c and c == d and b != a:
            n = _add_node(nodes, counts, x, y, region_a, plain)
            nodes[falling[x], NEXT] = n
            top = n
        if a != 0 and a == b and b == d and c != a:
            n = _add_node(nodes, counts, x, y, region_a, plain)
            nodes[n, NEXT] = bottom
            rising[x] = n
        if b != 0 and b != a and b != d:
            n = _add_node(nodes, counts, x, y, region_b, flag)
            nodes[n, NEXT] = rising[x]
            bottom = n
        if d != 0 and d != c and d != b:
            n = _add_node(nodes, counts, x, y, region_d, flag)
            top = n
            rising[x] = n
        if a != 0 and a == b and b == c and d != a:
            n = _add_node(nodes, counts, x, y, region_a, plain)
            bottom = n
            falling[x] = n
        if not with_junctions:
            continue
        if a != 0 and a == b and c != d and c != a and d != a:
            n = _add_node(nodes, counts, x, y, region_a, plain)
            nodes[n, NEXT] = bottom
            bottom = n
        elif c != 0 and c == d and a != b and a != c and b != c:
            n = _add_node(nodes, counts, x, y, region_c, plain)
            nodes[top, NEXT] = n
            top = n
        elif a != 0 and a == c and b != d and b != a and d != a:
            n = _add_node(nodes, counts, x, y, region_a, plain)
            nodes[falling[x], NEXT] = n
            falling[x] = n
        elif b != 0 and b == d and a != c and a != b and c != b:
            n = _add_node(nodes, counts, x, y, region_b, plain)
            nodes[n, NEXT] = rising[x]
            rising[x] = n
