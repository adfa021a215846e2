"""The scene generators and their draws: purity, statistics, and pictures painted a second time.

All of it is deterministic: seeds are fixed, so a statistical bound that holds once always holds.
"""

import functools
import hashlib
import itertools
import subprocess
import sys

import numpy as np
import pytest
import torch
from scipy import stats

import data
from data import draws, mini_sprites, multi_dsprites, solids, tetrominoes

SIZES = {  # C, H = W, fewest and most objects
    "mini_sprites": (3, 12, 2, 3),
    "mini_sprites_16_shaded": (3, 16, 2, 4),
    "mini_sprites_16_same_color": (3, 16, 2, 4),
    "mini_sprites_16_held_out": (3, 16, 2, 4),
    "mini_tetrominoes": (3, 14, 3, 3),
    "mini_tetrominoes_distinct": (3, 14, 3, 3),
    "tetrominoes": (3, 35, 3, 3),
    "tetrominoes_distinct": (3, 35, 3, 3),
    "shapes": (1, 28, 3, 3),
    "shapes_levels": (1, 28, 3, 3),
    "multi_dsprites_binarized": (1, 64, 2, 3),
    "multi_dsprites_levels": (1, 64, 2, 3),
    "multi_dsprites_colored_on_grayscale": (3, 64, 2, 5),
    "sprites_3": (3, 64, 0, 3),
    "sprites_8": (3, 64, 0, 8),
    "sprites_3_32": (3, 32, 0, 3),
    "solids_32": (3, 32, 3, 6),
    "solids_48": (3, 48, 3, 6),
    **{f"multi_mnist{kind}": (1, 50, 0, 2) for kind in ("", "_gradient", "_grid", "_noise")},
    "multi_mnist_3": (1, 50, 3, 3),
}  # fmt: skip
HARD = [n for n in SIZES if not n.startswith(("sprites", "multi_mnist"))]  # with hard masks
SOLIDS = [n for n in HARD if n.startswith("solids")]  # see also test_solids.py
FLAT = [n for n in HARD if n not in SOLIDS]  # one colour an object
BLENDED = [n for n in SIZES if n.startswith("sprites")]  # see also test_blended_sprites.py
MINI = [n for n in SIZES if n.startswith("mini_sprites")]
TETRO = [n for n in SIZES if "tetrominoes" in n]
DSPRITES = [n for n in SIZES if n.startswith("multi_dsprites")]
PINNED = {  # a hash of the first four test images; of solids, whose images differ, of the factors
    "mini_sprites": "fa1513a9", "mini_sprites_16_shaded": "fea81bdd",
    "mini_sprites_16_same_color": "73118a65", "mini_sprites_16_held_out": "62cf6fc5",
    "mini_tetrominoes": "c8fdabaf", "mini_tetrominoes_distinct": "2e9cf2a8",
    "tetrominoes": "38e5e92b", "tetrominoes_distinct": "bf4f0add", "shapes": "d2b471c0",
    "shapes_levels": "1e36ee7d", "multi_dsprites_levels": "ebf276de",
    "multi_dsprites_binarized": "216448c4",
    "multi_dsprites_colored_on_grayscale": "7e1a416f", "sprites_3": "522dcbb8",
    "sprites_8": "f6ba784f", "sprites_3_32": "122ad93b", "multi_mnist": "c754f8f9",
    "multi_mnist_3": "d94ed3a7", "multi_mnist_gradient": "99062451", "multi_mnist_grid": "cc96e9da",
    "multi_mnist_noise": "b435163a", "solids_32": "8ad4f0f2", "solids_48": "969a1adb",
    "moving_mnist": "7a1e1ce9", "moving_mnist_enter": "9b36b19b",
    "moving_mnist_leave": "0aeed3aa", "moving_mnist_crossing": "a9c5b0c6",
}  # fmt: skip
UNSURE = 1e-4  # a p-value below this is taken for a defect


@functools.cache
def sample(name: str, size: int = 2048) -> data.Batch:
    """The first scenes of a dataset, shared by the tests, which only read them."""
    scenes = data.make(name)
    parts = [scenes.batch(start, 256) for start in range(0, size, 256)]
    factors = {k: torch.cat([p.factors[k] for p in parts]) for k in parts[0].factors}
    tensors = [None if parts[0][i] is None else torch.cat([p[i] for p in parts])
               for i in (0, 1, 2, 4)]  # fmt: skip
    return data.Batch(*tensors[:3], factors, tensors[3])


def is_uniform(values: torch.Tensor, bins: int) -> bool:
    """Chi-square: are integers 0 .. bins-1 equally frequent?"""
    counts = torch.bincount(values.flatten(), minlength=bins)
    assert len(counts) == bins
    return stats.chisquare(counts.numpy()).pvalue > UNSURE


def tensors(batch: data.Batch) -> dict[str, torch.Tensor]:
    named = {**batch._asdict(), **batch.factors}
    return {name: value for name, value in named.items() if isinstance(value, torch.Tensor)}


def assert_same(one: data.Batch, other: data.Batch, rows=slice(None)) -> None:
    """`one` equals the rows of `other`, bit for bit."""
    ones, others = tensors(one), tensors(other)
    assert ones.keys() == others.keys()
    for name in ones:
        a, b = ones[name], others[name][rows]
        assert a.dtype == b.dtype and torch.equal(a.cpu(), b.cpu()), name


def paint_dsprite(f: dict[str, np.ndarray], b: int, e: int, size: int = 64) -> np.ndarray:
    """Which pixels' centres are in sprite (b, e) of factors in float64: bool (size, size).

    By other formulas than the generators': it turns the sprite, not the pixels.
    """
    centres = np.arange(size) + 0.5
    place = (centres - f["col"][b, e])[None] - 1j * (centres - f["row"][b, e])[:, None]
    z = place * np.exp(-1j * f["orientation"][b, e]) / f["scale"][b, e] * 64 / size
    if f["shape"][b, e] == 0:
        return np.maximum(abs(z.real), abs(z.imag)) <= 11
    if f["shape"][b, e] == 1:
        focus = (15**2 - 10**2) ** 0.5  # the distances to both foci sum to two semi-axes
        return abs(z - focus) + abs(z + focus) <= 30
    z = z / 11.4 + 0.118j
    return abs(z) ** 2 - np.cbrt(z.real**2 * z.imag**3) <= 1


def test_words_equal_unbounded_integers():
    """In Python's own integers, as the docstring of draws.py has it."""

    def mix(x: int, salt: int = 0) -> int:
        x = ((x ^ x >> 16) * 0x21F0AAAD) % 2**32
        x = (((x ^ x >> 15) ^ salt) * 0x735A2D97) % 2**32
        return x ^ x >> 15

    for key in (0, 1, -1, 2**32 - 1, 2**100, draws.make_key("a", 3)):
        upper, lower = divmod(draws.make_key(key), 2**32)
        for i in [0, 1, 2**31 - 1, 2**32 - 1, 2**32, 2**40 + 7, 2**62 + 12345]:
            a = mix(mix(i % 2**32 ^ lower) ^ i >> 32 ^ upper)
            b = mix(mix(i % 2**32 ^ upper) ^ i >> 32 ^ lower)
            expected = [mix(a ^ mix(0x6A09E667 + counter), b) for counter in range(5)]
            assert draws._words(key, torch.tensor([i]), 5)[0].tolist() == expected


def test_draws_are_pinned():
    """Published numbers and weights rest on these scenes: a change here is a change of data."""
    key = draws.make_key("tetrominoes", "train", 0)
    assert key == 5186535120823995855
    u = draws.uniform(key, torch.tensor([0, 1, 2**33]), (2,))
    expected = [[2803941, 4081180], [85984, 8368915], [15991782, 13246979]]
    assert (u * 2**24).long().tolist() == expected


def test_make_key():
    keys = [(1, 23), (12, 3), ("1", 23), (123,), ("123",), ("i1:1",), (1,), (-1,), (), ("",)]
    assert len({draws.make_key(*words) for words in keys}) == len(keys)
    assert draws.make_key(np.int64(5)) == draws.make_key(5)  # not of the integer's type
    assert 0 <= draws.make_key("x") < 2**64
    with pytest.raises(TypeError):
        draws.make_key(1.5)


@pytest.mark.parametrize("axis", ["index", "index high", "counter", "key"])
def test_words_are_uniform_and_independent_along(axis):
    """Bytes by chi-square, and correlations at lags 1 to 3 and 256, for neighbouring inputs."""
    n = 2**16
    if axis == "index":
        words = draws._words(5, torch.arange(n), 1).flatten()
    elif axis == "index high":
        words = draws._words(5, torch.arange(n) << 32, 1).flatten()
    elif axis == "counter":
        words = draws._words(5, torch.tensor([7]), n).flatten()
    else:
        words = torch.cat([draws._words(key, torch.tensor([7]), 1)[0] for key in range(2**12)])
    for shift in (0, 8, 16, 24):
        assert is_uniform(words >> shift & 255, 256)
    u = words.double() / 2**32
    for lag in (1, 2, 3, 256):
        r = np.corrcoef(u[:-lag], u[lag:])[0, 1]
        assert abs(r) < 4 / len(u) ** 0.5
    assert abs(u.mean() - 1 / 2) < 4 * (1 / 12 / len(u)) ** 0.5
    assert abs(u.var() - 1 / 12) < 4 * (1 / 180 / len(u)) ** 0.5


def test_avalanche():
    """Flipping any one bit of index or key flips each output bit half of the time."""
    n = 2048
    index, key = torch.arange(n) * 977, draws.make_key("avalanche")
    words = draws._words(key, index, 2)
    bits = torch.arange(32)
    flipped = [draws._words(key, index ^ (1 << bit), 2) for bit in range(40)]
    flipped += [draws._words(key ^ (1 << bit), index, 2) for bit in range(64)]
    rate = torch.stack(flipped).bitwise_xor_(words)[..., None] >> bits & 1  # (104, n, 2, 32)
    rate = rate.double().mean(1)
    assert (rate - 0.5).abs().max() < 5.5 * 0.5 / n**0.5  # 6656 rates


def test_scenes_and_keys_never_share_their_draws():
    index = torch.cat([torch.arange(2**18), 2**32 + torch.arange(2**18)])
    words = torch.cat([draws._words(key, index, 2) for key in (0, 1)])
    assert len(torch.unique(words[:, 0] << 32 | words[:, 1])) == len(words)


def test_uniform():
    index = torch.arange(1000)
    u = draws.uniform(3, index, (4, 5))
    assert u.shape == (1000, 4, 5) and u.dtype == torch.float32
    assert u.min() >= 0 and u.max() < 1
    assert torch.equal(u * 2**24, (u * 2**24).round())
    assert torch.equal(u.flatten(1)[:, :7], draws.uniform(3, index, (7,)))  # a prefix
    assert draws.uniform(3, index).shape == (1000,)
    assert stats.kstest(u.flatten().numpy(), "uniform").pvalue > UNSURE


@pytest.mark.parametrize("high", [1, 2, 7, 1000])
def test_integers_and_pick(high):
    index = torch.arange(20000)
    for values in (draws.integers(1, index, high), draws.pick(draws.uniform(2, index), high)):
        assert values.dtype == torch.int64 and values.min() >= 0
        assert is_uniform(values, high) if high > 1 else values.max() == 0
    largest = torch.tensor(1 - 2.0**-24)  # never reaches high
    high = torch.cat([torch.arange(1, 100000), 2**24 - torch.arange(1, 1000)])
    assert torch.equal(draws.pick(largest, high), high - 1)


def test_first_valid():
    valid = torch.tensor([[0, 0, 1, 1], [1, 0, 0, 1], [0, 0, 0, 0], [0, 0, 0, 1]], dtype=torch.bool)
    assert draws.first_valid(valid).tolist() == [2, 0, 0, 3]


def test_normal():
    """Distribution, tails, and independence within and between scenes and of Box-Muller pairs."""
    x = draws.normal(draws.make_key("noise"), torch.arange(4000), (3, 17)).double()
    assert x.shape == (4000, 3, 17)
    n = x.numel()
    assert stats.kstest(x.flatten().numpy(), "norm").pvalue > UNSURE
    assert abs(x.mean()) < 4 / n**0.5 and abs(x.var() - 1) < 4 * (2 / n) ** 0.5
    assert abs((x**4).mean() - 3) < 4 * (96 / n) ** 0.5
    expected = n * 2 * stats.norm.sf(3.5)
    assert abs((x.abs() > 3.5).sum() - expected) < 4 * expected**0.5
    columns = x.flatten(1)
    for values in (columns, columns**2):  # squares see a shared radius, which values do not
        r = np.corrcoef(values.T) - np.eye(51)
        assert np.abs(r).max() < 5 / 4000**0.5
        r = np.corrcoef(values[:-1].flatten(), values[1:].flatten())[0, 1]
        assert abs(r) < 4 / n**0.5
    assert draws.normal(1, torch.arange(5), ()).shape == (5,)
    assert torch.isfinite(draws.normal(1, torch.arange(5), (100001,))).all()


def test_every_dataset_is_listed():
    moving = {name for name in data.DATASETS if name.startswith("moving")}  # test_moving_digits.py
    assert set(data.DATASETS) == set(PINNED) == set(SIZES) | moving


@pytest.mark.parametrize("name", SIZES)
def test_contract(name):
    channels, side, fewest, most = SIZES[name]
    scenes, batch = data.make(name), sample(name, 256 if name in BLENDED + SOLIDS else 2048)
    image, masks, present, factors, coverage = batch
    assert (scenes.name, scenes.split, scenes.seed) == (name, "train", 0)
    assert (scenes.num_channels, scenes.height, scenes.width) == (channels, side, side)
    assert scenes.max_entities == most + 1 and scenes.device == torch.device("cpu")
    n = len(image)
    assert image.shape == (n, channels, side, side) and image.dtype == torch.float32
    assert image.min() >= 0 and image.max() <= 1
    assert masks.shape == (n, most + 1, side, side) and masks.dtype == torch.bool
    assert (masks.sum(1) == 1).all()
    assert (coverage is None) == (name in HARD)
    seen = masks if coverage is None else coverage
    assert seen.shape == masks.shape and seen.dtype in (torch.bool, torch.float32)
    assert present[:, 0].all() and torch.equal(present[:, 1:], seen[:, 1:].flatten(2).any(2))
    number = present[:, 1:].sum(1)
    assert min(fewest, 1) <= number.min() and number.max() <= most
    whole = {"shape", "color_id", "label", "material"} | ({"size"} if name in SOLIDS else set())
    for key, value in factors.items():
        assert value.shape[:2] == (n, most + 1), key
        assert value.dtype == (torch.int64 if key in whole else torch.float32), key
        assert not value[:, 0].any() and not value[~present].any(), key


@pytest.mark.parametrize("name", PINNED)
def test_a_scene_is_the_same_everywhere(name):
    scenes = data.make(name)
    batch = scenes.batch(0, 64)
    assert_same(scenes.batch(7, 1), batch, slice(7, 8))
    assert_same(scenes.batch(4, 5), batch, slice(4, 9))
    assert_same(data.make(name).batch(0, 64), batch)
    order = torch.tensor([63, 7, 0, 7])
    assert_same(scenes.scenes(order), batch, order)
    far = 2**40
    assert_same(scenes.batch(far + 3, 2), scenes.batch(far, 6), slice(3, 5))
    for start in (far, 2**32):
        assert not torch.equal(scenes.batch(start, 8).image, batch.image[:8])


@pytest.mark.parametrize("name", PINNED)
def test_scenes_are_pinned(name):
    """Published numbers and weights rest on these scenes: a change here is a change of data."""
    batch = data.make(name, "test").batch(0, 4)
    exact = (batch.image * 255).round().byte()
    if name in SOLIDS:
        exact = torch.cat([value.flatten() for value in batch.factors.values()])
    assert hashlib.blake2b(exact.numpy().tobytes(), digest_size=4).hexdigest() == PINNED[name]


@pytest.mark.parametrize("name", SIZES)
def test_splits_seeds_and_scenes_differ(name):
    pictures, count = set(), 0
    for split, seed in itertools.product(data.SPLITS, (0, 1)):
        batch = data.make(name, split, seed).batch(0, 32)
        for image in batch.image[batch.present[:, 1:].any(1)]:  # empty scenes are all the same
            pictures.add(image.numpy().tobytes())
            count += 1
    assert len(pictures) >= count - 2 > 96  # the smallest datasets repeat a scene by chance, rarely


on_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA device")


@pytest.mark.gpu
@on_cuda
@pytest.mark.parametrize("name", [n for n in PINNED if n not in SOLIDS])
def test_cuda_draws_the_same_scenes(name):
    cpu, cuda = data.make(name), data.make(name, device="cuda")
    for start in (0, 2**40):
        assert_same(cpu.batch(start, 257), cuda.batch(start, 257))


@pytest.mark.gpu
@on_cuda
def test_cuda_draws_the_same_numbers():
    index = torch.arange(2**33 - 500, 2**33 + 500)
    for draw, tolerance in (
        (draws.uniform, 0), (lambda *args: draws.integers(*args[:2], 1000, args[2]), 0),
        (draws.normal, 1e-5),
    ):  # fmt: skip
        one, other = (draw(9, i, (33,)) for i in (index, index.cuda()))
        torch.testing.assert_close(one, other.cpu(), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("name", [n for n in FLAT if not n.endswith("held_out")])
def test_number_shape_and_color_are_uniform(name):
    _, _, fewest, most = SIZES[name]
    batch = sample(name)
    objects = batch.present[:, 1:]
    if fewest < most:
        # Sprites that are hidden completely, one scene in a hundred, lower a count; clamp to test.
        number = objects.sum(1).clamp(min=fewest) - fewest
        assert is_uniform(number, most - fewest + 1)
    shape = batch.factors["shape"][:, 1:][objects]
    if name in TETRO:
        numbers = torch.tensor(list(tetrominoes.PIECES))
        assert torch.isin(shape, numbers).all()
        shape = torch.searchsorted(numbers, shape)
        assert is_uniform(shape, 19)
    else:
        assert is_uniform(shape, 3)
    if "color_id" in batch.factors:
        color_id = batch.factors["color_id"][:, 1:]
        assert is_uniform(color_id[:, 0], 6)
        same = (color_id[:, 0] == color_id[:, 1]).float().mean()
        if name.endswith("same_color"):
            assert torch.equal(color_id, color_id[:, :1] * objects)
        elif name.endswith("distinct"):  # the second colour is one of five, the third one of four
            second, third = ((color_id[:, i] - color_id[:, 0]) % 6 - 1 for i in (1, 2))
            assert min(second.min(), third.min()) >= 0 and (second != third).all()
            assert is_uniform(4 * second + third - (third > second).long(), 20)
        else:  # repetition: the first two objects agree in colour in one scene of six
            assert abs(same - 1 / 6) < 4 * (5 / 36 / len(color_id)) ** 0.5
            assert is_uniform(color_id[objects], 6)
        pure = torch.tensor([[1, 0, 0], [0, 1, 0], [0, 0, 1], [0, 1, 1], [1, 0, 1], [1, 1, 0]])
        assert torch.equal(batch.factors["color"][:, 1:][objects], pure[color_id[objects]].float())


def test_bad_requests():
    scenes = data.make("shapes")
    requests = [
        (lambda: data.make("tetris"), ["'tetris'", *SIZES]),
        (lambda: data.make("shapes", split="val"), ["'val'", *data.SPLITS]),
        (lambda: scenes.batch(-1, 4), ["-1"]),
        (lambda: scenes.batch(0, 0), ["size"]),
        (lambda: mini_sprites.MiniSprites(max_objects=5), ["5", "at most 4"]),
        (lambda: mini_sprites.MiniSprites(size=8, sprite=9), ["9 px"]),
        (lambda: mini_sprites.MiniSprites(min_objects=3, max_objects=2), ["3 to 2"]),
        (lambda: mini_sprites.MiniSprites(exclude=(3, 0)), ["(3, 0) is not in list"]),
        (lambda: solids.Solids(exclude=(0, 1)), ["not in list"]),
    ]
    for request, words in requests:
        with pytest.raises(ValueError) as caught:
            request()
        message = str(caught.value)
        assert "\n" not in message and all(word in message for word in words), message


def test_import_is_cheap():
    """Generators load when they are first asked for, plotting not at all."""
    code = "import sys, data; print([m for m in sys.modules if 'data.' in m or 'matplotlib' in m])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "data.draws" in done.stdout
    for module in ("tetrominoes", "sprites", "shapes", "metrics", "figures", "matplotlib"):
        assert module not in done.stdout


PICTURES = {  # of mini_sprites, by side
    4: ["####/####/####/####", ".##./####/####/.##.", ".##./.##./####/####"],
    5: [
        "#####/#####/#####/#####/#####",
        ".###./#####/#####/#####/.###.",
        "..#../.###./.###./#####/#####",
    ],
}
LEVELS = [191, 255, 255, 255, 223] + [127, 159, 159, 159, 191] * 3 + [95, 63, 63, 63, 127]
SHADED = np.reshape(LEVELS, (5, 5)) / 255
TILES = {name: np.ones((2, 2)) if "mini" in name else SHADED for name in TETRO}


def cells(picture: str) -> np.ndarray:
    return np.array([[c == "#" for c in row] for row in picture.split("/")], dtype=float)


def paint(name: str, f: dict[str, np.ndarray], b: int, e: int, size: int) -> np.ndarray:
    """The light of entity (b, e), 0 outside: float64 (size, size)."""
    if name in DSPRITES + BLENDED:
        return paint_dsprite(f, b, e, size).astype(float)
    shape = int(f["shape"][b, e])
    if name in MINI:
        side = 4 if name == "mini_sprites" else 5
        light = cells(PICTURES[side][shape]) * f["brightness"][b, e]
        if name.endswith(("shaded", "held_out")):
            light *= 1 - 0.3 * np.indices((side, side)).sum(0) / (2 * side - 2)
    elif name in TETRO:
        light = np.kron(cells(tetrominoes.PIECES[shape]), TILES[name])
    else:
        rows = np.arange(9)
        width = [(rows + 1) // 2 * 2 + 1, (9 - rows) // 2 * 2 + 1, rows * 0 + 9][shape]
        light = (abs(2 * np.arange(9) - 8) < width[:, None]) * f["brightness"][b, e]
    image, top, left = np.zeros((size, size)), int(f["row"][b, e]), int(f["col"][b, e])
    image[top : top + light.shape[0], left : left + light.shape[1]] = light
    return image


@pytest.mark.parametrize("name", FLAT + BLENDED)
def test_repainted(name):
    """Object by object, in float64: images, masks, coverage."""
    batch, size = sample(name, 256), SIZES[name][1]
    f = {key: value.double().numpy() for key, value in batch.factors.items()}
    differing = touching = 0
    for b in range(96):
        owner, image = np.zeros((size, size), int), np.zeros((size, size, SIZES[name][0]))
        ground = batch.image[b][:, batch.masks[b, 0]]
        image += ground[:, 0].numpy()
        assert torch.equal(ground, ground[:, :1].expand_as(ground))
        for e in np.flatnonzero(batch.present[b].numpy())[1:]:
            light = paint(name, f, b, e, size)
            assert not (name in MINI + TETRO and owner[light > 0].any())  # no overlap
            color = (light[..., None] * (f["color"][b, e] if "color" in f else 1))[light > 0]
            image[light > 0] = color + image[light > 0] * (name in BLENDED)
            owner[light > 0] = e
            if name in BLENDED:
                differing += (light != batch.coverage[b, e].numpy()).sum()
        error = abs(image.clip(max=1) - batch.image[b].permute(1, 2, 0).numpy()).max(-1)
        differing += (error > 1e-6).sum()
        differing += (owner != batch.masks[b].int().argmax(0).numpy()).sum()
        for one, other in ((owner[1:], owner[:-1]), (owner[:, 1:], owner[:, :-1])):
            touching += ((one != other) & (one > 0) & (other > 0)).any()
    assert touching > 10  # objects may share an edge
    # One pixel's centre may be put across an outline by float32.
    assert differing <= (4 if name in DSPRITES + BLENDED else 0)


@pytest.mark.parametrize("name", MINI)
def test_mini_sprites_positions(name):
    """The first is uniform over all places, the second over what the first leaves free."""
    scenes, batch = data.make(name), sample(name)
    side = scenes.size - scenes.sprite + 1
    row, col = batch.factors["row"].long(), batch.factors["col"].long()
    assert is_uniform(row[:, 1] * side + col[:, 1], side**2)
    present = batch.present[:, 1:]
    for values in (row[:, 1:][present], col[:, 1:][present]):
        assert values.min() == 0 and values.max() == side - 1

    place = torch.arange(side**2)
    down = place[:, None] // side - place // side
    across = place[:, None] % side - place % side
    apart = torch.maximum(down.abs(), across.abs())  # (first, second)
    touching = name.endswith("same_color")
    clear = apart == scenes.sprite if touching else apart >= scenes.sprite
    chance = (clear.double() / clear.sum(1, keepdim=True)).mean(0)
    counts = torch.bincount(row[:, 2] * side + col[:, 2], minlength=side**2)
    assert stats.chisquare(counts.numpy(), chance.numpy() * len(row)).pvalue > UNSURE
    if touching:  # each box but the first touches an earlier one
        corner = torch.stack([row, col], -1)[:, 1:]  # (n, N, 2)
        apart = (corner[:, :, None] - corner[:, None]).abs().amax(-1)
        nearest = torch.where(torch.ones(4, 4).tril(-1) > 0, apart, 99).amin(2)
        assert (nearest[:, 1:] == scenes.sprite)[present[:, 1:]].all()


def test_mini_sprites_brightness():
    batch = sample("mini_sprites_16_shaded")
    light = batch.factors["brightness"][:, 1:][batch.present[:, 1:]]
    assert stats.kstest(light.numpy(), stats.uniform(0.5, 0.5).cdf).pvalue > UNSURE
    assert set(sample("mini_sprites").factors["brightness"].unique().tolist()) == {0.0, 1.0}


def test_an_excluded_pair_is_only_in_the_test_split():
    """The other 17 are uniform; the test split is that of the same name without `exclude`."""
    name = "mini_sprites_16_held_out"  # green discs
    for split in data.SPLITS:
        f = data.make(name, split).batch(0, 2000).factors
        pair = (f["shape"] * 6 + f["color_id"])[:, 1:3]
        assert (pair == 7).any() == (split == "test")
        assert is_uniform(pair, 18) if split == "test" else is_uniform(pair - (pair > 7).long(), 17)
    plain = data.make(name, "test", exclude=None).batch(0, 64)
    assert_same(plain, data.make(name, "test").batch(0, 64))


@pytest.mark.parametrize(("size", "sprite", "most"), [(3, 1, 9), (7, 2, 4), (5, 5, 1), (24, 4, 9)])
@pytest.mark.parametrize("touching", [False, True])
def test_mini_sprites_are_always_placed(size, sprite, most, touching):
    options = dict(size=size, sprite=sprite, min_objects=most, max_objects=most)
    batch = mini_sprites.MiniSprites(**options, same_color=touching).batch(0, 200)
    squares = batch.factors["shape"][:, 1:] == 0
    pixels = batch.masks.flatten(2).sum(2)[:, 1:]
    assert batch.present.all() and (pixels[squares] == sprite**2).all()


def test_the_pieces_are_the_19_fixed_tetrominoes():
    free = map(cells, ("####", "##/##", "###/.#.", "##./.##", "###/#.."))
    fixed = {
        str(np.rot90(side, turns).tolist())
        for piece in free for side in (piece, piece.T) for turns in range(4)
    }  # fmt: skip
    pieces = [str(cells(piece).tolist()) for piece in tetrominoes.PIECES.values()]
    assert set(pieces) == fixed and len(pieces) == len(fixed) == 19
    assert list(tetrominoes.PIECES) == [*range(1, 20)]


@pytest.mark.parametrize("name", TETRO)
def test_tetrominoes_positions(name):
    """The same distribution as plain rejection, one scene at a time, by another generator."""
    scenes, batch = data.make(name), sample(name)
    rng = np.random.default_rng(0)
    pieces = [np.kron(cells(p), TILES[name] > 0) for p in tetrominoes.PIECES.values()]
    plain = []
    while len(plain) < 1500:
        chosen = [pieces[i] for i in rng.integers(19, size=3)]
        while True:
            total = np.zeros((scenes.size, scenes.size))
            corners = [[rng.integers(scenes.size - n + 1) for n in p.shape] for p in chosen]
            for piece, (top, left) in zip(chosen, corners, strict=True):
                total[top : top + piece.shape[0], left : left + piece.shape[1]] += piece
            if total.max() == 1:
                break
        plain.append(corners)
    plain = np.array(plain)  # (n, 3, 2)
    ours = torch.stack([batch.factors["row"], batch.factors["col"]], -1)[:, 1:].numpy()
    for of in (
        lambda x: x[:, 0, 0],
        lambda x: x[:, 2, 1],
        lambda x: np.abs(x[:, 0] - x[:, 1]).max(1),
        lambda x: np.abs(x[:, 1] - x[:, 2]).min(1),
    ):
        assert stats.ks_2samp(of(plain), of(ours)).pvalue > UNSURE
    assert ours.min() == 0 and ours.max() == scenes.size - scenes.cell  # of a bar


def test_tetrominoes_attempts_suffice():
    """The worst three shapes: one attempt is valid with probability 0.10, see the docstring."""
    scenes = data.make("tetrominoes")
    worst = torch.full((2000, 3), list(tetrominoes.PIECES).index(15))
    row, col = scenes.place(worst, draws.uniform(1, torch.arange(2000), (2, 3)))  # one attempt
    images = np.zeros((2000, 35, 35))
    piece = np.kron(cells(tetrominoes.PIECES[15]), np.ones((5, 5)))
    for image, rows, cols in zip(images, row.tolist(), col.tolist(), strict=True):
        for top, left in zip(rows, cols, strict=True):
            image[top : top + piece.shape[0], left : left + piece.shape[1]] += piece
    assert 0.08 < (images.max((1, 2)) == 1).mean() < 0.13
    assert (1 - 0.10) ** tetrominoes.ATTEMPTS < 1e-11


def test_shapes_places():
    batch = sample("shapes")
    assert batch.image.unique().tolist() == [0, 1]
    for key in ("row", "col"):  # of the last, which is never hidden
        assert is_uniform(batch.factors[key].long()[:, 3], 20)


def test_levels_are_the_same_shapes_each_of_a_brightness():
    white, levels = sample("shapes"), sample("shapes_levels")
    assert torch.equal(white.masks, levels.masks) and torch.equal(white.image > 0, levels.image > 0)
    own = levels.factors["brightness"][:, 1:, None, None] * levels.masks[:, 1:]
    assert torch.equal(own.sum(1, keepdim=True), levels.image)
    top = levels.factors["brightness"][:, 3].numpy()  # never hidden
    assert stats.kstest(top, stats.uniform(0.25, 0.75).cdf).pvalue > UNSURE


@pytest.mark.parametrize("name", DSPRITES)
def test_dsprites_statistics(name):
    batch = sample(name)
    # The topmost sprite of a full scene is never hidden, so its factors are as they were drawn.
    full = batch.present[:, -1]
    f = {k: v[full, -1].numpy() for k, v in batch.factors.items()}
    for key, low, extent in (
        ("scale", 0.5, 0.5), ("orientation", 0, 2 * np.pi), ("row", 16, 32), ("col", 16, 32)
    ):  # fmt: skip
        assert stats.kstest(f[key], stats.uniform(low, extent).cdf).pvalue > UNSURE, key
    color = batch.factors["color"][full, -1]
    ground = (batch.image * batch.masks[:, :1]).flatten(2).amax(2)  # (n, C)
    if name.endswith("binarized"):
        assert batch.image.unique().tolist() == [0, 1] and not ground.any()
    elif name.endswith("levels"):
        own = batch.factors["color"][..., 0, None, None] * batch.masks
        assert torch.equal(own.sum(1, keepdim=True), batch.image)
        assert stats.kstest(color[:, 0].numpy(), stats.uniform(0.25, 0.75).cdf).pvalue > UNSURE
    else:
        assert (ground == ground[:, :1]).all()
        assert stats.kstest(ground[:, 0].numpy(), "uniform").pvalue > UNSURE
        assert (color.amin(1) == 0).all() and (color.amax(1) == 1).all()  # saturated
        largest = (color * torch.tensor([1.0, 1.01, 1.02])).argmax(1)
        assert is_uniform(largest, 3)
        middle = color.sort(1).values[:, 1].numpy()
        assert stats.kstest(middle, "uniform").pvalue > UNSURE


@pytest.mark.parametrize("shape", range(3))
def test_dsprites_areas(shape):
    """Each shape covers about 475 pixels at scale 1 and stays inside the image when turned."""
    outline = data.make("multi_dsprites_binarized").geometry.outline
    angle, kind, one = torch.linspace(0, 6.28, 64), torch.full((64,), shape), torch.ones(64)
    inside = outline(kind, one, angle.cos(), angle.sin(), one * 16, one * 16)
    area = inside.flatten(1).sum(1)
    assert (area > 455).all() and (area < 500).all()
    opposite = outline(kind, one, -angle.cos(), -angle.sin(), one * 48, one * 48)
    assert torch.equal(inside, opposite.flip(1, 2))  # nothing is cut off on any side
    if multi_dsprites.SHAPES[shape] == "heart":  # orientation 0: lobes up, symmetric
        assert torch.equal(inside[0, :, :32], inside[0, :, :32].flip(1))
        assert inside[0, :16].sum() > 1.5 * inside[0, 16:].sum()


@pytest.mark.parametrize("name", ["shapes", "shapes_levels", *DSPRITES])
def test_hidden_objects_are_dropped(name):
    """In some scenes the lowest is hidden by those above: then its number is a gap."""
    present = sample(name).present
    hidden = ~present[:, 1]
    assert 0 < hidden.sum() < 0.02 * len(hidden) and present[hidden, 2].any()
