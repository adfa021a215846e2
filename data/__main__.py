"""A contact sheet of any data set: python -m data [NAME or PATH]. Without one, a list of them."""

import itertools
import sys
from pathlib import Path
from typing import Literal

import tyro
from tyro.conf import Positional

import data
from data import figures, runs


def main(
    dataset: Positional[str] = "",
    split: Literal["train", "validation", "test"] = "train",
    seed: int = 0,
    count: int = 16,
    out: str = "",
) -> None:
    """Draws scenes of a data set, masks below images.

    Args:
        dataset: a name, a file or a folder (data/files.py); none: list the names.
        split: train, validation or test.
        seed: of the scenes.
        count: how many scenes, from number 0; of sequences, how many frames.
        out: the PNG to write; empty: NAME-SPLIT.png, here.
    """
    if not dataset:
        return list_datasets()
    scenes = data.make(dataset, split, seed)
    image, masks, _, factors, _ = scenes.batch(0, -(-count // scenes.length))
    if scenes.length > 1:
        image, masks = (value.flatten(0, 1)[:count] for value in (image, masks))
    path = Path(out or f"{Path(dataset).name}-{split}.png")
    figures.samples(path, image, f"{dataset}, {split}, seed {seed}", masks)
    print(f"{path}: {describe(scenes)}; factors: {', '.join(factors) or 'none'}")


def describe(scenes: data.Scenes) -> str:
    objects = f"up to {scenes.max_entities - 1} objects" if scenes.max_entities else "no masks"
    return f"{' x '.join(map(str, scenes.shape))}, {objects}"


def list_datasets() -> None:
    made = {name: data.make(name) for name in data.DATASETS}
    for module, names in itertools.groupby(made, lambda name: type(made[name]).__module__):
        print(sys.modules[module].__doc__.split("\n")[0])
        for name in names:
            print(f"  {name:36}{describe(made[name])}")


if __name__ == "__main__":
    try:
        tyro.cli(main, prog="python -m data")
    except (ValueError, OSError, runs.UserError) as error:
        print(f"data: {error}", file=sys.stderr)
        sys.exit(2)
