"""How well a model takes scenes apart: ARI, mIoU, MSE, one value per scene, and their summary.

Conventions, which differ between published implementations and move the numbers:

- The argmax over slots turns soft masks into segments; the lowest slot number wins a tie.
- A scene that a score is undefined for (no foreground, nothing present) scores NaN; `mean_stderr`
  leaves it out and counts it.
- What is no set of masks is refused, not repaired: 0/255 masks multiply the pair counts of the ARI
  and shift it a little, which nobody notices.

Everything is computed in float64, without gradients, on the device of its arguments. Every function
raises ValueError, with a line that says what is wrong, for shapes that do not fit, true masks that
are not bool or not exclusive, and predictions that hold NaN.

Axes: B scenes, E entities (0 is the background), K slots, C H W image.
"""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from einops import rearrange
from scipy.optimize import linear_sum_assignment
from scipy.special import entr
from sklearn.ensemble import GradientBoostingClassifier, GradientBoostingRegressor
from torch import Tensor
from torch.nn import functional as F


@torch.no_grad()
def ari(true_masks: Tensor, predicted: Tensor, foreground: bool = True) -> Tensor:
    """Adjusted Rand index of each scene: (B,) float64 in [-0.5, 1], 1 perfect, 0 chance.

    Hubert & Arabie (1985). With n_ek the number of pixels of entity e in segment k,

        index = Σ_ek C(n_ek, 2),  a = Σ_e C(n_e., 2),  b = Σ_k C(n_.k, 2),  total = C(n, 2)
        ARI = (index - a b / total) / ((a + b) / 2 - a b / total)

    true_masks: (B, E, H, W) bool, exactly one entity per pixel, entity 0 the background.
    predicted: (B, K, H, W), floats, whose argmax over K decides, or exclusive bool.

    `foreground` leaves out the pixels of entity 0: the papers' ARI, blind to what the slots do with
    the background. NaN for a scene without foreground. A single object makes the formula 0/0 where
    it is found whole; as in scikit-learn, which sees the foreground pixels only, that scores 1, and
    0 where it is split. With foreground=False the background is one more entity.
    """
    _check_masks(true_masks)
    segments = _segments(predicted, true_masks)
    counts = _contingency(true_masks, segments)  # (B, E, K)
    if foreground:
        counts = counts[:, 1:]

    number = counts.sum((1, 2))  # pixels, (B,)
    both = _pairs(counts).sum((1, 2))  # pairs of pixels together in truth and prediction, (B,)
    only_true = _pairs(counts.sum(2)).sum(1) - both
    only_predicted = _pairs(counts.sum(1)).sum(1) - both
    neither = _pairs(number) - both - only_true - only_predicted
    # The formula above times 2 total: these four are whole numbers, so equality below is exact.
    numerator = 2 * (both * neither - only_true * only_predicted)
    denominator = (both + only_true) * (only_true + neither)
    denominator = denominator + (both + only_predicted) * (only_predicted + neither)
    score = numerator / denominator
    score = torch.where((only_true == 0) & (only_predicted == 0), 1.0, score)  # the same partition
    return torch.where(number > 0, score, math.nan)


@torch.no_grad()
def miou(true_masks: Tensor, present: Tensor, predicted: Tensor) -> Tensor:
    """Mean intersection over union of each scene's objects: (B,) float64 in [0, 1], 1 perfect.

        max over one-to-one matchings k(e) of   1/n Σ_{e present, e > 0} IoU(object e, segment k(e))

    true_masks, predicted: as for `ari`. present: (B, E) bool; present[:, 0] is not read.

    Any slot may serve an object; the background is left out. An object that gets no slot (K < n)
    counts 0, and so does one that is present but hidden. NaN where no object is present.
    """
    _check_masks(true_masks)
    if present.dtype != torch.bool or present.shape != true_masks.shape[:2]:
        raise ValueError(
            f"present must be bool {tuple(true_masks.shape[:2])}, "
            f"not {present.dtype} {tuple(present.shape)}"
        )
    segments = _segments(predicted, true_masks)
    present = present[:, 1:]
    iou = _iou(_contingency(true_masks, segments))[:, 1:]  # (B, E-1, K)
    iou = iou * present[..., None]  # an absent object takes a slot only where it costs nothing
    total = [
        table[linear_sum_assignment(table, maximize=True)].sum() for table in iou.cpu().numpy()
    ]
    total = torch.tensor(total, dtype=torch.float64, device=iou.device)  # (B,)
    return total / present.sum(1)  # 0/0 is the NaN of a scene without objects


@torch.no_grad()
def match(true_masks: Tensor, predicted: Tensor, least_iou: float = 0.0) -> Tensor:
    """The slot that each entity, the background included, is matched with: (B, E) int64.

    The one-to-one matching that maximises the total IoU; -1 for an entity without a slot: it is
    empty, its IoU with the slot that would be left for it is not above `least_iou` (0: they share
    no pixel), or there are more entities than slots. For colours and probes, which want to know
    what each slot stands for; `miou` has its own.

    true_masks, predicted: as for `ari`.
    """
    _check_masks(true_masks)
    iou = _iou(_contingency(true_masks, _segments(predicted, true_masks)))  # (B, E, K)
    slots = np.full(iou.shape[:2], -1)
    for row, table in zip(slots, iou.cpu().numpy(), strict=True):
        entity, slot = linear_sum_assignment(table, maximize=True)
        row[entity] = np.where(table[entity, slot] > least_iou, slot, -1)
    return torch.from_numpy(slots).to(true_masks.device)


@torch.no_grad()
def box_iou(true: Tensor, present: Tensor, boxes: Tensor, used: Tensor) -> Tensor:
    """Mean over the objects of a scene of the IoU with their boxes: (B,) float64 in [0, 1].

    IoU = area of the intersection / area of the union, of the one-to-one matching with the largest
    sum. An object without a box counts 0; a box without an object costs nothing. NaN for a scene
    without objects.

    true (B, E, 4), boxes (B, K, 4): top, left, height, width in pixels, sizes above 0 where used;
    present (B, E), used (B, K) bool: which of them are there.
    """
    if true.ndim != 3 or boxes.ndim != 3 or true.shape[-1] != 4 or boxes.shape[-1] != 4:
        raise ValueError(f"boxes must be (B, E, 4) and (B, K, 4), not {tuple(true.shape)} and "
                         f"{tuple(boxes.shape)}")  # fmt: skip
    if present.shape != true.shape[:2] or used.shape != boxes.shape[:2] or len(true) != len(boxes):
        raise ValueError(f"present must be {tuple(true.shape[:2])} and used "
                         f"{tuple(boxes.shape[:2])}, of as many scenes")  # fmt: skip
    true, boxes = true.double()[:, :, None], boxes.double()[:, None]  # (B, E, 1, 4), (B, 1, K, 4)
    ends = torch.minimum(true[..., :2] + true[..., 2:], boxes[..., :2] + boxes[..., 2:])
    shared = (ends - torch.maximum(true[..., :2], boxes[..., :2])).clamp(min=0).prod(-1)
    union = true[..., 2:].prod(-1) + boxes[..., 2:].prod(-1) - shared  # (B, E, K)
    both = present[:, :, None] & used[:, None]
    iou = torch.where(both, shared / union, 0.0).cpu().numpy()
    total = [table[linear_sum_assignment(table, maximize=True)].sum() for table in iou]
    return torch.tensor(total, dtype=torch.float64, device=true.device) / present.sum(1)


@torch.no_grad()
def mse(image: Tensor, reconstruction: Tensor) -> Tensor:
    """Squared error per value, Σ (image - reconstruction)² / (C H W): (B,) float64, 0 perfect.

    Both (B, C, H, W) floats on the scale [0, 1] of the image. (Some papers print the sum over C, H
    and W instead.) Raises ValueError also for integers, which would be on the scale of 0 to 255.
    """
    if image.ndim != 4 or image.shape != reconstruction.shape:
        raise ValueError(
            f"image and reconstruction must both be (B, C, H, W), "
            f"not {tuple(image.shape)} and {tuple(reconstruction.shape)}"
        )
    if not (image.is_floating_point() and reconstruction.is_floating_point()):
        raise ValueError("image and reconstruction must be floats on the scale [0, 1]")
    if reconstruction.isnan().any():
        raise ValueError("the reconstruction holds NaN")
    return (image.double() - reconstruction.double()).square().mean((1, 2, 3))


def dci(
    codes: np.ndarray, factors: Mapping[str, np.ndarray], train: int
) -> dict[str, float | dict[str, float] | None]:
    """Disentanglement, completeness, informativeness of codes (Eastwood & Williams 2018), 1 best.

    Gradient-boosted trees predict each factor j from all codes d; R_dj is how much they use d.

        disentanglement = Σ_d w_d (1 - H(R_d. / Σ_j R_dj) / log J),   w_d = Σ_j R_dj / Σ R
        completeness    = mean over j of 1 - H(R_.j / Σ_d R_dj) / log D
        accuracy, r2    = informativeness: the mean score of the factors that are classes, numbers

    codes (N, D), D > 1; factors: J > 1 arrays (N,), integers for classes, floats for numbers. The
    first `train` rows fit the trees, the others score them (`informativeness`, by factor). (The
    authors of EfficientMORL count exact hits for both kinds: never one for a number.) None for the
    mean of a kind that is not there.
    """
    codes = np.asarray(codes, dtype=np.float64)
    if codes.ndim != 2 or codes.shape[1] < 2 or len(factors) < 2 or not 0 < train < len(codes):
        raise ValueError(f"dci needs codes (N, D > 1), two factors and 0 < train < N, not codes "
                         f"{codes.shape}, {len(factors)} factors and train {train}")  # fmt: skip
    importance, scores = [], {}
    for name, values in factors.items():
        if len(values) != len(codes):
            raise ValueError(f"factor {name} must be ({len(codes)},), not {np.shape(values)}")
        numbers = values.dtype.kind == "f"
        probe = GradientBoostingRegressor if numbers else GradientBoostingClassifier
        trees = probe(random_state=0).fit(codes[:train], values[:train])
        importance.append(trees.feature_importances_)
        scores[name] = float(trees.score(codes[train:], values[train:]))
    importance = np.stack(importance, 1)  # (D, J)
    kinds = {"accuracy": "iub", "r2": "f"}
    informativeness = {
        kind: [scores[name] for name, v in factors.items() if v.dtype.kind in letters]
        for kind, letters in kinds.items()
    }
    return dict(
        disentanglement=float(_concentration(importance) @ importance.sum(1) / importance.sum()),
        completeness=float(_concentration(importance.T).mean()),
        **{kind: float(np.mean(s)) if s else None for kind, s in informativeness.items()},
        informativeness=scores,
    )


def mean_stderr(values: Any) -> dict[str, float | int | None]:
    """`{mean, stderr, n, left_out}` of a tensor, array or list of scores, ready for JSON.

    NaN (and None) are left out and counted in `left_out`; n counts the rest. mean = Σ v / n and
    stderr = sqrt(Σ (v - mean)² / (n - 1) / n), in the unit of the values. As JSON knows neither NaN
    nor infinity, what is no finite number is None: the mean of nothing, the standard error of less
    than two values, and both where a value is infinite (which n counts).
    """
    if isinstance(values, Tensor):
        values = values.detach().double().cpu().numpy()
    values = np.asarray(values, dtype=np.float64).ravel()
    kept = values[~np.isnan(values)]
    with np.errstate(all="ignore"):  # infinite values
        mean = kept.mean() if len(kept) else math.nan
        stderr = kept.std(ddof=1) / math.sqrt(len(kept)) if len(kept) > 1 else math.nan
    return {
        "mean": float(mean) if math.isfinite(mean) else None,
        "stderr": float(stderr) if math.isfinite(stderr) else None,
        "n": len(kept),
        "left_out": len(values) - len(kept),
    }


# -- pieces ----------------------------------------------------------------------------------------


def _concentration(weights: np.ndarray) -> np.ndarray:
    """1 - entropy of a row over that of the uniform one: (R, V) >= 0 -> (R,), 0 for zeros."""
    share = weights / np.maximum(weights.sum(1, keepdims=True), np.finfo(float).tiny)
    entropy = entr(share).sum(1) / math.log(weights.shape[1])
    return np.where(weights.any(1), 1 - entropy, 0.0)


def _check_masks(masks: Tensor, name: str = "true_masks", axes: str = "(B, E, H, W)") -> None:
    if masks.ndim != 4:
        raise ValueError(f"{name} must be {axes}, not {tuple(masks.shape)}")
    if masks.dtype != torch.bool:
        raise ValueError(f"{name} must be bool, not {masks.dtype} (of masks of 0/255: masks > 127)")
    if not (masks.sum(1) == 1).all():
        raise ValueError(f"{name} must put each pixel into exactly one of {masks.shape[1]} masks")


def _segments(predicted: Tensor, true_masks: Tensor) -> Tensor:
    """The slot that each pixel belongs to, one-hot: (B, K, H, W) bool."""
    scenes, slots, *size = predicted.shape if predicted.ndim == 4 else (0, 0)
    if not slots or (scenes, *size) != (true_masks.shape[0], *true_masks.shape[2:]):
        raise ValueError(
            f"predicted must be (B, K, H, W), K > 0, for true_masks {tuple(true_masks.shape)}, "
            f"not {tuple(predicted.shape)}"
        )
    if predicted.dtype == torch.bool:
        _check_masks(predicted, "predicted", "(B, K, H, W)")
        return predicted
    if not predicted.is_floating_point():
        raise ValueError(f"predicted must be float or bool, not {predicted.dtype}")
    if predicted.isnan().any():
        raise ValueError("the predicted masks hold NaN")
    return rearrange(F.one_hot(predicted.argmax(1), slots), "b h w k -> b k h w").bool()


def _contingency(true_masks: Tensor, segments: Tensor) -> Tensor:
    """Pixels that entity e and segment k share: (B, E, K) float64, whole numbers."""
    return torch.einsum("behw, bkhw -> bek", true_masks.double(), segments.double())


def _pairs(count: Tensor) -> Tensor:
    return count * (count - 1) / 2


def _iou(counts: Tensor) -> Tensor:
    """Intersection over union of entities and segments, 0 for two empty ones: (B, E, K)."""
    union = counts.sum(2, keepdim=True) + counts.sum(1, keepdim=True) - counts
    return counts / union.clamp(min=1)
