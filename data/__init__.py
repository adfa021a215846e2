"""Scenes in: `data.make(name, split, seed, device)` gives scenes, `.batch(start, size)` a batch.

A scene is a pure function of (dataset, split, seed, number), bitwise: alone, anywhere in a batch,
on CUDA. So there are no files, no loader and no loader state, and training data never repeats.
To keep that true, generators draw with `data.draws` and make images from + - *, comparisons,
integer operations and table look-ups only: sin, cos and exp differ between devices, einsum may use
TF32, and CUDA turns division by a Python number into multiplication by its rounded inverse.

Axes: B scenes, E entities (0 is the background), N = E - 1 objects, S stencils, C H W image.
"""

import importlib
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from data import draws

SPLITS = ("train", "validation", "test")  # to fit, to choose, to report


class Batch(NamedTuple):
    """Scenes with their ground truth. Whether `present` means exists or visible, and how the
    entities are ordered, is in each generator's docstring."""

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

    def __init__(self, name: str, split: str, seed: int, device: str | torch.device):
        self.name, self.split, self.seed = name, split, seed
        self.device = torch.device(device)
        self.key = draws.make_key(name, split, seed)  # of all draws of these scenes

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

    stencils (S, h, w) with a border of zeros one pixel wide, which is where everything outside of
    the stencil is looked up; shape, row, col int64 (B, N) -> (B, N, size, size).
    """
    _, h, w = stencils.shape
    pixels = torch.arange(size, device=stencils.device) + 1  # + 1 for the border
    y = (pixels - row[..., None]).clamp_(0, h - 1)  # (B, N, H)
    x = (pixels - col[..., None]).clamp_(0, w - 1)  # (B, N, W)
    line = (shape[..., None] * h + y) * w  # (B, N, H)
    return stencils.flatten()[line[..., None] + x[..., None, :]]  # (B, N, H, W)


def add_background(objects: Tensor) -> Tensor:
    """Zeros for entity 0 in front of the objects' values: (B, N, ...) -> (B, E, ...)."""
    return F.pad(objects, [0, 0] * (objects.ndim - 2) + [1, 0])


def _factory(module: str, maker: str, **options) -> Callable[..., Scenes]:
    """A constructor whose module is imported when it is first called."""

    def construct(
        name: str, split: str, seed: int, device: str | torch.device, **more: Any
    ) -> Scenes:
        make_scenes = getattr(importlib.import_module(f"data.{module}"), maker)
        return make_scenes(name, split, seed, device, **options | more)

    return construct


_mini = partial(_factory, "mini_sprites", "MiniSprites")
_mini_16 = partial(_mini, size=16, sprite=5, min_objects=2, max_objects=4)
_tetrominoes = partial(_factory, "tetrominoes", "Tetrominoes")
_dsprites = partial(_factory, "multi_dsprites", "MultiDSprites")
_sprites = partial(_factory, "blended_sprites", "BlendedSprites")
_digits = partial(_factory, "digits", "MultiMNIST")

# name -> constructor(name, split, seed, device, **options)
DATASETS: dict[str, Callable[..., Scenes]] = {
    "mini_sprites": _mini(size=12, sprite=4, min_objects=2, max_objects=3),
    "mini_sprites_16": _mini_16(),
    "mini_sprites_16_shaded": _mini_16(shaded=True),
    "mini_sprites_16_same_color": _mini_16(colors="same", touching=True),
    "mini_sprites_16_grey": _mini_16(colors="grey", touching=True),
    "mini_tetrominoes": _tetrominoes(tile="flat", cell=2),
    "tetrominoes": _tetrominoes(tile="shaded", cell=5),
    "shapes": _factory("shapes", "Shapes"),
    "multi_dsprites_binarized": _dsprites(colors="binarized"),
    "multi_dsprites_colored_on_grayscale": _dsprites(colors="colored_on_grayscale"),
    "multi_dsprites_colored_on_colored": _dsprites(colors="colored_on_colored"),
    "sprites_3": _sprites(size=64, max_objects=3),
    "sprites_8": _sprites(size=64, max_objects=8),
    "sprites_3_32": _sprites(size=32, max_objects=3),
    "sprites_8_32": _sprites(size=32, max_objects=8),
    "sprites_3_scaled": _sprites(size=64, max_objects=3, scaled=True),
    "sprites_8_scaled": _sprites(size=64, max_objects=8, scaled=True),
    "sprites_3_32_scaled": _sprites(size=32, max_objects=3, scaled=True),
    "sprites_8_32_scaled": _sprites(size=32, max_objects=8, scaled=True),
    "multi_mnist": _digits(),
    "multi_mnist_3": _digits(min_objects=3, max_objects=3),
    "multi_mnist_small": _digits(shrink=2.0, shrink_std=0.15),
    "multi_mnist_color": _digits(colored=True),
    "multi_mnist_grey": _digits(background="grey"),
    "multi_mnist_gradient": _digits(background="gradient"),
    "multi_mnist_grid": _digits(background="grid"),
    "multi_mnist_noise": _digits(background="noise"),
}


def make(
    name: str, split: str = "train", seed: int = 0, device: str | torch.device = "cpu",
    **options: Any,
) -> Scenes:
    """The scenes of a dataset, or of a file or folder of the user's own (data/files.py).

    `options` go to its class (`folder` of the digits, `size` of files, for instance). Raises
    ValueError, in one line, for an unknown name or split.
    """
    if split not in SPLITS:
        raise ValueError(f"unknown split {split!r}; choose from {', '.join(SPLITS)}")
    if name in DATASETS:
        return DATASETS[name](name, split, seed, device, **options)
    if any(mark in name for mark in "/\\.@") or (name and Path(name).exists()):
        return _factory("files", "FromDisk")(name, split, seed, device, **options)
    raise ValueError(f"unknown dataset {name!r}; choose from {', '.join(DATASETS)}, or give a path")
