"""Scores of IODINE on scenes unlike those of training (Greff et al. 2019, section 4.2, figs 7, 9).

    python notebooks/generalise.py notebooks/weights/iodine-quick.pt runs/iodine-quick-held-out-1

adds to results/iodine-generalisation.json, of each checkpoint, and writes of what learns nothing:

    unseen, seen   scenes of mini_sprites_16_held_out with and without a green disc. Its training
                   scenes have discs, and green objects, and no green disc.
    objects        of the former the green discs and the others, each matched with a slot: IoU,
                   squared error on the object's pixels, and how often linear maps read its shape
                   and colour off the slot. They are fitted to objects of the scenes without.
    numbers        scenes of 2 to 7 objects, where training has 2 to 4, with the trained number of
                   slots and with MORE. Where an object finds no place the scene is left out.

Axes: B scenes, E entities, K slots, N objects, D latent.
"""

import json
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import results  # before those of the repository's root, which it adds to the path
import torch
from sklearn.linear_model import LogisticRegression
from torch import Tensor

import data
import iodine
from data import checkpoints, metrics, runs

COUNT = results.FLOOR_SCENES  # of each kind
NUMBERS = range(2, 8)  # objects
MORE = 10  # slots
SCORES = "ari_fg", "miou", "mse", "kl"


def is_held_out(batch: data.Batch) -> Tensor:
    """Which entities are what training has not shown: (B, E) bool."""
    shape, color_id = data.HELD_OUT["exclude"]
    factors = batch.factors
    return batch.present & (factors["shape"] == shape) & (factors["color_id"] == color_id)


def select(scenes: data.Scenes, wanted: Callable[[data.Batch], Tensor]) -> data.Scenes:
    """The scenes for which wanted(batch) (B,) is True, COUNT of them, numbered from 0."""
    every, numbers, part = scenes.scenes, torch.empty(0, dtype=torch.int64), torch.arange(1024)
    while len(numbers) < COUNT:
        numbers, part = torch.cat([numbers, part[wanted(every(part))]]), part + len(part)
    scenes.scenes = lambda index: every(numbers[:COUNT][index])
    return scenes


def with_pair(unseen: bool) -> data.Scenes:
    """Test scenes that have a green disc, or none."""
    scenes = data.make("mini_sprites_16_held_out", "test")
    return select(scenes, lambda batch: is_held_out(batch).any(1) == unseen)


def crowd(number: int) -> data.Scenes:
    """Test scenes of `number` objects, each placed as in training."""
    scenes = data.make("mini_sprites_16_shaded", "test")
    scenes.min_objects, scenes.max_objects, scenes.max_entities = number, number, number + 1
    last = scenes.size - scenes.sprite  # an object without a place is put below it
    return select(scenes, lambda batch: (batch.factors["row"] <= last).all(1))


def object_iou(masks: Tensor, predicted: Tensor) -> tuple[Tensor, Tensor]:
    """The slot of each entity, -1: none, and their IoU, (B, E) both; arguments: `metrics.match`."""
    slots = metrics.match(masks, predicted)
    segments = (predicted * 1.0).argmax(1)[:, None] == slots[..., None, None]  # (B, E, H, W)
    return slots, (segments & masks).sum((2, 3)) / (segments | masks).sum((2, 3)).clamp(min=1)


def find_objects(model: iodine.IODINE, scenes: data.Scenes) -> dict[str, Tensor]:
    """Of all objects (N,): held_out, iou, mse, shape, color_id; latents of their slots (N, D)."""
    found: dict[str, list] = {}
    for index in torch.arange(COUNT).split(32):
        batch = scenes.scenes(index)
        last = model.infer(batch.image, model.noise(scenes, index))[-1]
        mean, masks, _ = iodine.reconstruct(last.decoded)
        slots, iou = object_iou(batch.masks, masks)
        error = ((mean - batch.image).square().mean(1, keepdim=True) * batch.masks).sum((2, 3))
        values = dict(
            held_out=is_held_out(batch), iou=iou, mse=error / batch.masks.sum((2, 3)),
            latents=model.posterior(last.posterior)[0][torch.arange(len(slots))[:, None], slots],
            shape=batch.factors["shape"], color_id=batch.factors["color_id"])  # fmt: skip
        for name, value in values.items():  # (B, E, ...) without the background and what is absent
            found.setdefault(name, []).append(value[:, 1:][batch.present[:, 1:]])
    return {name: torch.cat(value) for name, value in found.items()}


def object_scores(fitted: dict[str, Tensor], scored: dict[str, Tensor]) -> dict[str, Any]:
    """Of held-out objects and of the others: iou, mse, and accuracy of shape and color_id, which
    is 0 for an object without a slot."""
    values, owned = {name: scored[name] for name in ("iou", "mse")}, fitted["iou"] > 0
    for name in ("shape", "color_id"):
        linear = LogisticRegression(max_iter=1000)
        linear.fit(fitted["latents"][owned], fitted[name][owned])
        right = torch.from_numpy(linear.predict(scored["latents"])) == scored[name]
        values[name] = right & (scored["iou"] > 0)
    parts = dict(held_out=scored["held_out"], others=~scored["held_out"])
    return {label: {name: metrics.mean_stderr(value[part]) for name, value in values.items()}
            for label, part in parts.items()}


def object_floors(scenes: data.Scenes) -> dict[str, Any]:
    """IoU of held-out objects and of others with the segments of what learns nothing."""
    found: dict[str, dict[str, list]] = {}
    for i in range(COUNT):
        batch = scenes.batch(i, 1)
        held_out = is_held_out(batch)[0]
        for name, segments in results.no_learning(batch.image[0], scenes.max_entities, i).items():
            iou = object_iou(batch.masks, torch.from_numpy(segments))[1][0]
            floor = found.setdefault(name, dict(held_out=[], others=[]))
            floor["held_out"] += iou[held_out].tolist()
            floor["others"] += iou[1:][(batch.present[0] & ~held_out)[1:]].tolist()
    return {name: {label: metrics.mean_stderr(values) for label, values in floor.items()}
            for name, floor in found.items()}


def scores(model: iodine.IODINE, scenes: data.Scenes, num_slots: int) -> dict[str, Any]:
    steps = model.config.test_steps or model.config.num_steps
    found = iodine.score(model, scenes, steps, num_slots, COUNT)[-1]
    return {name: found[name] for name in SCORES}


def generalise(model: iodine.IODINE, pairs: dict[str, data.Scenes],
               crowds: dict[int, data.Scenes]) -> dict[str, Any]:
    """What stands in the file under the name of a checkpoint, but the command."""
    slots = model.config.num_slots
    unseen, seen = (find_objects(model, pairs[name]) for name in ("unseen", "seen"))
    return dict(
        num_slots=slots, seed=model.config.seed,
        **{name: scores(model, scenes, slots) for name, scenes in pairs.items()},
        objects=object_scores(seen, unseen),
        numbers=[dict(objects=number, num_slots=k, metrics=scores(model, scenes, k))
                 for number, scenes in crowds.items() for k in (slots, MORE)])  # fmt: skip


def main(paths: list[str]) -> None:
    networks = {path: iodine.load_model(path) for path in paths}
    pairs = dict(unseen=with_pair(True), seen=with_pair(False))
    crowds = {number: crowd(number) for number in NUMBERS}
    kinds = pairs | {f"{number} objects": scenes for number, scenes in crowds.items()}
    floors = {name: results.dataset_floors(scenes)["floors"] for name, scenes in kinds.items()}
    file = results.RESULTS / "iodine-generalisation.json"
    models = json.loads(file.read_text())["models"] if file.exists() else {}
    for path, model in networks.items():
        command = shlex.join(["python", "notebooks/generalise.py", path])
        run = Path(path).parent if Path(path).name == "checkpoint.pt" else Path(path)
        models[run.stem] = dict(command=command) | generalise(model, pairs, crowds)
    checkpoints.write_json(file, dict(scenes=COUNT, floors=floors, models=models,
                                      object_floors=object_floors(pairs["unseen"])))


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except runs.UserError as error:
        print(f"generalise.py: {error}", file=sys.stderr)
        sys.exit(2)
