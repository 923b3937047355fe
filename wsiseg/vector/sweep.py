"""The compiled part of `wsiseg.vector.trace`: sweep over rows, link corners, take rings out.

Tables are plain arrays, since numba compiles no objects. A node (a corner of a region) is a row
of: x, y, next node of its ring, region, whether another corner of its label meets it. A region is
a row of: parent (union-find), label, pixels, sum of probability, last row.
"""

import numba
import numpy as np
import numpy.typing as npt

from wsiseg.classes import IGNORE

UInt8 = npt.NDArray[np.uint8]


@numba.njit(cache=True)
def _find(regions: npt.NDArray[np.int64], i: int) -> int:
    """Return the root of a region, halving the path to it."""
    while regions[i, 0] != i:
        regions[i, 0] = regions[regions[i, 0], 0]
        i = regions[i, 0]
    return int(i)


@numba.njit(cache=True)
def _join(regions: npt.NDArray[np.int64], i: int, j: int) -> int:
    """Make two regions one and return it; the older index stays."""
    i, j = _find(regions, i), _find(regions, j)
    if i == j:
        return int(i)
    if j < i:
        i, j = j, i
    regions[j, 0] = i
    regions[i, 2] += regions[j, 2]
    regions[i, 3] += regions[j, 3]
    regions[i, 4] = max(regions[i, 4], regions[j, 4])
    return int(i)


@numba.njit(cache=True)
def sweep_rows(
    labels: UInt8,
    probability: UInt8,
    first_row: int,
    first_y: int,
    above: UInt8,
    region_above: npt.NDArray[np.int32],
    falling: npt.NDArray[np.int32],
    rising: npt.NDArray[np.int32],
    counts: npt.NDArray[np.int64],
    nodes: npt.NDArray[np.int32],
    regions: npt.NDArray[np.int64],
) -> int:
    """Sweep rows until all are done or the tables might not hold another; return the next row."""
    width = labels.shape[1]
    below = np.zeros(width + 2, np.uint8)
    region_below = np.zeros(width + 2, np.int32)
    for row in range(first_row, labels.shape[0]):
        if counts[0] + 4 * (width + 2) > nodes.shape[0] or counts[1] + width + 2 > regions.shape[0]:
            return row
        y = first_y + row
        x = 1
        while x <= width:
            value = labels[row, x - 1]
            if value == 0 or value == IGNORE:
                below[x] = 0
                x += 1
                continue
            first = x
            region = -1
            total = 0
            while x <= width and labels[row, x - 1] == value:  # one run of a label
                below[x] = value
                total += probability[row, x - 1]
                if above[x] == value and (x == first or above[x - 1] != value):
                    if region < 0:
                        region = _find(regions, region_above[x])
                    else:
                        region = _join(regions, region, region_above[x])
                x += 1
            if region < 0:
                region = counts[1]
                counts[1] += 1
                regions[region, 0], regions[region, 1] = region, value
                regions[region, 2], regions[region, 3] = 0, 0
            regions[region, 2] += x - first
            regions[region, 3] += total
            regions[region, 4] = y
            region_below[first:x] = region
        _link_line(y, above, below, region_above, region_below, falling, rising, counts, nodes)
        above[:] = below
        region_above[:] = region_below
    return int(labels.shape[0])


@numba.njit(cache=True)
def _add_node(
    nodes: npt.NDArray[np.int32],
    counts: npt.NDArray[np.int64],
    x: int,
    y: int,
    region: int,
    is_meeting: bool,
) -> int:
    n = counts[0]
    counts[0] += 1
    nodes[n, 0], nodes[n, 1], nodes[n, 2], nodes[n, 3] = x, y, -1, region
    nodes[n, 4] = is_meeting
    return int(n)


@numba.njit(cache=True)
def _link_line(
    y: int,
    above: UInt8,
    below: UInt8,
    region_above: npt.NDArray[np.int32],
    region_below: npt.NDArray[np.int32],
    falling: npt.NDArray[np.int32],
    rising: npt.NDArray[np.int32],
    counts: npt.NDArray[np.int64],
    nodes: npt.NDArray[np.int32],
) -> None:
    """Find the corners on the lattice line above row `y` and link them.

    Around a lattice point lie the pixels a (upper left), b (upper right), c and d (below). Upper
    edges of regions run to the right: `top` is the node where the open one began. Lower edges run
    to the left: `bottom` is the node where the open one will end. At each point what arrives is
    linked before what departs is stored.
    """
    top, bottom = -1, -1
    for x in range(above.shape[0] - 1):
        a, b, c, d = above[x], above[x + 1], below[x], below[x + 1]
        if (a == b and c == d) or (a == c and b == d):
            continue  # inside a region, or on a straight edge
        is_meeting = (a == d and a != 0) or (b == c and b != 0)
        if a != 0 and a != b and a != c:
            n = _add_node(nodes, counts, x, y, region_above[x], is_meeting)
            nodes[falling[x], 2] = n
            nodes[n, 2] = bottom
        if c != 0 and c != a and c != d:
            n = _add_node(nodes, counts, x, y, region_below[x], is_meeting)
            nodes[top, 2] = n
            falling[x] = n
        if b != 0 and b == c and c == d and a != b:
            n = _add_node(nodes, counts, x, y, region_below[x], False)
            nodes[top, 2] = n
            nodes[n, 2] = rising[x]
        if a != 0 and a == c and c == d and b != a:
            n = _add_node(nodes, counts, x, y, region_above[x], False)
            nodes[falling[x], 2] = n
            top = n
        if a != 0 and a == b and b == d and c != a:
            n = _add_node(nodes, counts, x, y, region_above[x], False)
            nodes[n, 2] = bottom
            rising[x] = n
        if b != 0 and b != a and b != d:
            n = _add_node(nodes, counts, x, y, region_above[x + 1], is_meeting)
            nodes[n, 2] = rising[x]
            bottom = n
        if d != 0 and d != c and d != b:
            n = _add_node(nodes, counts, x, y, region_below[x + 1], is_meeting)
            top = n
            rising[x] = n
        if a != 0 and a == b and b == c and d != a:
            n = _add_node(nodes, counts, x, y, region_above[x], False)
            bottom = n
            falling[x] = n


@numba.njit(cache=True)
def take_finished(
    above: UInt8,
    region_above: npt.NDArray[np.int32],
    falling: npt.NDArray[np.int32],
    rising: npt.NDArray[np.int32],
    counts: npt.NDArray[np.int64],
    nodes: npt.NDArray[np.int32],
    regions: npt.NDArray[np.int64],
) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int64]]:
    """Remove the regions that do not reach the last row; return their vertices and rings.

    A ring is a row of: region, its label, pixels, sum of probability and last row, first vertex,
    vertex after the last, whether it meets itself, twice its signed area. Nodes are in reading
    order, so that the first one met of a ring is its uppermost leftmost vertex.
    """
    num_nodes, num_regions = counts[0], counts[1]
    is_open = np.zeros(num_regions + 1, np.bool_)
    for x in range(above.shape[0]):
        if above[x] != 0:
            is_open[_find(regions, region_above[x])] = True

    num_finished = 0
    for n in range(num_nodes):
        nodes[n, 3] = _find(regions, nodes[n, 3])
        num_finished += not is_open[nodes[n, 3]]
    vertices = np.empty((num_finished, 2), np.int32)
    rings = np.empty((num_finished // 4, 9), np.int64)  # no ring has fewer than four vertices
    is_taken = np.zeros(num_nodes, np.bool_)
    num_vertices, num_rings = 0, 0
    for first in range(num_nodes):
        region = nodes[first, 3]
        if is_taken[first] or is_open[region]:
            continue
        rings[num_rings, 0] = region
        rings[num_rings, 1:5] = regions[region, 1:5]
        rings[num_rings, 5] = num_vertices
        meetings = 0
        n = first
        doubled_area = 0
        while not is_taken[n]:
            is_taken[n] = True
            after = nodes[n, 2]
            doubled_area += np.int64(nodes[n, 0]) * nodes[after, 1]
            doubled_area -= np.int64(nodes[after, 0]) * nodes[n, 1]
            vertices[num_vertices, 0], vertices[num_vertices, 1] = nodes[n, 0], nodes[n, 1]
            meetings += nodes[n, 4]
            num_vertices += 1
            n = after
        rings[num_rings, 6] = num_vertices
        rings[num_rings, 7] = meetings > 1
        rings[num_rings, 8] = doubled_area
        num_rings += 1

    _compact(is_open, above, region_above, falling, rising, counts, nodes, regions)
    return vertices, rings[:num_rings]


@numba.njit(cache=True)
def _compact(
    is_open: npt.NDArray[np.bool_],
    above: UInt8,
    region_above: npt.NDArray[np.int32],
    falling: npt.NDArray[np.int32],
    rising: npt.NDArray[np.int32],
    counts: npt.NDArray[np.int64],
    nodes: npt.NDArray[np.int32],
    regions: npt.NDArray[np.int64],
) -> None:
    """Keep the open regions and their nodes only, in their order, under new numbers."""
    for x in range(above.shape[0]):
        if above[x] != 0:
            region_above[x] = _find(regions, region_above[x])
    new_region = np.zeros(counts[1] + 1, np.int32)
    kept = 0
    for r in range(counts[1]):
        if is_open[r]:
            new_region[r] = kept
            regions[kept] = regions[r]
            regions[kept, 0] = kept
            kept += 1
    counts[1] = kept
    for x in range(above.shape[0]):
        region_above[x] = new_region[region_above[x]] if above[x] != 0 else 0

    new_node = np.full(counts[0] + 1, -1, np.int32)  # the last entry stands for "none yet" (-1)
    kept = 0
    for n in range(counts[0]):
        if is_open[nodes[n, 3]]:
            new_node[n] = kept
            nodes[kept] = nodes[n]
            nodes[kept, 3] = new_region[nodes[n, 3]]
            kept += 1
    for n in range(kept):
        nodes[n, 2] = new_node[nodes[n, 2]]
    for x in range(falling.shape[0]):
        falling[x], rising[x] = new_node[falling[x]], new_node[rising[x]]
    counts[0] = kept
