"""Pixel and object metrics: cases worked out by hand, properties, slow and plain versions."""

import itertools

import hypothesis.extra.numpy as arrays
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from scipy import ndimage
from scipy.spatial.distance import cdist

from wsiseg.training import metrics, objects
from wsiseg.training.confusion import confusion_matrix
from wsiseg.training.distances import hausdorff_95, object_hausdorff

quick = settings(max_examples=60, deadline=None)

labels = arrays.arrays(np.uint8, (9, 11), elements=st.sampled_from([0, 1, 2, 255]))
small_maps = arrays.arrays(np.int32, (8, 9), elements=st.integers(0, 5))


def scores(truth, guess, label=1, num=3):
    return metrics.class_scores(confusion_matrix(truth, guess, num), label)


def square(height, width, *boxes):
    """Return an instance map: each (y, x, size) is the next object."""
    result = np.zeros((height, width), np.int32)
    for number, (y, x, size) in enumerate(boxes, start=1):
        result[y : y + size, x : x + size] = number
    return result


# Pixels.


def test_pixel_metrics_of_a_case_counted_by_hand():
    truth = np.array([[1, 1, 1, 0, 255]], np.uint8)
    guess = np.array([[1, 0, 1, 1, 1]], np.uint8)
    found = scores(truth, guess)
    assert found == {
        "dice": pytest.approx(4 / 6),
        "iou": pytest.approx(2 / 4),
        "precision": pytest.approx(2 / 3),
        "recall": pytest.approx(2 / 3),
    }
    assert metrics.accuracy(confusion_matrix(truth, guess, 3)) == pytest.approx(2 / 4)


def test_d21_a_class_that_is_nowhere_has_no_score_instead_of_a_perfect_one():
    empty = np.zeros((4, 4), np.uint8)
    assert scores(empty, empty) == dict.fromkeys(("dice", "iou", "precision", "recall"))


def test_a_class_on_one_side_only_scores_zero():
    empty, full = np.zeros((4, 4), np.uint8), np.ones((4, 4), np.uint8)
    assert scores(full, empty) == {"dice": 0, "iou": 0, "precision": None, "recall": 0}
    assert scores(empty, full) == {"dice": 0, "iou": 0, "precision": 0, "recall": None}


def test_nothing_known_has_no_accuracy():
    unknown = np.full((2, 2), 255, np.uint8)
    assert metrics.accuracy(confusion_matrix(unknown, unknown, 3)) is None


def test_d22_accuracy_is_of_all_labels_at_once():
    truth = np.array([[0, 1, 2, 2]], np.uint8)
    guess = np.array([[0, 2, 1, 2]], np.uint8)
    assert metrics.accuracy(confusion_matrix(truth, guess, 3)) == 0.5


@quick
@given(labels, labels)
def test_pixel_metrics_agree_with_counting_one_by_one(truth, guess):
    for label in (1, 2):
        pairs = [
            (t == label, g == label)
            for t, g in zip(truth.flat, guess.flat, strict=True)
            if t != 255
        ]
        both = sum(t and g for t, g in pairs)
        either = sum(t or g for t, g in pairs)
        found = scores(truth, guess, label)
        if either == 0:
            assert found["dice"] is None
            assert found["iou"] is None
        else:
            assert found["iou"] == pytest.approx(both / either)
            assert found["dice"] == pytest.approx(2 * both / (both + either))


@quick
@given(labels, labels)
def test_dice_and_iou_are_symmetric_where_all_is_known(truth, guess):
    truth, guess = truth % 255, guess % 255
    forth, back = scores(truth, guess), scores(guess, truth)
    assert forth["dice"] == back["dice"]
    assert forth["iou"] == back["iou"]
    assert forth["precision"] == back["recall"]


@quick
@given(labels)
def test_a_prediction_that_is_the_truth_is_perfect(truth):
    found = scores(truth, truth)
    expected = 1.0 if (truth == 1).any() else None
    assert found == dict.fromkeys(found, expected)


# Distances.


def block(y, x, *, size=50, shape=(256, 256)):
    mask = np.zeros(shape, bool)
    mask[y : y + size, x : x + size] = True
    return mask


def test_d19_hausdorff_distance_is_between_points_not_rows():
    far = hausdorff_95(block(10, 10), block(10, 190), (1.0, 1.0))
    assert far == pytest.approx(180, abs=5)
    below = hausdorff_95(block(10, 10), block(110, 10), (1.0, 1.0))
    assert below == pytest.approx(100, abs=5)
    assert hausdorff_95(block(10, 10), np.zeros((256, 256), bool), (1.0, 1.0)) is None


def test_hausdorff_distance_is_in_micrometres_along_each_axis():
    lines = np.zeros((2, 60, 60), bool)
    lines[0, 5], lines[1, 25] = True, True
    assert hausdorff_95(lines[0], lines[1], (0.5, 9.0)) == pytest.approx(10.0)
    assert hausdorff_95(lines[0].T, lines[1].T, (9.0, 0.25)) == pytest.approx(5.0)


masks = arrays.arrays(bool, (7, 8))


@quick
@given(masks, masks)
def test_hausdorff_95_agrees_with_all_pairs_of_border_pixels(truth, guess):
    spacing = (0.5, 2.0)
    if not truth.any() or not guess.any():
        assert hausdorff_95(truth, guess, spacing) is None
        return
    points = []
    for mask in (truth, guess):
        padded = np.pad(mask, 1)
        around = [np.roll(padded, step, axis)[1:-1, 1:-1] for step in (1, -1) for axis in (0, 1)]
        points.append(np.argwhere(mask & ~np.logical_and.reduce(around)) * spacing)
    all_pairs = cdist(points[0], points[1])
    ways = [np.percentile(all_pairs.min(axis=axis), 95) for axis in (0, 1)]
    assert hausdorff_95(truth, guess, spacing) == pytest.approx(max(ways))


def slow_object_hausdorff(truth, guess, spacing):
    def points(instances):
        return [np.argwhere(instances == n) for n in np.unique(instances) if n]

    def between(a, b):
        distances = cdist(a * np.array(spacing), b * np.array(spacing))
        return max(distances.min(axis=0).max(), distances.min(axis=1).max())

    def one_way(here, there):
        total = 0.0
        for one in here:
            shared = [len({*map(tuple, one)} & {*map(tuple, other)}) for other in there]
            if max(shared):
                most = [o for o, n in zip(there, shared, strict=True) if n == max(shared)]
                nearest = between(one, min(most, key=lambda o: tuple(o[0])))
            else:
                nearest = min(between(one, other) for other in there)
            total += nearest * len(one)
        return total / sum(map(len, here))

    sides = points(truth), points(guess)
    return (one_way(*sides) + one_way(*sides[::-1])) / 2


@quick
@given(small_maps, small_maps)
def test_object_hausdorff_agrees_with_all_pairs_of_pixels(truth, guess):
    spacing = (0.5, 0.75)
    found = object_hausdorff(truth, guess, spacing)
    if not truth.any() or not guess.any():
        assert found is None
    else:
        assert found == pytest.approx(slow_object_hausdorff(truth, guess, spacing))


boxes = st.tuples(st.integers(0, 30), st.integers(0, 50), st.integers(1, 9))
scattered = st.lists(boxes, min_size=1, max_size=6)


@quick
@given(scattered, scattered)
def test_object_hausdorff_finds_the_nearest_of_scattered_objects(truth, guess):
    sides = square(40, 60, *truth), square(40, 60, *guess)
    slow = slow_object_hausdorff(*sides, (0.5, 0.75))
    assert object_hausdorff(*sides, (0.5, 0.75)) == pytest.approx(slow)


def test_object_hausdorff_of_an_object_without_overlap_is_to_the_nearest():
    truth = square(20, 60, (0, 0, 4))
    guess = square(20, 60, (0, 50, 4), (0, 10, 4))
    # Forth: 10 to the nearest. Back: 50 and 10, of equal area.
    assert object_hausdorff(truth, guess, (1.0, 1.0)) == pytest.approx((10 + 30) / 2)


# Objects.


def test_object_metrics_of_a_case_counted_by_hand():
    # One found exactly (16 px), one by half (16 px, of which 8), one missed (4), one invented (9).
    truth = square(20, 20, (0, 0, 4), (10, 0, 4), (0, 10, 2))
    guess = np.zeros_like(truth)
    guess[0:4, 0:4], guess[10:14, 0:2], guess[15:18, 15:18] = 7, 3, 9
    found = objects.object_scores(truth, guess)
    assert found["aji"] == pytest.approx((16 + 8) / (16 + 16 + 4 + 9))
    assert found["aji_plus"] == found["aji"]
    assert found["dq"] == pytest.approx(2 * 1 / 6)  # an IoU of exactly one half is no match
    assert found["sq"] == 1.0
    assert found["pq"] == pytest.approx(2 / 6)
    assert found["object_f1"] == pytest.approx(2 * 2 / 6)  # but half of the object is found
    forth = (1.0 * 16 + 2 * 8 / 24 * 16) / 36
    back = (1.0 * 16 + 2 * 8 / 24 * 8) / 33
    assert found["object_dice"] == pytest.approx((forth + back) / 2)


def test_a_guess_that_joins_two_objects_counts_twice_in_aji_and_once_in_aji_plus():
    truth = square(10, 20, (0, 0, 5), (0, 5, 5))
    guess = (truth > 0).astype(np.int32)
    found = objects.object_scores(truth, guess)
    assert found["aji"] == pytest.approx(50 / 100)
    assert found["aji_plus"] == pytest.approx(25 / 75)


def test_aji_plus_gives_up_the_best_pair_for_the_best_sum():
    truth, guess = np.zeros((2, 1, 100), np.int32)
    truth[0, 0:10], truth[0, 10:20] = 1, 2
    guess[0, 4:14], guess[0, 0:4] = 1, 2
    # Pairs (1,1): 6/14, (1,2): 4/10, (2,1): 4/16; (1,2) with (2,1) has the largest sum.
    assert objects.object_scores(truth, guess)["aji_plus"] == pytest.approx(8 / (20 + 14 - 8))


@pytest.mark.parametrize("swap", [False, True])
def test_objects_on_one_side_only_score_zero(swap):
    sides = square(9, 9, (2, 2, 3)), np.zeros((9, 9), np.int32)
    found = objects.object_scores(*(sides[::-1] if swap else sides))
    assert found == {name: None if name == "sq" else 0.0 for name in objects.NAMES}


def test_no_object_on_either_side_has_no_score():
    empty = np.zeros((9, 9), np.int32)
    assert objects.object_scores(empty, empty) == dict.fromkeys(objects.NAMES)


@quick
@given(small_maps)
def test_the_truth_as_prediction_is_perfect_whatever_its_numbers(truth):
    guess = np.where(truth > 0, 1000 - truth, 0)
    expected = 1.0 if truth.any() else None
    assert objects.object_scores(truth, guess) == dict.fromkeys(objects.NAMES, expected)


@quick
@given(small_maps, small_maps, st.permutations(range(1, 6)), st.permutations(range(1, 6)))
def test_object_metrics_do_not_depend_on_the_numbers_of_objects(truth, guess, first, second):
    renumbered = [np.array([0, *order], np.int32) * 11 for order in (first, second)]
    again = objects.object_scores(renumbered[0][truth], renumbered[1][guess])
    assert again == objects.object_scores(truth, guess)


def pixel_sets(instances):
    """Return the pixels of each object, in the order of their first ones."""
    found: dict[int, set[tuple[int, ...]]] = {}
    for pixel in itertools.product(*map(range, instances.shape)):
        if instances[pixel]:
            found.setdefault(int(instances[pixel]), set()).add(pixel)
    return list(found.values())


def set_iou(a, b):
    return len(a & b) / len(a | b)


def slow_aji(ts, gs):
    """Follow algorithm 1 of Kumar et al. 2017."""
    shared = union = 0
    used = set()
    for t in ts:
        j = max(range(len(gs)), key=lambda j: set_iou(t, gs[j]))
        hit = gs[j] if t & gs[j] else set()
        used |= {j} if hit else set()
        shared += len(t & hit)
        union += len(t | hit)
    return shared / (union + sum(len(g) for j, g in enumerate(gs) if j not in used))


def slow_object_f1(ts, gs):
    found = set()
    for g in gs:
        i = max(range(len(ts)), key=lambda i: len(ts[i] & g))
        if ts[i] & g and len(ts[i] & g) >= len(ts[i]) / 2:
            found.add(i)
    return 2 * len(found) / (len(ts) + len(gs))


def slow_one_way_dice(here, there):
    total = 0.0
    for one in here:
        other = max(there, key=lambda o: len(o & one))
        total += len(one) * 2 * len(one & other) / (len(one) + len(other))
    return total / sum(map(len, here))


def slow_object_scores(truth, guess):
    ts, gs = pixel_sets(truth), pixel_sets(guess)
    if not ts or not gs:
        return None
    matched = [set_iou(t, g) for t in ts for g in gs if set_iou(t, g) > 0.5]
    return {
        "aji": slow_aji(ts, gs),
        "pq": sum(matched) / ((len(ts) + len(gs)) / 2),
        "dq": 2 * len(matched) / (len(ts) + len(gs)),
        "sq": sum(matched) / len(matched) if matched else None,
        "object_f1": slow_object_f1(ts, gs),
        "object_dice": (slow_one_way_dice(ts, gs) + slow_one_way_dice(gs, ts)) / 2,
    }


@quick
@given(small_maps, small_maps)
def test_object_metrics_agree_with_sets_of_pixels(truth, guess):
    slow = slow_object_scores(truth, guess)
    fast = objects.object_scores(truth, guess)
    if slow is not None:
        assert {name: fast[name] for name in slow} == pytest.approx(slow)


@quick
@given(small_maps, small_maps)
def test_aji_plus_is_of_the_best_of_all_one_to_one_pairings(truth, guess):
    overlaps = objects.Overlaps.of(truth, guess)
    num_true, num_guessed = len(overlaps.true_px), len(overlaps.guessed_px)
    iou = np.zeros((num_true, num_guessed + num_true))
    iou[overlaps.true_index, overlaps.guessed_index] = overlaps.iou
    columns = itertools.permutations(range(min(num_guessed + num_true, 8)), num_true)
    best = max(sum(iou[i, j] for i, j in enumerate(chosen)) for chosen in columns)
    chosen = [pair for pairs in objects._one_to_one(overlaps) for pair in pairs]
    assert overlaps.iou[chosen].sum() == pytest.approx(best)
    assert len({*overlaps.true_index[chosen]}) == len(chosen)
    assert len({*overlaps.guessed_index[chosen]}) == len(chosen)


def test_memory_follows_the_pairs_that_touch_not_all_pairs():
    """A dense table of these 62 500 x 62 500 objects would take 31 GB."""
    grid = np.arange(250 * 250).reshape(250, 250) + 1
    truth = np.kron(grid, np.array([[1, 1, 0], [1, 1, 0], [0, 0, 0]]))
    found = objects.object_scores(truth, truth)
    assert found == dict.fromkeys(objects.NAMES, 1.0)


# From masks to objects.


def test_d20_touching_corners_are_two_objects_and_d12_touching_sides_one():
    corner = np.eye(2, dtype=bool)
    assert objects.components(corner).max() == 2
    assert objects.components(np.ones((1, 2), bool)).max() == 1


def discs(*centres, radius=12, shape=(80, 120)):
    y, x = np.indices(shape)
    return np.logical_or.reduce([(y - b) ** 2 + (x - a) ** 2 <= radius**2 for a, b in centres])


def test_d12_a_watershed_cuts_discs_that_touch():
    mask = discs((30, 40), (51, 40), (90, 40))
    assert objects.components(mask).max() == 2
    parts = objects.watershed(mask)
    assert parts.max() == 3
    assert len({parts[40, 30], parts[40, 51], parts[40, 90]}) == 3


def test_a_watershed_keeps_a_small_object_beside_a_large_one():
    mask = discs((40, 40), radius=20)
    mask[40:42, 62:64] = True
    parts = objects.watershed(mask)
    assert parts[40, 62] not in (0, parts[40, 40])


@quick
@given(arrays.arrays(bool, (14, 15)))
@example(np.pad(np.eye(2, dtype=bool), ((3, 9), (2, 11))))
def test_a_watershed_covers_the_mask_and_cuts_each_part_further(mask):
    parts = objects.watershed(mask)
    assert ((parts > 0) == mask).all()
    whole, num = ndimage.label(mask)
    assert len(np.unique(parts[mask])) >= num
    for number in np.unique(parts[mask]):
        assert len(np.unique(whole[parts == number])) == 1


# Over images.


def confusions(num, seed=3):
    rng = np.random.default_rng(seed)
    return [rng.integers(0, 1000, (3, 3)) for _ in range(num)]


def test_an_interval_holds_the_pooled_score_and_repeats_with_its_seed():
    images = confusions(12)
    found = metrics.pooled_intervals(images, 1, resamples=400, seed=5)
    pooled = metrics.class_scores(np.sum(images, axis=0), 1)
    for name in metrics.PIXEL_METRICS:
        score, ends = pooled[name], found[name]
        assert score is not None
        assert ends is not None
        assert ends[0] < score < ends[1]
    assert found == metrics.pooled_intervals(images, 1, resamples=400, seed=5)
    assert found != metrics.pooled_intervals(images, 1, resamples=400, seed=6)


def test_an_interval_of_equal_images_is_a_point():
    image = confusions(1)[0]
    score = metrics.class_scores(image, 2)["dice"]
    found = metrics.pooled_intervals([image] * 5, 2, resamples=50, seed=0)
    assert found["dice"] == pytest.approx((score, score))


def test_the_interval_of_a_mean_is_that_of_the_normal_approximation():
    values = np.random.default_rng(0).normal(0.7, 0.1, 200).tolist()
    found = metrics.mean_interval([*values, None], resamples=4000, seed=1)
    half = 1.96 * np.std(values) / np.sqrt(200)
    ends = np.mean(values) - half, np.mean(values) + half
    assert found == pytest.approx(ends, abs=0.1 * half)


@pytest.mark.parametrize(("num", "resamples"), [(2, 100), (5, 0)])
def test_too_few_images_or_no_resamples_give_no_interval(num, resamples):
    found = metrics.pooled_intervals(confusions(num), 1, resamples=resamples, seed=0)
    assert found == dict.fromkeys(metrics.PIXEL_METRICS)
    assert metrics.mean_interval([0.5] * num, resamples=resamples, seed=0) is None


def test_a_class_that_no_image_has_gives_no_interval():
    found = metrics.pooled_intervals([np.diag([9, 0, 3])] * 4, 1, resamples=20, seed=0)
    assert found == dict.fromkeys(metrics.PIXEL_METRICS)
    assert metrics.mean_interval([None] * 4, resamples=20, seed=0) is None
    assert metrics.mean_score([None, None]) is None
    assert metrics.mean_score([None, 0.5, 1.0]) == 0.75


def test_a_watershed_cuts_the_same_objects_at_every_resolution():
    def touching_discs(mpp):
        y, x = np.mgrid[0 : round(40 / mpp), 0 : round(60 / mpp)] * mpp
        discs = [(x - cx) ** 2 + (y - 20) ** 2 < 8**2 for cx in (20, 34)]
        return discs[0] | discs[1]

    for mpp in (0.25, 0.5, 1.0):
        assert len(np.unique(objects.watershed(touching_discs(mpp), mpp=mpp))) == 1 + 2
    # A window of a fixed number of pixels finds the middle of a large object in several places.
    y, x = np.mgrid[:400, :400] * 0.1
    ragged = (np.abs(y - 20) < 4 + 0.3 * np.sin(x * 3)) & (np.abs(x - 20) < 8)
    assert len(np.unique(objects.watershed(ragged, mpp=0.1))) < len(
        np.unique(objects.watershed(ragged))
    )
