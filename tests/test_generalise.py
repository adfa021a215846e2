"""Scenes unlike those of training have what they should, and scores are of the right objects."""

import json
import subprocess
import sys
from types import SimpleNamespace

import generalise
import pytest
import results
import torch
from torch import Tensor

import data


@pytest.fixture(autouse=True)
def few(monkeypatch):
    monkeypatch.setattr(generalise, "COUNT", 40)


def green_discs(batch: data.Batch) -> Tensor:
    """By their names in the generator's docstring: shape 1, colour 1."""
    there = batch.present.clone()
    return there & (batch.factors["shape"] == 1) & (batch.factors["color_id"] == 1)


@pytest.mark.parametrize("unseen", [True, False])
def test_scenes_have_a_green_disc_or_none_and_training_has_none(unseen):
    batch = generalise.with_pair(unseen).batch(0, 40)
    assert (green_discs(batch).any(1) == unseen).all()
    every = data.make("mini_sprites_16_held_out", "test").batch(0, 1024)
    there = (green_discs(every).any(1) == unseen).nonzero()[:40, 0]
    assert torch.equal(batch.image, every.image[there])
    assert not green_discs(data.make("mini_sprites_16_held_out", "train").batch(0, 2048)).any()


@pytest.mark.parametrize("number", [2, 7])
def test_a_crowd_has_its_number_of_whole_objects(monkeypatch, number):
    monkeypatch.setattr(generalise, "COUNT", 200)  # of seven: one in six of the generator's
    batch = generalise.crowd(number).batch(0, 200)
    assert len(batch.image.flatten(1).unique(dim=0)) == 200
    assert (batch.present.sum(1) == number + 1).all() and (batch.masks.sum(1) == 1).all()
    places = torch.stack([batch.factors[name][:, 1:] for name in ("row", "col")], -1)
    assert places.min() >= 0 and places.max() <= 16 - 5
    apart = (places[:, :, None] - places[:, None]).abs().amax(-1)  # (B, N, N)
    assert (apart + 9 * torch.eye(number) >= 5).all()  # no two boxes overlap
    whole = {0: 25, 1: 21, 2: 17}  # pixels of a square, a disc, a triangle
    for shape, area in zip(batch.factors["shape"][:, 1:].flatten(),
                           batch.masks[:, 1:].sum((2, 3)).flatten(), strict=True):
        assert area == whole[int(shape)]


def test_object_iou():
    masks = torch.zeros(1, 4, 2, 4, dtype=torch.bool)
    masks[0, 0, 0], masks[0, 1, 1, :2], masks[0, 2, 1, 2:] = True, True, True  # and one is absent
    predicted = torch.zeros(1, 3, 2, 4)
    predicted[0, 2, 0], predicted[0, 0, 1, :3], predicted[0, 1, 1, 3] = 1, 1, 1
    slots, iou = generalise.object_iou(masks, predicted)
    assert slots.tolist() == [[2, 0, 1, -1]]
    assert iou[0].tolist() == pytest.approx([1, 2 / 3, 0.5, 0])


class Known:
    """Finds all objects but those that `hidden` says, which it gives to the background, and whose
    slots do not know their factors. Slots are entities, in another order."""

    order = torch.tensor([3, 0, 4, 1, 2])

    def __init__(self, hidden):
        self.hidden = hidden

    def noise(self, scenes, index):
        self.batch = scenes.scenes(index)

    def posterior(self, lam):
        return lam, None

    def infer(self, image, noise):
        masks, hidden = self.batch.masks.clone(), self.hidden(self.batch)
        masks[:, 0] |= (masks & hidden[..., None, None]).any(1)
        masks[:, 1:] &= ~hidden[:, 1:, None, None]
        means = image[:, None].expand(-1, 5, -1, -1, -1) * masks[:, :, None]
        means[:, 0] = 0
        codes = torch.cat([torch.nn.functional.one_hot(self.batch.factors[name], 6)
                           for name in ("shape", "color_id")], -1) * ~hidden[..., None]  # fmt: skip
        decoded = torch.cat([means, 50.0 * masks[:, :, None]], 2)[:, self.order]
        return [SimpleNamespace(decoded=decoded, posterior=codes.float()[:, self.order])]


def means(scores: dict) -> dict:
    return {name: score["mean"] for name, score in scores.items()}


def test_object_scores_are_of_the_objects_they_name():
    unseen, seen = generalise.with_pair(True), generalise.with_pair(False)
    perfect, blind = Known(lambda batch: batch.present & False), Known(green_discs)
    for model in (perfect, blind):
        fitted, scored = (generalise.find_objects(model, scenes) for scenes in (seen, unseen))
        assert len(scored["iou"]) == unseen.batch(0, 40).present[:, 1:].sum()
        assert not fitted["held_out"].any()
        found = generalise.object_scores(fitted, scored)
        assert found["held_out"]["iou"]["n"] == green_discs(unseen.batch(0, 40)).sum()
        perfection = pytest.approx(dict(iou=1, mse=0, shape=1, color_id=1), abs=1e-6)
        assert means(found["others"]) == perfection
        if model is perfect:
            assert means(found["held_out"]) == perfection
        else:
            batch = unseen.batch(0, 40)
            light = batch.image.square().mean(1, keepdim=True) * batch.masks  # painted black
            error = (light.sum((2, 3)) / batch.masks.sum((2, 3)))[green_discs(batch)].mean().item()
            assert means(found["held_out"]) == pytest.approx(
                dict(iou=0, mse=error, shape=0, color_id=0))


def test_floors_of_objects_are_those_of_segments(monkeypatch):
    """With the true masks as segments every IoU is 1; without one entity's it is 0 for that one."""
    scenes = generalise.with_pair(True)

    def segments(image, num_slots, seed):
        batch = scenes.batch(seed, 1)
        without = batch.masks.clone()
        hidden = green_discs(batch)
        without[:, 0] |= (without & hidden[..., None, None]).any(1)
        without[hidden] = False
        return dict(all=batch.masks.numpy(), none=without.numpy())

    monkeypatch.setattr(results, "no_learning", segments)
    floors = generalise.object_floors(scenes)
    assert means(floors["all"]) == dict(held_out=1, others=1)
    assert means(floors["none"]) == dict(held_out=0, others=1)


def test_what_is_committed_is_complete():
    content = json.loads((results.RESULTS / "iodine-generalisation.json").read_text())
    kinds = ["unseen", "seen", *(f"{number} objects" for number in range(2, 8))]
    assert list(content["floors"]) == kinds and content["scenes"] == 320
    for name, found in content["models"].items():
        assert name in found["command"]
        settings = [(row["objects"], row["num_slots"]) for row in found["numbers"]]
        assert settings == [(n, k) for n in range(2, 8) for k in (found["num_slots"], 10)]
        scores = [found["unseen"], found["seen"], *(row["metrics"] for row in found["numbers"])]
        assert all(score["ari_fg"]["n"] == 320 for score in scores)


def test_a_checkpoint_that_is_none_is_one_line():
    command = [sys.executable, generalise.__file__, "nowhere"]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (run.returncode, run.stderr) == (2, "generalise.py: nowhere: no such checkpoint\n")
