"""The smallest model that data/runs.py can train: what a run promises is tested through it."""

import math
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor, nn

import data
from data import draws, runs


@dataclass
class Config(runs.RunConfig):
    """A linear map from colours to colours."""

    dataset: str = "mini_sprites"  # one of data.DATASETS
    sizes: tuple[int, ...] = (3, 4)  # hidden layers
    bias: bool = True  # of every layer
    nan_steps: tuple[int, ...] = ()  # steps whose loss is not a number


PRESETS = {"quick": dict(steps=6, batch_size=4, lr=0.01, log_every=1), "long": dict(steps=100)}


class Toy(nn.Module):
    def __init__(self, config: Config):
        super().__init__()
        sizes = (3, *config.sizes, 3)
        self.layers = nn.Sequential(
            *(nn.Linear(i, o, config.bias) for i, o in pairwise(sizes))
        )
        self.free = nn.Parameter(torch.ones(2))  # in the second group
        self.unused = nn.Parameter(torch.ones(2))  # has no gradient

    def loss(self, image: Tensor, noise: Tensor, weight: Tensor) -> dict[str, Tensor]:
        colors = image.movedim(1, -1)
        error = (self.layers(colors + 0.1 * noise) - colors).square().mean()
        return dict(loss=error * weight + self.free.square().sum(), mse=error, decoded=colors)


def build(config: Config) -> Toy:
    torch.manual_seed(config.seed)
    return Toy(config)


def learning_rate(config: Config, step: int) -> float:
    return config.lr * 0.9**step


def evaluate(model: Toy, scenes: data.Scenes) -> dict:
    with torch.no_grad():
        parts = model.loss(scenes.batch(0, 4).image, torch.zeros(1), torch.ones(()))
    value = parts["mse"].item()
    return dict(metrics=dict(mse=dict(mean=value if math.isfinite(value) else None, n=4)))


def draw(model: Toy, scenes: data.Scenes, folder: Path, results: dict) -> None:
    (folder / "picture.png").write_bytes(b"")


def train(config: Config) -> dict:
    runs.check(config)
    device = runs.set_up(config)
    scenes = data.make(config.dataset, "train", config.seed, device)
    model = build(config).to(device)
    groups = [dict(params=[*model.layers.parameters(), model.unused])]
    optimizer = torch.optim.Adam([*groups, dict(params=[model.free], lr=0.5)])
    run = runs.start("toy", config, PRESETS, model, optimizer, title="Toy",
                     compiled=(model.layers,))
    for step, index in run.steps():
        batch = scenes.scenes(index)
        noise = draws.normal(draws.make_key("toy", config.seed), index, (12, 12, 3))
        weight = torch.tensor(math.nan if step in config.nan_steps else 1.0)
        parts = run.update(model.loss, batch.image, noise, weight,
                           lr=learning_rate(config, step), clip=1.0)
        if run.due(step):
            run.log(parts, brightness=batch.image.mean())
    test = data.make(config.dataset, "test", config.seed, device)
    return run.finish(test, evaluate, draw, show=("mse",), picture="picture.png")


def make_config(preset: str = "quick", **overrides: object) -> Config:
    return runs.make_config(Config, PRESETS, preset, **overrides)


def load_model(path: str | Path) -> Toy:
    return runs.load_model(path, "toy", Config, build)


if __name__ == "__main__":
    runs.main("toy", Config, PRESETS, train)
