"""Moving digits: the contract with a frame axis, motion, crossings, entering and leaving.

Seeds are fixed, so a statistical bound that holds once always holds."""

import functools
import itertools

import numpy as np
import pytest
import results
import test_data
import torch
from scipy import stats
from test_data import UNSURE, is_uniform
from test_digits import box_of

import data
from data.moving_digits import MovingDigits

names = pytest.mark.parametrize("name", [n for n in data.DATASETS if n.startswith("moving")])
sample = functools.partial(test_data.sample, size=1024)
UNSEEN = -1000  # a place of a digit that is not there


@functools.cache
def frames(name: str, size: int = 128) -> np.ndarray:
    """(n, T, N, 4): the bounding boxes of whatever a digit draws."""
    drawn = sample(name).coverage[:size, :, 1:].numpy() > 0
    boxes = [box_of(d) if d.any() else (UNSEEN,) * 4 for d in drawn.reshape(-1, *drawn.shape[-2:])]
    return np.array(boxes).reshape(*drawn.shape[:3], 4)


@names
def test_contract(name):
    scenes, (image, masks, present, factors, coverage) = data.make(name), sample(name)
    assert (scenes.num_channels, scenes.width, scenes.max_entities, scenes.length) == (1, 50, 3, 10)
    n = len(image)
    assert image.shape == (n, 10, 1, 50, 50) and image.dtype == torch.float32
    assert image.min() == 0 and image.max() == 1
    assert masks.shape == coverage.shape == (n, 10, 3, 50, 50)
    assert masks.dtype == torch.bool and (masks.sum(2) == 1).all()
    assert present.shape == (n, 10, 3) and present[..., 0].all()
    assert torch.equal(present[..., 1:], coverage[:, :, 1:].flatten(3).any(3))
    for key, value in factors.items():
        assert value.shape[:3] == (n, 10, 3), key
        whole = torch.int64 if key == "label" else torch.float32
        assert value.dtype == whole, key
        assert not value[:, :, 0].any() and not value[~present].any(), key
    assert factors.keys() == {"label", "box", "row", "col", "size"}


@names
def test_image_masks_and_coverage_agree(name):
    image, masks, _, _, coverage = sample(name)
    light = coverage[:, :, 1:].numpy()
    assert np.array_equal(image[:, :, 0].numpy(), np.minimum(light[:, :, 0] + light[:, :, 1], 1))
    assert torch.equal(coverage[:, :, 0], 1 - image[:, :, 0])
    bright, lighter = light >= 0.25, light[:, :, 0] >= light[:, :, 1]
    owner = np.where(bright[:, :, 0] & lighter, 1, np.where(bright[:, :, 1], 2, 0))
    assert np.array_equal(masks.long().argmax(2).numpy(), owner)


@names
def test_an_identity_is_one_digit_that_only_moves(name):
    """Its label, size and picture stay: frame t is frame 0's picture, shifted by whole pixels."""
    _, _, present, factors, coverage = sample(name)
    place = frames(name)
    for b, e in itertools.product(range(64), (1, 2)):
        (there,) = np.nonzero(present[b, :, e].numpy())
        if len(there) == 0:
            continue
        assert (np.diff(there) == 1).all()  # it comes once and goes once
        assert all(len(factors[k][b, there, e].unique()) == 1 for k in ("label", "size"))
        light, (top, left, *_) = coverage[b, :, e].numpy(), place[b, there[0], e - 1]
        for t in there:
            row, col, height, width = place[b, t, e - 1]
            shifted = np.roll(light[there[0]], (row - top, col - left), (0, 1))
            assert np.array_equal(light[t], shifted)
            assert min(row, col) >= 0 and row + height <= 50 and col + width <= 50
            ink = box_of(light[t] >= 0.25)
            assert factors["box"][b, t, e].tolist() == list(ink)
            assert factors["row"][b, t, e] == ink[0] + ink[2] / 2
            assert factors["col"][b, t, e] == ink[1] + ink[3] / 2


@names
def test_velocities_are_whole_constant_and_reflected(name):
    """A digit's next place is the last one plus the last step, mirrored where that is outside."""
    corners, room = frames(name)[..., :2], 50 - frames(name)[..., 2:]
    steps, there = np.diff(corners, axis=1), (corners >= 0).all(-1)
    assert abs(steps[there[:, 1:] & there[:, :-1]]).max() == 3
    for b, t, e, axis in np.ndindex(len(corners), 8, 2, 2):
        if there[b, t : t + 3, e].all():
            last, wall = corners[b, t + 1, e, axis], room[b, t + 1, e, axis]
            free = last + steps[b, t, e, axis]
            # After a reflection between the two frames the speed is not that of the last step.
            near = min(last, wall - last) < 3
            assert near or corners[b, t + 2, e, axis] == min(abs(free), 2 * wall - free)


def test_number_start_and_velocity_are_uniform():
    present, corners = sample("moving_mnist").present[:, 0, 1:], frames("moving_mnist", 1024)
    assert is_uniform(present.sum(1), 3)
    assert (sample("moving_mnist").present[:, :1] == sample("moving_mnist").present).all()
    alone = corners[present.sum(1).numpy() == 1, :, 0]  # (n, T, 4)
    dither = np.random.default_rng(0).random((len(alone), 2))
    u = (alone[:, 0, :2] + dither) / (51 - alone[:, 0, 2:])
    assert all(stats.kstest(u[:, axis], "uniform").pvalue > UNSURE for axis in (0, 1))
    inside = (alone[:, 0, :2] >= 3) & (alone[:, 0, :2] <= 47 - alone[:, 0, 2:])
    velocity = (alone[:, 1] - alone[:, 0])[inside.all(1), :2] + 3  # no wall within a step
    assert is_uniform(torch.from_numpy(velocity @ [7, 1]), 49)


def overlap(boxes: np.ndarray) -> np.ndarray:
    """Whether the two frames of (..., 2, 4) overlap."""
    a, b = boxes[..., 0, :], boxes[..., 1, :]
    gaps = np.maximum(b - a - a[..., [2, 3] * 2], a - b - b[..., [2, 3] * 2])[..., :2]
    return (gaps < 0).all(-1)


def test_digits_are_apart_where_they_come_and_may_overlap_later():
    there = (frames("moving_mnist_enter")[..., 0] >= 0).all(2)  # (n, T)
    for b in np.flatnonzero(there.any(1)):
        assert not overlap(frames("moving_mnist_enter")[b, there[b].argmax()])
    both = frames("moving_mnist")[(frames("moving_mnist")[:, 0, :, 0] >= 0).all(1)]
    assert not overlap(both[:, 0]).any() and 0.1 < overlap(both).any(1).mean() < 0.9


def test_enter_and_leave():
    came = sample("moving_mnist_enter").present[:, :, 1:].int()
    assert (came.diff(dim=1) >= 0).all() and (came.sum(1)[:, 0] <= 10).all()
    assert is_uniform(10 - came[:, :, 0].sum(1)[came[:, -1, 0] == 1], 10)  # the first digit
    gone = sample("moving_mnist_leave").present[:, :, 1:].int()
    assert (gone.diff(dim=1) <= 0).all()
    assert is_uniform(gone[:, :, 0].sum(1)[gone[:, 0, 0] == 1] - 1, 10)


@pytest.mark.parametrize("length", [6, 10])
def test_crossing(length):
    """Two digits, apart at first; in the middle their centres agree to half a pixel."""
    scenes = MovingDigits("x", length=length, crossing=1.0)
    drawn = scenes.batch(0, 200).coverage[:, :, 1:].numpy() > 0
    place = np.array([box_of(d) for d in drawn.reshape(-1, 50, 50)]).reshape(200, length, 2, 4)
    assert not overlap(place[:, 0]).any()
    centre = place[..., :2] + place[..., 2:] / 2
    distance = abs(centre[:, :, 0] - centre[:, :, 1]).max(-1)  # (n, T)
    middle = distance[:, length // 2 : length // 2 + 2]
    assert (middle.min(1) <= 0.5).all() and len(set(middle.argmin(1))) == 2
    mixed = MovingDigits("x", crossing=0.5).batch(0, 512).present[:, 0, 1:].sum(1)
    share = (mixed == 2).double().mean().item()  # half, and a third of the other half
    assert abs(share - 2 / 3) < 4 * (2 / 9 / 512) ** 0.5


def test_floor_counts_frames(monkeypatch):
    monkeypatch.setattr(results, "COUNT_IMAGES", 3200)  # 320 sequences
    scenes = data.make("moving_mnist_leave", "test")
    score = results.dataset_floors(scenes)["floors"]["most_frequent_count"]["count_accuracy"]
    train, test = (part.batch(0, 320).present[..., 1:].sum(2)
                   for part in (data.make("moving_mnist_leave"), scenes))
    share = (test == train.flatten().bincount().argmax()).double().mean().item()
    assert score["n"] == 320 and score["mean"] == pytest.approx(share)


@pytest.mark.parametrize(("options", "words"), [
    (dict(length=0), "0 frames"), (dict(speed=11), "11 pixels"), (dict(crossing=1.5), "1.5"),
    (dict(length=5, crossing=1.0), "too few to cross"), (dict(enter=True, crossing=0.1), "neither"),
])  # fmt: skip
def test_bad_requests(options, words):
    with pytest.raises(ValueError, match=words):
        MovingDigits("x", **options)


def test_one_frame():
    batch = MovingDigits("x", length=1, enter=True, leave=True).batch(0, 64)
    assert batch.image.shape == (64, 1, 1, 50, 50)
