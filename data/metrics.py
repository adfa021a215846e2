"""How well a model takes scenes apart: ARI, mIoU, MSE and so on.

Conventions, which differ between published implementations and move the numbers:

- The argmax over slots turns soft masks into segments; the lowest slot number wins a tie.
- A scene that a score is undefined for (no foreground, nothing present) scores NaN; `mean_stderr`
  leaves it out and counts it.
- What is no set of masks is refused, not repaired: masks of 0/255 shift the ARI a little, unseen.

Arguments are tensors or arrays. All is computed in float64 on the CPU, as some devices have none,
and without gradients. ValueError, in one line, for masks whose shapes do not fit, true ones that
are not bool or not exclusive, and predictions that hold NaN.

Axes: B scenes, E entities (0 is the background), K slots, C H W image.
"""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from scipy.stats import entropy, sem
from sklearn.ensemble import GradientBoostingClassifier, GradientBoostingRegressor
from sklearn.linear_model import LinearRegression, LogisticRegression
from torch import Tensor
from torch.nn import functional as F

from data import Batch

Values = Tensor | np.ndarray


def ari(true_masks: Values, predicted: Values, foreground: bool = True) -> Tensor:
    """Adjusted Rand index of each scene: (B,) float64 in [-0.5, 1]; 1 perfect.

    Hubert & Arabie (1985). With n_ek the number of pixels of entity e in segment k,

        index = Σ_ek C(n_ek, 2),  a = Σ_e C(n_e., 2),  b = Σ_k C(n_.k, 2),  total = C(n, 2)
        ARI = (index - a b / total) / ((a + b) / 2 - a b / total)

    0 is the mean over segments of scattered pixels; those in one piece score more.
    true_masks: (B, E, H, W) bool, exactly one entity per pixel, entity 0 the background.
    predicted: (B, K, H, W), floats, whose argmax over K decides, or exclusive bool.
    `foreground` leaves out the pixels of entity 0: the papers' ARI, blind to what the slots do with
    the background. NaN for a scene without foreground. A single object makes the formula 0/0 where
    it is found whole; as in scikit-learn, which sees the foreground pixels only, that scores 1, and
    0 where it is split. With foreground=False the background is one more entity.
    """
    counts = _contingency(true_masks, predicted)  # (B, E, K)
    if foreground:
        counts = counts[:, 1:]
    # Pixels, and ordered pairs of them in one entity, in one segment, in both: (B,) each
    number, together = counts.sum((1, 2)), counts.square().sum((1, 2))
    true, found = counts.sum(2).square().sum(1), counts.sum(1).square().sum(1)
    only_true, only_predicted = true - together, found - together
    both, neither = together - number, number.square() - true - found + together  # of two pixels
    # The formula above times 8 total: these four are whole numbers, so equality below is exact.
    numerator = 2 * (both * neither - only_true * only_predicted)
    denominator = (both + only_true) * (only_true + neither)
    denominator = denominator + (both + only_predicted) * (only_predicted + neither)
    score = numerator / denominator
    score = torch.where((only_true == 0) & (only_predicted == 0), 1.0, score)  # the same partition
    return torch.where(number > 0, score, math.nan)


def miou(true_masks: Values, present: Values, predicted: Values) -> Tensor:
    """Mean intersection over union of each scene's objects: (B,) float64 in [0, 1], 1 perfect.

        max over one-to-one matchings k(e) of   1/n Σ_{e present, e > 0} IoU(object e, segment k(e))

    true_masks, predicted: as for `ari`. present: (B, E) bool; present[:, 0] is not read.
    Any slot may serve an object; the background is left out. An object that gets no slot (K < n)
    counts 0, and so does one that is present but hidden. NaN where no object is present.
    """
    iou = _iou(_contingency(true_masks, predicted))[:, 1:]  # (B, E-1, K)
    present = _cpu(present)
    # An absent object takes a slot only where it costs nothing. 0/0 is a scene without objects.
    return _best_total(iou * present[:, 1:, None]) / present[:, 1:].sum(1)


def match(true_masks: Values, predicted: Values, least_iou: float = 0.0) -> Tensor:
    """The slot that each entity, the background included, is matched with: (B, E) int64.

    The one-to-one matching that maximises the total IoU; -1 for an entity without a slot: there are
    more entities than slots, or its IoU with the slot that is left is not above `least_iou` (0:
    they share no pixel). true_masks, predicted: as for `ari`. The result is where true_masks is.
    """
    iou = _iou(_contingency(true_masks, predicted)).numpy()  # (B, E, K)
    slots = np.full(iou.shape[:2], -1)
    for row, table in zip(slots, iou, strict=True):
        entity, slot = linear_sum_assignment(table, maximize=True)
        row[entity] = np.where(table[entity, slot] > least_iou, slot, -1)
    return torch.from_numpy(slots).to(getattr(true_masks, "device", "cpu"))


def box_iou(true: Values, present: Values, boxes: Values, used: Values) -> Tensor:
    """Mean IoU of a scene's objects with their boxes: (B,) float64 in [0, 1], 1 perfect.

    That of the one-to-one matching with the largest sum. An object without a box counts 0; a box
    without an object costs nothing. NaN for a scene without objects.

    true (B, E, 4), boxes (B, K, 4): top, left, height, width in pixels, sizes above 0 where used;
    present (B, E), used (B, K) bool: which of them are there.
    """
    true, present, boxes, used = map(_cpu, (true, present, boxes, used))
    return _best_total(_box_table(true, present, boxes, used)) / present.sum(1)


def identity_swaps(true: Values, present: Values, boxes: Values, identities: Values,
                   least_iou: float = 0.1) -> Tensor:
    """Whether an object's box has another identity than its last box had: (B, T, E) float64, 1 or
    0; NaN where the object has no box.

    A box stays with the object that had its identity before while their IoU is `least_iou` or more
    (CLEAR MOT's way); the others are matched one to one for the largest sum of IoU, however small
    it is. true (B, T, E, 4), boxes (B, T, K, 4) as in `box_iou`; present (B, T, E) bool; identities
    (B, T, K), 0: no box.
    """
    true, present, boxes, identities = map(_cpu, (true, present, boxes, identities))
    flat = (v.flatten(0, 1) for v in (true, present, boxes, identities > 0))
    iou = _box_table(*flat).unflatten(0, present.shape[:2])  # (B, T, E, K)
    swaps, last = torch.full_like(iou[..., 0], math.nan), torch.zeros_like(iou[:, 0, :, 0])
    for b, t in np.ndindex(present.shape[:2]):
        same = (identities[b, t] == last[b, :, None]) & (iou[b, t] >= least_iou)
        for e, k in zip(*linear_sum_assignment(iou[b, t] + 2 * same, maximize=True), strict=True):
            if iou[b, t, e, k] > 0:
                swaps[b, t, e] = last[b, e] not in (0, identities[b, t, k])
                last[b, e] = identities[b, t, k]
    return swaps


def mse(image: Values, reconstruction: Values) -> Tensor:
    """Squared error per value, Σ (image - reconstruction)² / (C H W): (B,) float64, 0 perfect.

    Both (B, C, H, W) floats on the scale [0, 1] of the image: integers, which would be on that of
    0 to 255, are refused. (Some papers print the sum over C, H and W instead.)
    """
    image, reconstruction = _cpu(image), _cpu(reconstruction)
    fits = image.ndim == 4 and image.shape == reconstruction.shape
    floats = image.is_floating_point() and reconstruction.is_floating_point()
    if not (fits and floats) or reconstruction.isnan().any():
        raise ValueError(f"image and reconstruction must both be floats (B, C, H, W) without NaN, "
                         f"not {tuple(image.shape)} and {tuple(reconstruction.shape)}")  # fmt: skip
    return (image.double() - reconstruction.double()).square().mean((1, 2, 3))


def segmentation(batch: Batch, mean: Tensor, masks: Tensor) -> dict[str, Tensor]:
    """`mse` and, where true masks are known, `ari_fg`, `ari`, `miou` of each scene: (B,) each."""
    scores, known = dict(mse=mse(batch.image, mean)), batch.masks
    if known is not None:
        scores |= dict(ari_fg=ari(known, masks), ari=ari(known, masks, foreground=False),
                       miou=miou(known, batch.present, masks))
    return scores


def probe(latents: Values, targets: Mapping[str, Values]) -> dict[str, float]:
    """How well a linear map reads each factor off the latents (IODINE, section 4.2, Fig. 5).

    R² (at most 1) of a regression for floats, accuracy of a logistic one for integers. latents
    (N, D), targets (N,) or (N, C): the first half of the rows fits the maps, the second scores
    them. What is constant in the first half is left out.
    """
    z, scores = _cpu(latents).numpy(), {}
    half = len(z) // 2
    for name, values in targets.items():
        y = _cpu(values).numpy()
        if len(np.unique(y[:half], axis=0)) > 1:
            probe = LinearRegression() if y.dtype.kind == "f" else LogisticRegression(max_iter=1000)
            scores[name] = float(probe.fit(z[:half], y[:half]).score(z[half:], y[half:]))
    return scores


def dci(codes: Values, factors: Mapping[str, Values]) -> dict[str, Any]:
    """Disentanglement, completeness, informativeness of codes (Eastwood & Williams 2018), 1 best.

    Gradient-boosted trees predict each factor j from all codes d; R_dj is how much they use d.

        disentanglement = Σ_d w_d (1 - H(R_d. / Σ_j R_dj) / log J),   w_d = Σ_j R_dj / Σ R
        completeness    = mean over j of 1 - H(R_.j / Σ_d R_dj) / log D
        accuracy, r2    = informativeness: the mean score of the factors that are classes, numbers

    codes (N, D), D > 1; factors: integers (N,) for classes, floats (N,) or (N, C) for numbers, each
    column a factor. The first half of the rows fits the trees, the second scores them. Left out:
    what is constant, and `color` beside `color_id`; J > 1 must remain. None for the mean of a kind
    that is not there. (EfficientMORL's authors count exact hits of numbers too: there are none.)
    """
    codes, columns = _cpu(codes).double().numpy(), {}
    train = len(codes) // 2
    for name, values in factors.items():
        y = _cpu(values).numpy()
        if not (name == "color" and "color_id" in factors):
            columns |= {name: y} if y.ndim == 1 else {f"{name} {i}": v for i, v in enumerate(y.T)}
    columns = {name: y for name, y in columns.items() if len(np.unique(y[:train])) > 1}
    if codes.ndim != 2 or codes.shape[1] < 2 or len(columns) < 2:
        raise ValueError(f"dci needs codes (N, D > 1), two factors: {codes.shape}, {len(columns)}")
    importance, scores, means = [], {}, {"accuracy": [], "r2": []}
    for name, y in columns.items():
        numbers = y.dtype.kind == "f"
        trees = GradientBoostingRegressor if numbers else GradientBoostingClassifier
        trees = trees(random_state=0).fit(codes[:train], y[:train])
        importance.append(trees.feature_importances_)
        scores[name] = float(trees.score(codes[train:], y[train:]))
        means["r2" if numbers else "accuracy"].append(scores[name])
    importance = np.stack(importance, 1)  # (D, J)
    return dict(
        disentanglement=float(_concentration(importance) @ importance.sum(1) / importance.sum()),
        completeness=float(_concentration(importance.T).mean()),
        **{kind: float(np.mean(values)) if values else None for kind, values in means.items()},
        informativeness=scores,
    )


def mean_stderr(values: Any) -> dict[str, float | int | None]:
    """`{mean, stderr, n, left_out}` of a tensor, array or list of scores, ready for JSON.

    NaN and None are left out and counted; n counts the rest. stderr = sqrt(Σ (v - mean)² / (n - 1)
    / n). None, as JSON knows neither NaN nor infinity, for what is no finite number.
    """
    values = _cpu(values).double() if isinstance(values, Tensor) else values
    values = np.asarray(values, dtype=np.float64).ravel()
    kept = values[~np.isnan(values)]
    with np.errstate(all="ignore"):  # infinite values
        found = dict(mean=kept.mean() if len(kept) else math.nan,
                     stderr=sem(kept) if len(kept) > 1 else math.nan)
    found = {name: float(v) if math.isfinite(v) else None for name, v in found.items()}
    return found | dict(n=len(kept), left_out=len(values) - len(kept))


def _concentration(weights: np.ndarray) -> np.ndarray:
    """1 - entropy of a row over that of the uniform one: (R, V) >= 0 -> (R,), 0 for zeros."""
    return 1 - entropy(weights + np.finfo(float).tiny, base=weights.shape[1], axis=1)


def _contingency(true_masks: Values, predicted: Values) -> Tensor:
    """Pixels that entity e and segment k share: (B, E, K) float64, whole numbers."""
    true, predicted = _cpu(true_masks), _cpu(predicted)
    if true.ndim != 4 or predicted.ndim != 4 or true[:, :1].shape != predicted[:, :1].shape:
        raise ValueError(f"masks must be (B, E, H, W) and (B, K, H, W), K > 0, not "
                         f"{tuple(true.shape)} and {tuple(predicted.shape)}")  # fmt: skip
    known = predicted.is_floating_point() or predicted.dtype == torch.bool
    if true.dtype != torch.bool or not known:
        raise ValueError(f"true masks must be bool, predicted ones float or bool, not {true.dtype} "
                         f"and {predicted.dtype} (of masks of 0/255: masks > 127)")  # fmt: skip
    for masks in (true, predicted):
        if masks.dtype == torch.bool and not (masks.sum(1) == 1).all():
            raise ValueError("bool masks must put each pixel into exactly one segment")
    if predicted.isnan().any():
        raise ValueError("the predicted masks hold NaN")
    segments = F.one_hot((predicted * 1.0).argmax(1), predicted.shape[1])  # (B, H, W, K)
    return torch.einsum("behw, bhwk -> bek", true.double(), segments.double())


def _iou(counts: Tensor) -> Tensor:
    """Intersection over union of entities and segments, 0 for two empty ones: (B, E, K)."""
    union = counts.sum(2, keepdim=True) + counts.sum(1, keepdim=True) - counts
    return counts / union.clamp(min=1)


def _box_table(true: Tensor, present: Tensor, boxes: Tensor, used: Tensor) -> Tensor:
    """IoU of every object with every box, 0 where one is not there: (B, E, K) float64."""
    true, boxes = true.double()[:, :, None], boxes.double()[:, None]  # (B, E, 1, 4), (B, 1, K, 4)
    ends = torch.minimum(true[..., :2] + true[..., 2:], boxes[..., :2] + boxes[..., 2:])
    shared = (ends - torch.maximum(true[..., :2], boxes[..., :2])).clamp(min=0).prod(-1)
    union = true[..., 2:].prod(-1) + boxes[..., 2:].prod(-1) - shared
    return torch.where(present[:, :, None] & used[:, None], shared / union, 0.0)


def _best_total(iou: Tensor) -> Tensor:
    """The largest sum over one-to-one matchings: (B, E, K) -> (B,) float64."""
    total = [table[linear_sum_assignment(table, maximize=True)].sum() for table in iou.numpy()]
    return torch.tensor(total, dtype=torch.float64)


def _cpu(values: Values) -> Tensor:
    """A tensor on the CPU without its graph; of an array, a copy."""
    values = values if isinstance(values, Tensor) else torch.as_tensor(np.array(values))
    return values.detach().cpu()
