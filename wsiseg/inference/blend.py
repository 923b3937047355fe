"""The two inner loops of blending, compiled: add a window to sums, and turn sums into labels.

In whole numbers throughout, so that no order of additions and no machine gives another result.
They let go of the interpreter lock: the network and the readers go on meanwhile.
"""

import numba
import numpy as np
import numpy.typing as npt

from wsiseg.classes import IGNORE

PROBABILITY_ONE = 65535
"""The probability 1 as an integer."""

Int32 = npt.NDArray[np.int32]
UInt8 = npt.NDArray[np.uint8]


@numba.njit(cache=True, nogil=True)
def accumulate(sums: Int32, weight: Int32, probabilities: Int32, weights: Int32) -> None:
    """Add weighted probabilities to sums of the same shape, and the weights to theirs.

    Parameters
    ----------
    sums, probabilities
        int32 (C, h, w); probabilities in 65535ths.
    weight, weights
        int32 (h, w): their sums, and the window's own.
    """
    num_classes, height, width = probabilities.shape
    for row in range(height):
        for column in range(width):
            weight[row, column] += weights[row, column]
        for index in range(num_classes):
            for column in range(width):
                share = probabilities[index, row, column] * weights[row, column]
                sums[index, row, column] += share


@numba.njit(cache=True, nogil=True)
def resolve(sums: Int32, weight: Int32, labels: UInt8, probability: UInt8) -> None:
    """Turn sums of the foreground into the label of highest mean probability, and that in 255ths.

    The background's sum is what the others leave; the lowest label wins a tie. Pixels without
    weight become 255 and 0.

    Parameters
    ----------
    sums, weight
        int32 (C, h, w) and (h, w), as `accumulate` leaves them.
    labels, probability
        uint8 (h, w), written.
    """
    num_classes, height, width = sums.shape
    for row in range(height):
        for column in range(width):
            total = np.int64(weight[row, column]) * PROBABILITY_ONE
            if total == 0:
                labels[row, column] = IGNORE
                probability[row, column] = 0
                continue
            background, best, top = total, 0, np.int64(-1)
            for index in range(num_classes):
                value = np.int64(sums[index, row, column])
                background -= value
                if value > top:
                    best, top = index + 1, value
            if background >= top:
                best, top = 0, background
            labels[row, column] = best
            probability[row, column] = (255 * top + total // 2) // total
