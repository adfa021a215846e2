"""Scenes in: `data.make(name, split, seed, device)` gives scenes, `.batch(start, size)` a batch.

A scene is a pure function of (dataset, split, seed, number), bitwise: alone, anywhere in a batch,
on CUDA. So there is no loader and no loader state, and generated scenes never repeat. To keep that
true, generators draw with `data.draws` and make images from + - *, comparisons, integer operations
and look-ups only: sin, cos and exp differ between devices, einsum may use TF32, and CUDA multiplies
by the rounded inverse of a Python number instead of dividing.

Axes: B scenes, E entities (0 is the background), N = E - 1 objects, S stencils, C H W image.
"""

import importlib
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from data import draws

SPLITS = ("train", "validation", "test")  # to fit, to choose, to report


class Batch(NamedTuple):
    """Scenes with their ground truth; sequences have a frame axis after B. Whether `present` means
    exists or visible, and how the entities are ordered, is in each generator's docstring."""

    image: Tensor  # (B, C, H, W) float32 in [0, 1]
    masks: Tensor | None  # (B, E, H, W) bool, exactly one entity per pixel, the topmost wins
    present: Tensor | None  # (B, E) bool, present[:, 0] True; None, as masks, where unknown
    factors: dict[str, Tensor]  # (B, E, ...): int64 classes, float32 the rest; absent and 0: zero
    coverage: Tensor | None = None  # (B, E, H, W) float32 in [0, 1], only where objects blend


class Scenes:
    """An endless list of scenes. Subclasses set the sizes and override `scenes`."""

    num_channels: int
    height: int
    width: int
    max_entities: int  # background included
    length: int = 1  # frames; of more than one, their axis comes after B

    def __init__(self, name: str, split: str, seed: int, device: str | torch.device):
        self.name, self.split, self.seed = name, split, seed
        self.device = torch.device(device)
        self.key = draws.make_key(name, split, seed)  # of all draws of these scenes

    @property
    def shape(self) -> tuple[int, int, int]:
        """C, H, W of the images."""
        return self.num_channels, self.height, self.width

    def batch(self, start: int, size: int) -> Batch:
        """Scenes start .. start+size-1. Raises ValueError for a negative start or size < 1."""
        if start < 0 or size < 1:
            raise ValueError(f"batch needs start >= 0 and size >= 1, not {start} and {size}")
        return self.scenes(torch.arange(start, start + size, device=self.device))

    def scenes(self, index: Tensor) -> Batch:
        """The scenes whose numbers are in `index`, int64 (B,) on `device`, in that order."""
        raise NotImplementedError


def stamp(stencils: Tensor, shape: Tensor, row: Tensor, col: Tensor, size: int) -> Tensor:
    """Place stencil `shape` with its top-left pixel at (row, col) of an empty size x size image.

    stencils (S, h, w) with a border of zeros; shape, row, col int64 (B, N) -> (B, N, size, size).
    """
    _, h, w = stencils.shape
    pixels = torch.arange(size, device=stencils.device) + 1  # + 1 for the border, where all else is
    y = (pixels - row[..., None]).clamp_(0, h - 1)  # (B, N, H)
    x = (pixels - col[..., None]).clamp_(0, w - 1)  # (B, N, W)
    line = (shape[..., None] * h + y) * w  # (B, N, H)
    return stencils.flatten()[line[..., None] + x[..., None, :]]  # (B, N, H, W)


def add_background(objects: Tensor) -> Tensor:
    """Zeros for entity 0 in front of the objects' values: (B, N, ...) -> (B, E, ...)."""
    return torch.nn.functional.pad(objects, [0, 0] * (objects.ndim - 2) + [1, 0])


def _late(path: str, *args: Any, **options: Any) -> Scenes:
    """The scenes of the class `path`, whose module is imported only now."""
    module, maker = path.split(".")
    return getattr(importlib.import_module(f"data.{module}"), maker)(*args, **options)


_mini = partial(_late, "mini_sprites.MiniSprites")
_mini_16 = partial(_mini, size=16, sprite=5, min_objects=2, max_objects=4)
_dsprites = partial(_late, "multi_dsprites.MultiDSprites")
_sprites = partial(_late, "blended_sprites.BlendedSprites")
_digits = partial(_late, "digits.MultiMNIST")
_moving = partial(_late, "moving_digits.MovingDigits")
_solids = partial(_late, "solids.Solids")

DATASETS: dict[str, partial[Scenes]] = {  # called with name, split, seed, device, **options
    "mini_sprites": partial(_mini, size=12, sprite=4, min_objects=2, max_objects=3),
    "mini_sprites_16": _mini_16,
    "mini_sprites_16_shaded": partial(_mini_16, shaded=True),
    "mini_sprites_16_same_color": partial(_mini_16, colors="same", touching=True),
    "mini_sprites_16_grey": partial(_mini_16, colors="grey", touching=True),
    "mini_tetrominoes": partial(_late, "tetrominoes.Tetrominoes", tile="flat", cell=2),
    "tetrominoes": partial(_late, "tetrominoes.Tetrominoes", tile="shaded", cell=5),
    "shapes": partial(_late, "shapes.Shapes"),
    "shapes_levels": partial(_late, "shapes.Shapes", levels=True),
    "multi_dsprites_binarized": partial(_dsprites, colors="binarized"),
    "multi_dsprites_colored_on_grayscale": partial(_dsprites, colors="colored_on_grayscale"),
    "multi_dsprites_colored_on_colored": partial(_dsprites, colors="colored_on_colored"),
    "sprites_3": partial(_sprites, size=64, max_objects=3),
    "sprites_8": partial(_sprites, size=64, max_objects=8),
    "sprites_3_32": partial(_sprites, size=32, max_objects=3),
    "sprites_8_32": partial(_sprites, size=32, max_objects=8),
    "solids_32": partial(_solids, size=32),
    "solids_48": partial(_solids, size=48),
    "solids_48_grey": partial(_solids, size=48, grey=True),
    "solids_64": partial(_solids, size=64),
    "solids_64_to_10": partial(_solids, size=64, max_objects=10),
    "multi_mnist": _digits,
    "multi_mnist_3": partial(_digits, min_objects=3, max_objects=3),
    "multi_mnist_small": partial(_digits, shrink=2.0, shrink_std=0.15),
    "multi_mnist_color": partial(_digits, colored=True),
    "moving_mnist": _moving,
    "moving_mnist_enter": partial(_moving, enter=True),
    "moving_mnist_leave": partial(_moving, leave=True),
    "moving_mnist_crossing": partial(_moving, crossing=1.0),
}
for _name in ("sprites_3", "sprites_8", "sprites_3_32", "sprites_8_32"):
    DATASETS[f"{_name}_scaled"] = partial(DATASETS[_name], scaled=True)
for _name in ("grey", "gradient", "grid", "noise"):
    DATASETS[f"multi_mnist_{_name}"] = partial(_digits, background=_name)


def make(
    name: str, split: str = "train", seed: int = 0, device: str | torch.device = "cpu",
    **options: Any,
) -> Scenes:
    """The scenes of a dataset, or of a file or folder of the user's own (data/files.py); `options`
    go to its class (`folder` of the digits). ValueError for an unknown name or split."""
    if split not in SPLITS:
        raise ValueError(f"unknown split {split!r}; choose from {', '.join(SPLITS)}")
    if name in DATASETS:
        return DATASETS[name](name, split, seed, device, **options)
    if any(mark in name for mark in "/\\.@") or (name and Path(name).exists()):
        return _late("files.FromDisk", name, split, seed, device, **options)
    raise ValueError(f"unknown dataset {name!r}; choose from {', '.join(DATASETS)}, or give a path")


def images(name: str, *args: Any, **options: Any) -> Scenes:
    """`make` for a model of single images: ValueError for sequences, too."""
    scenes = make(name, *args, **options)
    if scenes.length > 1:
        raise ValueError(f"{name}: sequences, and this model takes single images")
    return scenes
