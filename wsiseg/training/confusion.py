"""The confusion matrix, from which every pixel metric follows."""

import numpy as np
import numpy.typing as npt


def confusion_matrix(
    truth: npt.NDArray[np.uint8], guess: npt.NDArray[np.uint8], num_labels: int
) -> npt.NDArray[np.int64]:
    """Count pixels as int64 (num_labels, num_labels): row = true label, column = guessed.

    Pixels whose true label is not below `num_labels` (255: nobody said what it is) are left out;
    a guess that is not (255: not predicted) counts as background.
    """
    is_known = truth < num_labels
    rows = truth[is_known].astype(np.int64)
    columns = guess[is_known].astype(np.int64)
    columns[columns >= num_labels] = 0
    counts = np.bincount(rows * num_labels + columns, minlength=num_labels**2)
    return counts.reshape(num_labels, num_labels)
