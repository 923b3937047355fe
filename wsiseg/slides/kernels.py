"""The inner loops of resampling, compiled; imported where they are used, as numba takes a while."""

import numba
import numpy as np
import numpy.typing as npt

from wsiseg.slides.resample import WEIGHT_BITS


@numba.njit(cache=True, nogil=True)
def average(
    pixels: npt.NDArray[np.uint8],
    out: npt.NDArray[np.uint8],
    starts_y: npt.NDArray[np.int32],
    columns_y: npt.NDArray[np.int32],
    weights_y: npt.NDArray[np.int32],
    starts_x: npt.NDArray[np.int32],
    columns_x: npt.NDArray[np.int32],
    weights_x: npt.NDArray[np.int32],
) -> None:
    """Fill `out` uint8 (H, W, 3) with weighted means of `pixels` uint8 (h, w, 3); see `Taps`."""
    num_y, num_x = out.shape[:2]
    length = pixels.shape[1] * 3
    lines = pixels.reshape(pixels.shape[0], length)
    down = np.empty(length, np.int32)
    half = np.int32(1 << (2 * WEIGHT_BITS - 1))
    for y in range(num_y):
        down[:] = 0
        for j in range(starts_y[y], starts_y[y + 1]):
            line, weight = lines[columns_y[j]], weights_y[j]
            for k in range(length):
                down[k] += weight * np.int32(line[k])
        for x in range(num_x):
            red = green = blue = half
            for j in range(starts_x[x], starts_x[x + 1]):
                weight, place = weights_x[j], 3 * columns_x[j]
                red += weight * down[place]
                green += weight * down[place + 1]
                blue += weight * down[place + 2]
            out[y, x, 0] = red >> (2 * WEIGHT_BITS)
            out[y, x, 1] = green >> (2 * WEIGHT_BITS)
            out[y, x, 2] = blue >> (2 * WEIGHT_BITS)


@numba.njit(cache=True, nogil=True)
def fill_majority(
    labels: npt.NDArray[np.uint8],
    winners: npt.NDArray[np.uint8],
    starts_y: npt.NDArray[np.int32],
    columns_y: npt.NDArray[np.int32],
    weights_y: npt.NDArray[np.int32],
    starts_x: npt.NDArray[np.int32],
    columns_x: npt.NDArray[np.int32],
    weights_x: npt.NDArray[np.int32],
) -> None:
    """Fill `winners` uint8 (H, W) with the label of `labels` that has the largest share."""
    shares = np.zeros(256, np.int32)
    for y in range(winners.shape[0]):
        for x in range(winners.shape[1]):
            for i in range(starts_y[y], starts_y[y + 1]):
                for j in range(starts_x[x], starts_x[x + 1]):
                    label = labels[columns_y[i], columns_x[j]]
                    shares[label] += weights_y[i] * weights_x[j]
            winner = np.argmax(shares)  # the first of equals
            winners[y, x] = winner
            shares[:] = 0
