"""A contact sheet of any data set: python -m data [NAME or PATH]. Without one, a list of them."""

import sys
from pathlib import Path
from typing import Literal

import torch
import tyro
from matplotlib.colors import to_rgb
from torch import Tensor
from tyro.conf import Positional

import data
from data import figures

PAIRS = 4  # scenes in a row, masks beside images where they are known


def main(
    dataset: Positional[str] = "",
    split: Literal["train", "validation", "test"] = "train",
    seed: int = 0,
    count: int = 12,
    out: str = "",
) -> None:
    """Draws scenes of a data set, masks beside images.

    Args:
        dataset: a name, a file or a folder (data/files.py); none: list the names.
        split: train, validation or test.
        seed: of the scenes.
        count: how many scenes, from number 0.
        out: the PNG to write; empty: NAME-SPLIT.png, here.
    """
    if not dataset:
        return list_datasets()
    if count < 1:
        raise ValueError(f"--count must be at least 1, not {count}")
    scenes = data.make(dataset, split, seed)
    batch = scenes.batch(0, count)
    if batch.image.ndim == 5:  # sequences: the first `count` frames, one after the other
        batch = data.Batch(*(v.flatten(0, 1)[:count] for v in batch[:3]), batch.factors)
    panels = [batch.image.expand(-1, 3, -1, -1)]
    if batch.masks is not None:
        panels.append(paint(batch.masks))
    width = min(count, PAIRS) * len(panels)
    images = torch.stack(panels, 1).flatten(0, 1)  # (B or 2 B, 3, H, W)
    blank = torch.ones(-len(images) % width, *images.shape[1:])
    images = torch.cat([images, blank]).unflatten(0, (-1, width))
    path = Path(out or f"{Path(dataset).name}-{split}.png")
    figures.grid(path, images, f"{dataset}, {split}, seed {seed}",
                 apart=range(len(panels), width, len(panels)))  # fmt: skip
    print(f"{path}: scenes 0 to {count - 1} of {dataset}, {split}, seed {seed}")
    print(describe(scenes) + f"; factors: {', '.join(batch.factors) or 'none'}")


def paint(masks: Tensor) -> Tensor:
    """Masks (B, E, H, W) in the colours of the other figures, (B, 3, H, W)."""
    entities = range(masks.shape[1])
    colors = [figures.BACKGROUND] + [figures.PALETTE[e % len(figures.PALETTE)] for e in entities]
    return torch.tensor([to_rgb(c) for c in colors])[masks.long().argmax(1)].movedim(3, 1)


def describe(scenes: data.Scenes) -> str:
    shape = f"{scenes.num_channels} x {scenes.height} x {scenes.width}"
    objects = f"up to {scenes.max_entities - 1} objects" if scenes.max_entities else "no masks"
    return f"{shape}, {objects}"


def list_datasets() -> None:
    for name in data.DATASETS:
        scenes = data.make(name)
        summary = sys.modules[type(scenes).__module__].__doc__.split("\n")[0]
        print(f"{name:36}{describe(scenes):32}{summary}")


if __name__ == "__main__":
    try:
        tyro.cli(main, prog="python -m data")
    except (ValueError, OSError) as error:
        print(f"data: {error}", file=sys.stderr)
        sys.exit(2)
