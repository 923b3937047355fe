"""The compiled end of tracing: take closed rings out of the tables of `wsiseg.vector.sweep`.

Counters begin as np.int64(0), as there.
"""

import numba
import numpy as np
import numpy.typing as npt

from wsiseg.vector.sweep import (
    FLAG,
    LABEL,
    MEETS,
    NEXT,
    NODES,
    OWNER,
    REGION,
    REGIONS,
    RUNS,
    START,
    Int32,
    Int64,
    X,
    Y,
    find_root,
)

Bool = npt.NDArray[np.bool_]


@numba.njit(cache=True, nogil=True)
def take_closed(
    above: Int32, rising: Int32, counts: Int64, nodes: Int32, regions: Int64
) -> tuple[Int32, Int64, Int64, Bool]:
    """Take out every closed ring, and return the state of the regions they belong to.

    Call `compact` next. Nodes are in reading order, so that the first one met of a ring is its
    uppermost leftmost vertex.

    Returns
    -------
    vertices, rings, root_of, is_open
        int32 (V, 2) of (x, y); int64 (R, 4) of root region, first vertex, vertex after the last,
        twice the signed area; the root of each region; whether a root reaches the last row.
    """
    num_nodes, num_regions = counts[NODES], counts[REGIONS]
    root_of = np.empty(num_regions, np.int64)
    for r in range(num_regions):
        root_of[r] = find_root(regions, r)
    is_open = np.zeros(num_regions, np.bool_)
    for k in range(counts[RUNS]):
        if above[k, LABEL] != 0:
            above[k, REGION] = root_of[above[k, REGION]]
            is_open[above[k, REGION]] = True

    is_taken = np.zeros(num_nodes, np.bool_)
    num_closed = num_nodes
    for k in range(counts[RUNS]):  # what hangs on an open left edge is no ring yet
        if above[k, LABEL] == 0:
            continue
        n = rising[above[k, START] - 1]
        while n >= 0:
            is_taken[n] = True
            num_closed -= 1
            n = nodes[n, NEXT]

    vertices = np.empty((num_closed, 2), np.int32)
    rings = np.empty((num_closed // 4, 4), np.int64)  # no ring has fewer than four vertices
    num_vertices, num_rings = np.int64(0), np.int64(0)
    vertex_of = np.full(num_nodes, -1, np.int32)
    earlier = np.full(num_closed, -1, np.int32)
    ends = np.empty(num_closed // 4, np.int64)
    for first in range(num_nodes):
        nodes[first, OWNER] = root_of[nodes[first, OWNER]]
        if is_taken[first]:
            continue
        begin = num_vertices
        num_passed_twice = 0
        n = first
        while not is_taken[n]:
            is_taken[n] = True
            vertices[num_vertices, 0], vertices[num_vertices, 1] = nodes[n, X], nodes[n, Y]
            vertex_of[n] = num_vertices
            if nodes[n, FLAG] & MEETS:
                visit = _earlier_visit(nodes, n, num_nodes, vertex_of, begin)
                earlier[num_vertices] = visit
                num_passed_twice += visit >= 0
            num_vertices += 1
            n = nodes[n, NEXT]
        if num_passed_twice == 0:
            ends[0], num_ends = num_vertices, 1
        else:
            num_ends = _cut_at_meetings(vertices, earlier, begin, num_vertices, ends)
        start = begin
        for k in range(num_ends):
            rings[num_rings, 0] = nodes[first, OWNER]
            rings[num_rings, 1], rings[num_rings, 2] = start, ends[k]
            rings[num_rings, 3] = doubled_area(vertices, start, ends[k])
            num_rings += 1
            start = ends[k]
    for n in range(num_nodes):
        nodes[n, FLAG] = (nodes[n, FLAG] & MEETS) | (2 if vertex_of[n] < 0 else 0)
    return vertices, rings[:num_rings], root_of, is_open


@numba.njit(cache=True)
def _earlier_visit(nodes: Int32, n: int, num_nodes: int, vertex_of: Int32, begin: int) -> int:
    """Return the vertex from `begin` on that lies at the place of node `n`, or -1.

    The nodes of a lattice point stand together in the table. There are at most four, and no ring
    has three of them.
    """
    for m in range(max(0, n - 3), min(num_nodes, n + 4)):
        is_here = nodes[m, X] == nodes[n, X] and nodes[m, Y] == nodes[n, Y]
        if m != n and is_here and vertex_of[m] >= begin:
            return int(vertex_of[m])
    return -1


@numba.njit(cache=True)
def doubled_area(vertices: Int32, start: int, end: int) -> int:
    """Return twice the signed area of a ring; positive for outer ones."""
    total = np.int64(0)
    x, y = np.int64(vertices[end - 1, 0]), np.int64(vertices[end - 1, 1])
    for n in range(start, end):
        x_next, y_next = np.int64(vertices[n, 0]), np.int64(vertices[n, 1])
        total += x * y_next - x_next * y
        x, y = x_next, y_next
    return int(total)


@numba.njit(cache=True)
def _cut_at_meetings(vertices: Int32, earlier: Int32, begin: int, end: int, ends: Int64) -> int:
    """Cut the ring [begin, end) that passes points twice into simple ones, in place.

    `earlier` : int32, the earlier visit of each vertex's place, or -1. `ends` takes where each of
    the results ends; each begins with its uppermost leftmost vertex. Returns how many there are.
    """
    size = end - begin
    path = np.empty(size, np.int64)
    place = np.full(size, -1, np.int64)
    cut = np.empty((size, 2), np.int32)
    length, written, num_ends = np.int64(0), np.int64(0), 0
    for n in range(size):
        before = earlier[begin + n] - begin
        if before >= 0 and place[before] >= 0:
            start = place[before]
            written = _write_loop(vertices, begin, path, start, length, cut, written)
            for k in range(start, length):
                place[path[k]] = -1
            length = start
            ends[num_ends] = begin + written
            num_ends += 1
        path[length] = n
        place[n] = length
        length += 1
    _write_loop(vertices, begin, path, np.int64(0), length, cut, written)
    ends[num_ends] = end
    for n in range(size):
        vertices[begin + n, 0], vertices[begin + n, 1] = cut[n, 0], cut[n, 1]
    return num_ends + 1


@numba.njit(cache=True)
def _write_loop(
    vertices: Int32, begin: int, path: Int64, start: int, end: int, out: Int32, written: int
) -> int:
    """Copy a part of a path to `out`, from its uppermost leftmost vertex on."""
    first = start
    x, y = vertices[begin + path[start], 0], vertices[begin + path[start], 1]
    for k in range(start + 1, end):
        x_k, y_k = vertices[begin + path[k], 0], vertices[begin + path[k], 1]
        if y_k < y or (y_k == y and x_k < x):
            first, x, y = k, x_k, y_k
    k = first
    for _ in range(end - start):
        out[written, 0] = vertices[begin + path[k], 0]
        out[written, 1] = vertices[begin + path[k], 1]
        written += 1
        k = k + 1 if k + 1 < end else start
    return written


@numba.njit(cache=True)
def _move_row(table: Int32 | Int64, source: int, target: int) -> None:
    """Copy a row within a table; assigning it whole takes numba a second to compile."""
    for column in range(table.shape[1]):
        table[target, column] = table[source, column]


@numba.njit(cache=True, nogil=True)
def compact(
    root_of: Int64,
    is_open: Bool,
    above: Int32,
    falling: Int32,
    rising: Int32,
    counts: Int64,
    nodes: Int32,
    regions: Int64,
) -> Int32:
    """Keep the open regions and the pieces of rings that are not closed, under new numbers.

    Returns int32 (regions,), the new number of each region, of use only for open roots.
    """
    new_region = np.full(counts[REGIONS], -1, np.int32)
    kept = np.int64(0)
    for r in range(counts[REGIONS]):
        if is_open[r] and root_of[r] == r:
            new_region[r] = kept
            _move_row(regions, r, kept)
            regions[kept, 0] = kept
            kept += 1
    counts[REGIONS] = kept

    new_node = np.full(counts[NODES] + 1, -1, np.int32)  # the last entry stands for "none yet" (-1)
    kept = np.int64(0)
    for n in range(counts[NODES]):
        if nodes[n, FLAG] & 2:
            new_node[n] = kept
            _move_row(nodes, n, kept)
            nodes[kept, FLAG] &= MEETS
            nodes[kept, OWNER] = new_region[nodes[n, OWNER]]
            kept += 1
    for n in range(kept):
        nodes[n, NEXT] = new_node[nodes[n, NEXT]]
    counts[NODES] = kept
    for k in range(counts[RUNS]):
        x = above[k, START] - 1
        if above[k, LABEL] != 0:
            above[k, REGION] = new_region[above[k, REGION]]
            rising[x] = new_node[rising[x]]
        if k > 0 and above[k - 1, LABEL] != 0:
            falling[x] = new_node[falling[x]]
    return new_region


@numba.njit(cache=True, nogil=True)
def gather(vertices: Int32, starts: Int64, ends: Int64) -> tuple[Int32, Int64]:
    """Return rings one after the other, and where each begins (one more entry than rings)."""
    offsets = np.zeros(len(starts) + 1, np.int64)
    for k in range(len(starts)):
        offsets[k + 1] = offsets[k] + ends[k] - starts[k]
    out = np.empty((offsets[-1], 2), np.int32)
    for k in range(len(starts)):
        at = offsets[k]
        for n in range(starts[k], ends[k]):
            out[at, 0], out[at, 1] = vertices[n, 0], vertices[n, 1]
            at += 1
    return out, offsets
