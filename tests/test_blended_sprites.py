"""Blended sprites: statistics, coverage and masks; test_data.py has what all datasets share.

Seeds are fixed, so a statistical bound that holds once always holds.
"""

import colorsys
import functools

import numpy as np
import pytest
import torch
from scipy import stats
from test_data import BLENDED, SIZES, UNSURE, is_uniform, sample

import data
from data.blended_sprites import BlendedSprites

CONTINUOUS = ("orientation", "row", "col")


@functools.cache
def facts(name: str) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Of 2048 scenes without the background: present (n, N) and factors, hue in [0, 1) added."""
    scenes, present, factors = data.make(name), [], []
    for start in range(0, 2048, 128):
        batch = scenes.batch(start, 128)
        present.append(batch.present[:, 1:])
        factors.append({key: value[:, 1:] for key, value in batch.factors.items()})
    factors = {key: torch.cat([f[key] for f in factors]) for key in factors[0]}
    hsv = [colorsys.rgb_to_hsv(*rgb) for rgb in factors["color"].double().flatten(0, 1).tolist()]
    hue, saturation, value = torch.tensor(hsv).unflatten(0, factors["shape"].shape).unbind(-1)
    present = torch.cat(present)
    assert (saturation[present] == 1).all() and (value[present] == 1).all()
    return present, {**factors, "hue": hue}


@pytest.mark.parametrize("name", BLENDED)
def test_the_background_is_where_no_sprite_is(name):
    coverage = sample(name, 256).coverage
    assert coverage.unique().tolist() == [0, 1]
    assert torch.equal(coverage[:, 0] == 1, (coverage[:, 1:] == 0).all(1))


@pytest.mark.parametrize("name", [n for n in BLENDED if "8" in n])
def test_hidden_sprites_stay(name):
    """Some have no pixel in the masks; they exist nonetheless, with all their factors."""
    batch = sample(name, 256)
    hidden = batch.present & ~batch.masks.flatten(2).any(2)
    hidden[:, 0] = False
    assert 0 < hidden.sum() / batch.present[:, 1:].sum() < 0.03
    assert (batch.coverage[hidden].sum((1, 2)) > 0).all()
    assert (batch.factors["scale"][hidden] >= 0.5).all()
    assert (batch.factors["color"][hidden].amax(1) == 1).all()


@pytest.mark.parametrize("name", BLENDED)
def test_each_sprite_exists_half_of_the_time(name):
    present, _ = facts(name)
    n, most = present.shape
    counts = torch.bincount(present.sum(1), minlength=most + 1).numpy()
    expected = n * stats.binom(most, 0.5).pmf(np.arange(most + 1))
    assert expected.min() > 5 and stats.chisquare(counts, expected).pvalue > UNSURE
    # All 2^N patterns are equally frequent: whether one exists says nothing of another.
    assert is_uniform((present * 2 ** torch.arange(most)).sum(1), 2**most)


@pytest.mark.parametrize("name", BLENDED)
def test_factors_are_uniform(name):
    _, size, _, most = SIZES[name]
    present, f = facts(name)
    assert is_uniform(f["shape"][present], 3)
    ranges = {
        "hue": (0, 1),
        "orientation": (0, 2 * np.pi),
        "row": (size / 4, size / 2),
        "col": (size / 4, size / 2),
    }
    assert f["scale"].unique().tolist() == [0, 0.75]
    for key, (low, extent) in ranges.items():
        for slot in (0, most - 1):
            values = f[key][:, slot][present[:, slot]].numpy()
            assert values.min() >= low and values.max() <= low + extent
            assert stats.kstest(values, stats.uniform(low, extent).cdf).pvalue > UNSURE, key


@pytest.mark.parametrize("name", BLENDED)
def test_factors_are_independent(name):
    """Of each other, of the number of sprites, and of the factors of another sprite."""
    present, f = facts(name)
    number = present.sum(1, keepdim=True).expand_as(present)
    columns = torch.stack([f["shape"], f["hue"], *(f[key] for key in CONTINUOUS), number], -1)
    values = columns[present].double().numpy()
    r = np.corrcoef(values.T) - np.eye(columns.shape[-1])
    assert abs(r).max() < 4.5 / len(values) ** 0.5
    both = present[:, 0] & present[:, 1]
    pair = columns[both, :2, :-1].double().flatten(1).numpy()
    r = np.corrcoef(pair.T)[: len(CONTINUOUS) + 2, len(CONTINUOUS) + 2 :]
    assert abs(r).max() < 4.5 / len(pair) ** 0.5


def test_half_the_size():
    """The same draws at 32 x 32: all lengths halved, nothing else."""
    full, half = (BlendedSprites(size=size).batch(0, 256) for size in (64, 32))
    assert torch.equal(full.present, half.present)
    for key, value in full.factors.items():
        assert torch.equal(value, half.factors[key] * (2 if key in ("row", "col") else 1)), key
    # Four pixels of the one are one of the other, except along the outlines.
    pooled = torch.nn.functional.avg_pool2d(full.coverage, 2)
    inner = (pooled == 0) | (pooled == 1)
    same = pooled == half.coverage
    assert same[inner].float().mean() > 0.999 and inner.float().mean() > 0.95


def test_a_fixed_number():
    """So many sprites in every scene, the lowest; all other draws stay as they are."""
    free = BlendedSprites(size=32, max_objects=3).batch(0, 256)
    for number in range(4):
        batch = BlendedSprites(size=32, max_objects=3, number=number).batch(0, 256)
        assert (batch.present[:, 1:] == (torch.arange(3) < number)).all()
        assert torch.equal(batch.present[:, 1:], batch.coverage[:, 1:].flatten(2).any(2))
        both = (batch.present & free.present)[:, 1:]
        for key, value in batch.factors.items():
            assert torch.equal(value[:, 1:][both], free.factors[key][:, 1:][both]), key
    scenes = data.make("sprites_3_32", number=1)
    shapes = torch.cat([scenes.batch(i, 128).factors["shape"][:, 1] for i in range(0, 2048, 128)])
    assert is_uniform(shapes, 3)
