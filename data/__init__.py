"""Scenes in: `data.make(name, split, seed, device)` gives scenes, `.batch(start, size)` a batch.

A scene is a pure function of (dataset, split, seed, number), bitwise: alone, anywhere in a batch,
on CUDA (`solids` there to 1e-4). So there is no loader and no loader state, and generated scenes
never repeat. To keep that true, generators draw with `data.draws` and make images from operations
that are rounded alike everywhere: not sin, cos, exp; no einsum, which may use TF32; no division by
a Python number, as CUDA multiplies by its rounded inverse.

Axes: B scenes, E entities (0 is the background), N = E - 1 objects, C H W image.
"""

import importlib
import math
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
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

    num_channels: int = 3
    height: int
    width: int
    max_entities: int  # background included
    length: int = 1  # frames; of more than one, their axis comes after B
    count: float = math.inf  # scenes of the split, before they come again

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


def make_batch(image: Tensor, inside: Tensor, factors: dict[str, Tensor],
               exists: Tensor | None = None, coverage: Tensor | None = None) -> Batch:
    """A batch from what is known of its objects; the background becomes entity 0.

    inside (B, N, H, W) bool, exclusive; factors (B, N, ...), whatever they are for absent objects;
    exists (B, N) bool, by default of those that are visible. Frames may come after B everywhere.
    """
    masks = torch.cat([~inside.any(-3, keepdim=True), inside], -3)  # (B, E, H, W)
    exists = inside.flatten(-2).any(-1) if exists is None else exists
    known = {}
    for name, value in factors.items():
        more = value.ndim - exists.ndim
        value = value * exists.reshape(exists.shape + (1,) * more)
        known[name] = F.pad(value, [0, 0] * more + [1, 0])  # (B, E, ...)
    return Batch(image, masks, F.pad(exists, [1, 0], value=True), known, coverage)


MINI_16 = dict(size=16, sprite=5, max_objects=4)
HELD_OUT = MINI_16 | dict(shaded=True, exclude=(1, 1))  # green discs: in the test split alone
DATASETS: dict[str, tuple[str, dict[str, Any]]] = {  # name: (module.class, its options)
    "mini_sprites": ("mini_sprites.MiniSprites", {}),
    "mini_sprites_16_shaded": ("mini_sprites.MiniSprites", MINI_16 | dict(shaded=True)),
    "mini_sprites_16_same_color": ("mini_sprites.MiniSprites", MINI_16 | dict(same_color=True)),
    "mini_sprites_16_held_out": ("mini_sprites.MiniSprites", HELD_OUT),
    "mini_tetrominoes": ("tetrominoes.Tetrominoes", dict(tile="flat")),
    "mini_tetrominoes_distinct": ("tetrominoes.Tetrominoes", dict(tile="flat", distinct=True)),
    "tetrominoes": ("tetrominoes.Tetrominoes", {}),
    "tetrominoes_distinct": ("tetrominoes.Tetrominoes", dict(distinct=True)),
    "shapes": ("shapes.Shapes", {}),
    "shapes_levels": ("shapes.Shapes", dict(levels=True)),
    "multi_dsprites_binarized": ("multi_dsprites.MultiDSprites", dict(colors="white")),
    "multi_dsprites_levels": ("multi_dsprites.MultiDSprites", dict(colors="grey")),
    "multi_dsprites_colored_on_grayscale": ("multi_dsprites.MultiDSprites", {}),
    "sprites_3": ("blended_sprites.BlendedSprites", dict(size=64, max_objects=3)),
    "sprites_8": ("blended_sprites.BlendedSprites", dict(size=64, max_objects=8)),
    "sprites_3_32": ("blended_sprites.BlendedSprites", dict(size=32, max_objects=3)),
    **{f"solids_{size}": ("solids.Solids", dict(size=size)) for size in (32, 48)},
    "multi_mnist": ("digits.MultiMNIST", {}),
    "multi_mnist_3": ("digits.MultiMNIST", dict(min_objects=3, max_objects=3)),
    **{f"multi_mnist_{background}": ("digits.MultiMNIST", dict(background=background))
       for background in ("gradient", "grid", "noise")},
    "moving_mnist": ("moving_digits.MovingDigits", {}),
    **{f"moving_mnist_{e}": ("moving_digits.MovingDigits", {e: True}) for e in ("enter", "leave")},
    "moving_mnist_crossing": ("moving_digits.MovingDigits", dict(crossing=1.0)),
}


def make(name: str, split: str = "train", seed: int = 0, device: str | torch.device = "cpu",
         **options: Any) -> Scenes:
    """The scenes of a dataset, or of a file or folder of the user's own (data/files.py); `options`
    go to its class (`folder` of the digits). ValueError for an unknown name or split."""
    if split not in SPLITS:
        raise ValueError(f"unknown split {split!r}; choose from {', '.join(SPLITS)}")
    paths = name, name.rpartition("@")[0]  # with and without the size to which images are cut
    if name not in DATASETS and not any(path and Path(path).exists() for path in paths):
        raise ValueError(f"unknown dataset {name!r}: no file or folder, and none of the names "
                         + ", ".join(DATASETS))  # fmt: skip
    path, preset = DATASETS.get(name, ("files.FromDisk", {}))
    module, maker = path.split(".")
    maker = getattr(importlib.import_module(f"data.{module}"), maker)  # imported only now
    return maker(name, split, seed, device, **preset | options)


def images(name: str, *args: Any, **options: Any) -> Scenes:
    """`make` for a model of single images: ValueError for sequences, too."""
    scenes = make(name, *args, **options)
    if scenes.length > 1:
        raise ValueError(f"{name}: sequences, and this model takes single images")
    return scenes
