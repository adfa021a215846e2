"""Scores against independent implementations: scikit-learn, brute force over matchings, by hand."""

import itertools
import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import results
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import adjusted_rand_score
from torch.nn import functional as F

import data
from data import Batch, metrics

NAN = math.nan


def one_hot(labels, number):
    """Labels (B, H, W) -> masks (B, number, H, W) bool."""
    return F.one_hot(torch.as_tensor(labels), number).movedim(-1, 1).bool()


def strip(*entities, number=4):
    """One scene of one row of pixels, given by its labels."""
    return one_hot([[list(entities)]], number)


@st.composite
def scenes(draw, max_entities=4, max_slots=5):
    """True masks with absent entities and without foreground now and then, and soft predictions
    that range from noise to perfect."""
    size = draw(st.integers(1, 3)), draw(st.integers(1, 5)), draw(st.integers(1, 5))
    entities, slots = draw(st.integers(1, max_entities)), draw(st.integers(1, max_slots))
    used, agreement = draw(st.integers(1, entities)), draw(st.sampled_from([0.0, 0.7, 1.0]))
    rng = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    labels = torch.randint(used, size, generator=rng)
    masks = torch.rand(size[0], slots, *size[1:], generator=rng)
    hint = one_hot(labels % slots, slots) * agreement
    return one_hot(labels, entities), (masks * (1 - agreement) + hint).float()


def sklearn_ari(true, predicted, foreground):
    scores = []
    for masks, soft in zip(true.numpy(), predicted.numpy(), strict=True):
        truth, slots = masks.argmax(0), soft.argmax(0)
        chosen = truth > 0 if foreground else truth >= 0
        scores.append(adjusted_rand_score(truth[chosen], slots[chosen]) if chosen.any() else NAN)
    return np.array(scores)


@settings(max_examples=100, deadline=None)
@given(scenes(), st.booleans())
def test_ari_is_scikit_learns(scene, foreground):
    true, predicted = scene
    ours = metrics.ari(true, predicted, foreground)
    assert ours.dtype == torch.float64
    np.testing.assert_allclose(ours, sklearn_ari(true, predicted, foreground), rtol=0, atol=1e-12)


def test_ari_by_hand():
    # Foreground 1 1 1 2 2 2 against a a b b c c: index 2, a 6, b 3, total 15.
    true, predicted = strip(0, 1, 1, 1, 2, 2, 2), strip(3, 0, 0, 1, 1, 2, 2).float()
    expected = 6 * 3 / 15
    assert metrics.ari(true, predicted).item() == pytest.approx((2 - expected) / (4.5 - expected))
    assert metrics.ari(strip(1, 1, 2, 2), strip(0, 1, 0, 1)).item() == pytest.approx(-0.5)


def check_conventions(ari):
    """What published versions of ARI-FG disagree on."""
    single = strip(0, 0, 1, 1, 1)
    assert ari(single, strip(0, 0, 1, 1, 1)).item() == 1  # the formula is 0/0 here
    assert ari(single, strip(2, 2, 2, 2, 2)).item() == 1  # merged with the background: not seen
    assert ari(single, strip(0, 0, 1, 1, 2)).item() == 0
    assert ari(strip(0, 1), strip(1, 0)).item() == 1  # one pixel: no pair to disagree on
    assert ari(strip(0, 0, 0, 0), strip(0, 1, 2, 3)).isnan().all()  # no foreground
    assert ari(strip(0, 0, 1, 1, 2, 2), strip(2, 3, 0, 0, 1, 1)).item() == 1  # split background
    assert abs(ari(strip(0, 1, 2), strip(0, 1, 1)).item()) < 1e-12
    tie = (strip(0, 0, 1, 1) | strip(1, 1, 1, 1)).float()  # of slots 0 and 1 in two pixels
    assert ari(strip(1, 1, 2, 2), tie).item() == 1  # the lower slot wins


def pairs(true, predicted):
    """Pairs of foreground pixels: together in both, in the truth, in the prediction, all."""
    n = metrics._contingency(true, predicted)[:, 1:]
    counts = n, n.sum(2), n.sum(1), n.sum((1, 2))
    return [(c * (c - 1) / 2).flatten(1).sum(1) if c.ndim > 1 else c * (c - 1) / 2 for c in counts]


def formula_only(true, predicted):
    index, a, b, total = pairs(true, predicted)
    return (index - a * b / total) / ((a + b) / 2 - a * b / total)


def not_adjusted(true, predicted):
    """The Rand index, the share of pairs that truth and prediction agree on."""
    both, a, b, total = pairs(true, predicted)
    return torch.where(total == 0, metrics.ari(true, predicted), (total - a - b + 2 * both) / total)


def last_slot_wins(true, predicted):
    number = predicted.shape[1]
    return metrics.ari(true, one_hot(number - 1 - predicted.flip(1).float().argmax(1), number))


ARI_MUTANTS = {
    "background included": lambda true, p: metrics.ari(true, p, foreground=False),
    "0/0 stays": formula_only,
    "NaN becomes 1": lambda true, p: metrics.ari(true, p).nan_to_num(1.0),
    "NaN becomes 0": lambda true, p: metrics.ari(true, p).nan_to_num(0.0),
    "not adjusted": not_adjusted,
    "last slot wins": last_slot_wins,
}


@pytest.mark.parametrize("name", ARI_MUTANTS)
def test_ari_conventions_and_mutants(name):
    check_conventions(metrics.ari)
    with pytest.raises(AssertionError):
        check_conventions(ARI_MUTANTS[name])


def iou_table(true, predicted):
    """(E, K) of one scene, by sets of pixels."""
    segments = predicted.float().argmax(0).flatten().tolist()
    table = np.zeros((len(true), len(predicted)))
    for e, k in np.ndindex(*table.shape):
        inside = {i for i, on in enumerate(true[e].flatten().tolist()) if on}
        found = {i for i, slot in enumerate(segments) if slot == k}
        table[e, k] = len(inside & found) / max(len(inside | found), 1)
    return table


def best_total(table):
    """The best one-to-one matching's sum, from all of them."""
    rows, columns = table.shape
    if rows > columns:
        return best_total(table.T)
    return max(
        sum(table[row, column] for row, column in enumerate(chosen))
        for chosen in itertools.permutations(range(columns), rows)
    )


@settings(max_examples=100, deadline=None)
@given(scenes())
def test_miou_is_the_best_matching(scene):
    true, predicted = scene
    present = true.any((2, 3))
    present[0, -1] = True  # hidden, in some scenes
    expected = []
    for masks, soft, here in zip(true, predicted, present, strict=True):
        table = iou_table(masks, soft)[1:][here[1:].numpy()]
        expected.append(best_total(table) / len(table) if len(table) else NAN)
    np.testing.assert_allclose(metrics.miou(true, present, predicted), expected, atol=1e-12)


def test_miou_by_hand():
    true = strip(0, 0, 1, 1, 1, 2)
    present = torch.tensor([[True, True, True, False]])
    # Object 1 has 3 pixels, slot 1 two of them: 2/3. Object 2 shares slot 2 with one of object 1.
    assert metrics.miou(true, present, strip(0, 0, 1, 1, 2, 2)).item() == pytest.approx(7 / 12)
    one_slot = torch.ones(1, 1, 1, 6)  # 3 of 6 pixels for object 1, nothing for object 2
    assert metrics.miou(true, present, one_slot).item() == pytest.approx(1 / 4)
    assert metrics.miou(true, present & False, one_slot).isnan().all()
    assert metrics.miou(true, torch.ones(1, 4, dtype=bool), true).item() == pytest.approx(2 / 3)
    absent = torch.tensor([[True, False, True, False]])  # object 1 has pixels but is not scored
    assert metrics.miou(true, absent, one_slot).item() == pytest.approx(1 / 6)


def greedy(true, present, predicted):
    """The best pair first, then the best of what is left."""
    table, total = iou_table(true[0], predicted[0])[1:] * present[0, 1:, None].numpy(), 0.0
    for _ in range(min(table.shape)):
        e, k = np.unravel_index(table.argmax(), table.shape)
        total += table[e, k]
        table[e], table[:, k] = 0, 0
    return [total / present[0, 1:].sum().item()]


def all_rows(true, present, predicted):
    return metrics.miou(true, present, predicted) * present[:, 1:].sum(1) / (true.shape[1] - 1)


def with_background(true, present, predicted):
    return metrics.miou(F.pad(true, (0, 0, 0, 0, 1, 0)), F.pad(present, (1, 0)), predicted)


def no_matching(true, present, predicted):
    """Each object takes its best slot, whoever else has it."""
    iou = metrics._iou(metrics._contingency(true, predicted))[:, 1:]
    return (iou.amax(2) * present[:, 1:]).sum(1) / present[:, 1:].sum(1)


@pytest.mark.parametrize("mutant", [greedy, all_rows, with_background, no_matching])
def test_miou_mutants_fail(mutant):
    def check(miou):
        present = torch.tensor([[True, True, True, False]])
        for true, predicted in (
            (strip(0, 0, 1, 1, 1, 2, 2, 2, 2, 2), strip(0, 0, 1, 1, 1, 1, 1, 1, 2, 2)),
            (strip(1, 1, 1, 1, 1, 2, 2), strip(0, 0, 0, 1, 1, 0, 0)),  # greedy: 3/7 + 0 < 2/5 + 2/5
        ):
            best = best_total(iou_table(true[0], predicted[0])[1:3]) / 2
            assert float(miou(true, present, predicted.float())[0]) == pytest.approx(best)

    check(metrics.miou)
    with pytest.raises(AssertionError):
        check(mutant)


@settings(max_examples=100, deadline=None)
@given(scenes())
def test_match_is_the_best_matching(scene):
    true, predicted = scene
    slots = metrics.match(true, predicted)
    assert slots.shape == true.shape[:2] and slots.dtype == torch.int64
    for masks, soft, row in zip(true, predicted, slots.tolist(), strict=True):
        table = iou_table(masks, soft)
        chosen = [(e, k) for e, k in enumerate(row) if k >= 0]
        assert len({k for _, k in chosen}) == len(chosen)  # one to one
        assert all(table[e, k] > 0 for e, k in chosen)
        assert sum(table[e, k] for e, k in chosen) == pytest.approx(best_total(table))


def test_match_by_hand():
    true = strip(0, 0, 0, 1, 1, 2)  # entity 3 is empty
    assert metrics.match(true, strip(2, 2, 2, 0, 0, 3)).tolist() == [[2, 0, 3, -1]]
    assert metrics.match(true, strip(1, 1, 1, 0, 0, 0, number=2)).tolist() == [[1, 0, -1, -1]]
    assert metrics.match(true, strip(3, 3, 3, 0, 0, 3)).tolist() == [[3, 0, -1, -1]]  # 2 is missed
    halves = strip(2, 2, 2, 0, 3, 3)  # IoU 1 of entity 0, 1/2 of 1 and 2
    assert metrics.match(true, halves, least_iou=0.49).tolist() == [[2, 0, 3, -1]]
    assert metrics.match(true, halves, least_iou=0.5).tolist() == [[2, -1, -1, -1]]


def some_scenes():
    rng = torch.Generator().manual_seed(0)
    true = one_hot(torch.randint(4, (6, 9, 7), generator=rng), 4)
    return true, true.any((2, 3)), torch.rand(6, 5, 9, 7, generator=rng)


def test_a_scene_scores_the_same_alone_in_a_batch_and_as_an_array():
    true, present, predicted = some_scenes()
    for score in (
        metrics.ari, metrics.match, lambda t, p: metrics.miou(t, t.any(3).any(2), p)
    ):  # fmt: skip
        expected = score(true, predicted)
        alone = [score(true[i : i + 1], predicted[i : i + 1]) for i in range(6)]
        assert torch.equal(torch.cat(alone), expected)
        with_gradient = predicted.clone().requires_grad_()
        assert torch.equal(score(true.numpy()[:, :, ::-1], predicted.numpy()[:, :, ::-1]), expected)
        assert not score(true, with_gradient).requires_grad
    arrays = true.numpy(), present.numpy(), predicted.numpy()
    assert torch.equal(metrics.miou(*arrays), metrics.miou(true, present, predicted))
    image = predicted[:, :3]
    assert torch.equal(metrics.mse(image.numpy(), image.numpy() / 2), metrics.mse(image, image / 2))
    half = predicted.bfloat16()
    assert torch.equal(metrics.ari(true, half), metrics.ari(true, half.double()))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA device")
def test_cuda_scores_the_same():
    true, present, predicted = some_scenes()
    there = true.cuda(), present.cuda(), predicted.cuda()
    assert torch.equal(metrics.ari(there[0], there[2]), metrics.ari(true, predicted))
    assert torch.equal(metrics.miou(*there), metrics.miou(true, present, predicted))
    slots = metrics.match(there[0], there[2])
    assert slots.is_cuda and torch.equal(slots.cpu(), metrics.match(true, predicted))


def test_mse():
    image = torch.zeros(2, 3, 4, 5)
    guess = image.clone()
    guess[0, 1, 2, 3] = 0.5
    assert metrics.mse(image, guess).tolist() == [0.25 / 60, 0]
    assert metrics.mse(image, image + 2).tolist() == [4, 4]  # a mean, and nothing is clipped


def test_segmentation_is_all_that_the_truth_allows():
    batch = data.make("mini_sprites_16_shaded", "test").batch(0, 4)
    mean, masks = batch.image * 0.5, torch.rand(4, 3, 16, 16, generator=torch.manual_seed(0))
    scores = metrics.segmentation(batch, mean, masks)
    assert list(scores) == ["mse", "ari_fg", "ari", "miou"]
    assert scores["mse"].equal(metrics.mse(batch.image, mean))
    assert scores["ari_fg"].equal(metrics.ari(batch.masks, masks))
    assert scores["ari"].equal(metrics.ari(batch.masks, masks, foreground=False))
    assert scores["miou"].equal(metrics.miou(batch.masks, batch.present, masks))
    unlabelled = Batch(batch.image, None, None, {})
    assert list(metrics.segmentation(unlabelled, mean, masks)) == ["mse"]


def test_mean_stderr():
    summary = metrics.mean_stderr(torch.tensor([1.0, NAN, 2.0, 4.0]))
    assert summary["n"] == 3 and summary["left_out"] == 1
    assert summary["mean"] == pytest.approx(7 / 3)
    assert summary["stderr"] == pytest.approx(math.sqrt(7 / 3) / math.sqrt(3))
    assert metrics.mean_stderr([0.5]) == dict(mean=0.5, stderr=None, n=1, left_out=0)
    assert metrics.mean_stderr([NAN, None]) == dict(mean=None, stderr=None, n=0, left_out=2)
    assert metrics.mean_stderr([math.inf, 1]) == dict(mean=None, stderr=None, n=2, left_out=0)
    assert metrics.mean_stderr(torch.tensor([True, False]))["mean"] == 0.5
    for values in ([], [NAN], [1.0], [1.0, -math.inf], np.arange(5), torch.ones(2, 3)):
        json.dumps(metrics.mean_stderr(values), allow_nan=False)


TRUE, PRESENT = strip(0, 1, 2, 3), torch.ones(1, 4, dtype=torch.bool)
SOFT = TRUE.float()
REFUSED = {
    "0/255": (TRUE.byte() * 255, SOFT, "bool"),
    "float truth": (TRUE.float(), SOFT, "bool"),
    "two entities in a pixel": (TRUE | strip(1, 1, 1, 1), SOFT, "exactly one"),
    "no entity in a pixel": (TRUE & False, SOFT, "exactly one"),
    "truth without batch": (TRUE[0], SOFT, r"\(B, E, H, W\)"),
    "prediction without batch": (TRUE, SOFT[0], r"\(B, K, H, W\)"),
    "another size": (TRUE, SOFT[..., :3], r"\(1, 4, 1, 3\)"),
    "another number of scenes": (TRUE, SOFT.repeat(2, 1, 1, 1), r"\(2, 4, 1, 4\)"),
    "no slots": (TRUE, SOFT[:, :0], r"K > 0"),
    "NaN": (TRUE, SOFT.masked_fill(TRUE, NAN), "NaN"),
    "prediction of 0/255": (TRUE, TRUE.byte() * 255, "float or bool"),
    "overlapping bool prediction": (TRUE, TRUE | strip(1, 1, 1, 1), "exactly one"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_no_mask_is_refused(name):
    true, predicted, message = REFUSED[name]
    for score in (
        metrics.ari,
        metrics.match,
        lambda t, p: metrics.ari(t, p, False),
        lambda t, p: metrics.miou(t, PRESENT, p),
    ):
        for arrays in (False, True):
            given = (true.numpy(), predicted.numpy()) if arrays else (true, predicted)
            with pytest.raises(ValueError, match=message) as error:
                score(*given)
            assert "\n" not in str(error.value)


def test_other_bad_arguments_are_refused():
    image = torch.zeros(1, 3, 4, 5)
    for other, message in ((image[:, :1], "both be floats"), (image.byte(), "floats"),
                           (image + NAN, "NaN")):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            metrics.mse(image, other)


def test_box_iou_is_the_best_assignment():
    """Against all one-to-one assignments, pixel by pixel on a fine grid."""
    rng, grid = torch.Generator().manual_seed(0), (torch.arange(0, 12, 0.25) + 0.125).double()

    def paint(box):
        inside = (grid > box[:2, None]) & (grid < (box[:2] + box[2:])[:, None])
        return inside[0][:, None] & inside[1]

    for present, used in ((1, 1), (2, 1), (2, 3), (3, 2)):
        boxes = torch.randint(0, 16, (2, 3, 4), generator=rng) / 4 + torch.tensor([0, 0, 1.0, 1.0])
        a, b = ([paint(box) for box in some] for some in boxes)
        table = np.array([[(x & y).sum() / (x | y).sum() for y in b[:used]] for x in a[:present]])
        there, taken = torch.arange(3) < present, torch.arange(3) < used
        value = metrics.box_iou(boxes[:1], there[None], boxes[1:], taken[None])
        assert value.item() == pytest.approx(best_total(table) / present, abs=1e-6)


def test_box_iou_conventions():
    box, yes = torch.tensor([[[1.0, 2.0, 3.0, 4.0]]]), torch.tensor([[True]])
    no = ~yes
    assert metrics.box_iou(box, yes, box, yes).item() == 1
    assert metrics.box_iou(box, yes, box, no).item() == 0
    assert metrics.box_iou(box, no, box, yes).isnan().all()  # no objects: no score


def test_identity_swaps():
    """Two objects that pass each other; boxes keep, exchange, lose and renew their identities."""
    col = torch.tensor([[0.0, 30], [10, 20], [20, 10], [30, 0]])  # (T, E)
    true = torch.stack([torch.zeros_like(col), col, *[torch.full_like(col, 12)] * 2], -1)[None]
    present = torch.ones(1, 4, 2, dtype=torch.bool)
    for identity, swaps in (
        ([[1, 2]] * 4, [0] * 8), ([[2, 1]] * 4, [0] * 8),
        ([[1, 2]] * 2 + [[2, 1]] * 2, [0, 0, 0, 0, 1, 1, 0, 0]),
        ([[1, 2], [1, 2], [3, 2], [3, 2]], [0, 0, 0, 0, 1, 0, 0, 0]),
        ([[1, 2], [0, 2], [1, 2], [1, 2]], [0, 0, NAN, 0, 0, 0, 0, 0]),
    ):  # fmt: skip
        found = metrics.identity_swaps(true, present, true, torch.tensor([identity]))
        expected = torch.tensor(swaps).view(1, 4, 2)
        assert torch.equal(found.nan_to_num(-1), expected.nan_to_num(-1).double())
    # Boxes that cover both objects stay with the one that they had.
    wide = true.clone()
    wide[0, 1:3, :, 1], wide[0, 1:3, :, 3] = 5, 30
    ids = torch.tensor([[[2, 1]] * 4])
    assert metrics.identity_swaps(true, present, wide.flip(2), ids).sum() == 0
    # Of the ends alone, whatever happens between them.
    ends, ids = (v[:, [0, -1]] for v in (true, torch.tensor([[[1, 2]] * 4])))
    for box, swaps in ((ends, 0), (ends[:, :1].expand_as(ends), 2)):
        assert metrics.identity_swaps(ends, present[:, :2], box, ids, 2).sum() == swaps



def dci_of(code):
    """`code` makes codes (N, D) of perfect ones (N, 4), given random numbers too."""
    rng = np.random.default_rng(0)
    factors = dict(shape=rng.integers(3, size=400), color=rng.integers(4, size=400),
                   row=rng.random(400), col=rng.random(400))  # fmt: skip
    perfect = np.stack([*factors.values()], 1)
    return metrics.dci(code(perfect - perfect.mean(0), rng), factors)


def test_dci_of_a_perfect_a_rotated_and_no_code():
    for order in ([0, 1, 2, 3], [2, 0, 3, 1]):
        scores = dci_of(lambda perfect, rng, order=order: perfect[:, order])
        for name in ("disentanglement", "completeness", "accuracy", "r2"):
            assert 0.98 < scores[name] <= 1, name
        assert scores["informativeness"].keys() == {"shape", "color", "row", "col"}
    scores = dci_of(lambda perfect, rng: rng.normal(size=perfect.shape))
    assert scores["disentanglement"] < 0.1 and scores["completeness"] < 0.1
    assert scores["accuracy"] < 0.4 and scores["r2"] < 0.1  # chance: 1/3 and 1/4; 0
    # A rotation is informative and entangled.
    turn = lambda rng: np.linalg.qr(rng.normal(size=(4, 4)))[0]  # noqa: E731
    scores = dci_of(lambda perfect, rng: perfect / perfect.std(0) @ turn(rng))
    assert scores["disentanglement"] < 0.5 and scores["completeness"] < 0.5
    assert scores["accuracy"] > 0.7 and scores["r2"] > 0.6


def test_dci_by_hand(monkeypatch):
    """From importances R (latent, factor): (3/4, 0) and (1/4, 1)."""
    importances = iter([[0.75, 0.25], [0.0, 1.0]])

    class Probe:
        def __init__(self, random_state):
            self.feature_importances_ = np.array(next(importances))

        def fit(self, codes, values):
            assert len(codes) == len(values) == 2
            return self

        def score(self, codes, values):
            return float(len(codes))

    monkeypatch.setattr(metrics, "GradientBoostingClassifier", Probe)
    monkeypatch.setattr(metrics, "GradientBoostingRegressor", Probe)
    factors = dict(shape=np.arange(5), row=np.arange(5.0))
    scores = metrics.dci(np.zeros((5, 2)), factors)
    entropy = lambda p: -p * math.log2(p) - (1 - p) * math.log2(1 - p)  # noqa: E731
    assert scores["disentanglement"] == pytest.approx(0.75 / 2 + 1.25 / 2 * (1 - entropy(0.2)))
    assert scores["completeness"] == pytest.approx((1 - entropy(0.25) + 1) / 2)
    assert scores["accuracy"] == scores["r2"] == 3  # rows that were not fitted
    for codes, some in ((np.zeros((5, 1)), factors), (np.zeros((1, 2)), factors),
                        (np.zeros((5, 2)), dict(row=np.arange(5.0)))):  # fmt: skip
        with pytest.raises(ValueError, match="dci needs"):
            metrics.dci(codes, some)


def test_dci_takes_columns_and_leaves_out_what_says_nothing_new():
    rng = np.random.default_rng(0)
    color_id, place = rng.integers(2, size=80), rng.random((80, 2))
    factors = dict(place=place, color=np.eye(3)[color_id], color_id=color_id, light=np.ones(80))
    scores = metrics.dci(torch.randn(80, 2), factors)
    assert [*scores["informativeness"]] == ["place 0", "place 1", "color_id"]


def test_probe_scores_the_second_half_of_the_rows():
    rng = np.random.default_rng(0)
    latents = rng.normal(size=(400, 4))
    targets = dict(
        row=latents[:, 0] * 2 - latents[:, 1] + 3,  # linear
        square=latents[:, 2] ** 2,  # not linear
        side=(latents[:, 3] > 0).astype(int),  # separable
        coin=rng.integers(2, size=400),
        color=latents[:, :3] @ rng.normal(size=(3, 3)),
        light=np.ones(400),
        late=np.repeat([0, 1], 200),  # one class in the half that fits
    )
    scores = metrics.probe(torch.from_numpy(latents).float(), targets)
    assert scores.keys() == targets.keys() - {"light", "late"}
    assert scores["row"] > 0.999 and scores["color"] > 0.999 and scores["side"] > 0.95
    assert scores["square"] < 0.1 and 0.35 < scores["coin"] < 0.65
    by_hand = np.linalg.lstsq(np.c_[latents[:200], np.ones(200)], latents[:200, 2] ** 2, rcond=None)
    error = latents[200:, 2] ** 2 - np.c_[latents[200:], np.ones(200)] @ by_hand[0]
    r2 = 1 - (error**2).sum() / (latents[200:, 2] ** 2).var() / 200
    assert scores["square"] == pytest.approx(r2, abs=1e-5)


HUES = dict(K=(0, 0, 0), R=(1, 0, 0), r=(0.5, 0, 0), G=(0, 0.9, 0), Y=(0.8, 0.8, 0))


def same_partition(found, labels):
    return found.shape[1] == len(np.unique(labels)) and metrics.ari(
        one_hot([labels], 9), found, foreground=False
    ).item() == 1  # fmt: skip


def test_connected_components_by_hand():
    image = torch.tensor([[HUES[c] for c in row] for row in ("RrKG", "rKKY", "KKKR")])
    found = results.no_learning(image.movedim(-1, 0), num_slots=2, seed=0)["one_hue"]
    assert same_partition(found, [[0, 0, 1, 2], [0, 1, 1, 3], [1, 1, 1, 4]])
    found = results.no_learning(image[None, ..., 0], num_slots=2, seed=0)["one_hue"]  # brightness
    assert same_partition(found, [[0, 1, 2, 2], [3, 2, 2, 4], [2, 2, 2, 5]])


def test_kmeans_uses_colour_and_place():
    image = torch.zeros(1, 6, 6)
    halves = [[0, 0, 0, 1, 1, 1]] * 6
    image[:, 2:4, 1:5] = 0.2  # too faint to count against place
    labels = results.no_learning(image, num_slots=2, seed=0)["kmeans"]
    assert same_partition(labels, halves) or same_partition(labels, np.transpose(halves).tolist())
    image[:, 2:4, 1:5] = 1
    labels = results.no_learning(image, num_slots=2, seed=0)["kmeans"]
    assert same_partition(labels, image[0].long().tolist())


def test_voronoi_never_sees_the_image():
    image = torch.rand(3, 5, 8)
    found = results.no_learning(image, num_slots=4, seed=1)["voronoi"]
    assert np.array_equal(found, results.no_learning(image * 0, num_slots=4, seed=1)["voronoi"])
    points = np.random.default_rng(1).random((4, 2))
    for row, col in np.ndindex(5, 8):
        distance = np.linalg.norm(points - [(row + 0.5) / 5, (col + 0.5) / 8], axis=1)
        assert found[0, distance.argmin(), row, col]


def fake_scenes(coverage, often=True):
    def batch(start, size):
        labels = torch.tensor([[0, 1, 1], [0, 2, 2]]).repeat(size, 1, 1)
        present = torch.ones(size, 3, dtype=torch.bool)
        present[:, 2] = (torch.arange(start, start + size) % 4 != 0) == often
        return Batch(labels[:, None] / 2, one_hot(labels, 3), present, {}, coverage)

    return SimpleNamespace(name="n", split="test", seed=3, max_entities=3, batch=batch, count=400,
                           length=1, scenes=lambda index: batch(int(index[0]), len(index)))


def test_floors_of_a_dataset(monkeypatch):
    content = results.dataset_floors(fake_scenes(None))
    json.dumps(content, allow_nan=False)
    assert content["dataset"] == "n" and content["num_slots"] == 3 and content["scenes"] == 320
    hue, voronoi = content["floors"]["one_hue"], content["floors"]["voronoi"]
    assert [hue[k]["mean"] for k in ("ari_fg", "ari", "miou")] == [1, 1, 1]
    assert 0 < voronoi["miou"]["mean"] < 0.9 and voronoi["ari"]["n"] == 320
    # In training the frequent number is another one than here.
    monkeypatch.setattr(data, "make", lambda *_: fake_scenes(torch.ones(1), often=False))
    floors = results.dataset_floors(fake_scenes(torch.ones(1)))["floors"]
    assert floors["most_frequent_count"]["count_accuracy"]["mean"] == 0.25


@pytest.mark.parametrize("path", sorted(results.RESULTS.glob("floors-*.json")),
                         ids=lambda path: path.stem)
def test_committed_floors_are_the_commands(path):
    """Counts and segments of two small data sets; of the others a few scenes, unscored: k-means
    may differ between versions of scikit-learn."""
    content = json.loads(path.read_text())
    assert path.name == f"floors-{content['dataset']}.json" and content["split"] == "test"
    scenes = data.make(content["dataset"], "test", content["seed"])
    scored = scenes.name in ("mini_sprites", "sprites_3_32")
    with pytest.MonkeyPatch.context() as patch:
        for name, number in dict(FLOOR_SCENES=4, COUNT_IMAGES=40).items() if not scored else ():
            patch.setattr(results, name, number)
        again = results.dataset_floors(scenes)
    assert again.keys() == content.keys() and again["command"] == content["command"]
    assert again["floors"].keys() == content["floors"].keys()
    for name, scores in again["floors"].items() if scored else ():
        for metric, score in scores.items() if name != "kmeans" else ():
            assert content["floors"][name][metric] == pytest.approx(score), (name, metric)
    assert again["num_slots"] == content["num_slots"]
