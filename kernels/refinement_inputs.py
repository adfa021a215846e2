# ruff: noqa: RUF005 (Triton has no (*tuple, value))
"""The image-sized inputs of IODINE's refinement network (Greff et al. 2019, app. C), packed.

    channel            formula             LN  SG  channels
    image              x                           C
    means              μ_k                         C
    mask               m_k                         1
    mask_logits        a_k                         1
    mask_posterior     P_k                         1
    grad_means         ∂L/∂μ_k             ✓   ✓   C
    grad_mask          ∂L/∂a_k             ✓   ✓   1
    log_likelihood     log p(x|z)          ✓   ✓   1
    leave_one_out      log p(x|z∖k)        ✓   ✓   1
    coordinates        fixed                       N      total 3C + 6 + N: 17 for C = 3, N = 2

L = −Σ log p(x|z); symbols and closed-form gradients as in mixture.py. SG: no gradient flows back.
LN: four layer normalisations, over (C, H, W) of a slot for grad_means, over (H, W) of a slot for
grad_mask and leave_one_out, over (H, W) of an image for log_likelihood; a gain and a bias for each
of the C + 3 channels.

Paper: ∂L/∂m_k, p(x|z), p(x|z∖k). Released code: the gradient of the mask logit, and logarithms.
Here: as released, because 1/m_k overflows and densities underflow in float32.

Backward, from the cotangents dμ dm da dP of the unstopped channels and dL of the likelihood:

    logit:  da + m_k (dm_k − Σ_j m_j dm_j) + dL (r_k − m_k)
    means:  dμ_c + s_kc (dL r_k + P_k (dP_k − Σ_j P_j dP_j))        (for any ε in P_k)

Bytes, in numbers per pixel for C = 3, N = 2. Eager torch is counted by operation, its inputs and
outputs, with automatic differentiation | in closed form:

                         fused reads    writes     eager moves               at K = 7
    statistics           3 + 4K         1 + 4K
    normalise and pack   5 + 4K         17K
    forward, together    8 + 8K         1 + 21K    334K − 55 | 188K − 21     11 | 6 times as much
    backward             4 + 21K        4K         172K + 4  | 155K + 9      7 | 6 times

The rows of `packed` are 17 numbers, which 16-byte stores do not fit. Rows padded to 20 would allow
them, but a view of those is not contiguous in channels-last, and torch would copy it in front of
the convolution: 34K more, where the whole of forward is 9 + 29K. So the rows have no gaps. A tile
of 16 channels is turned around in shared memory and stored by half warps, 64 bytes of a row at a
time, and the parts of a sector meet in the cache. Where F is a multiple of 4 (N = 9: 24), the same
code stores 16 bytes a thread.

Axes: B batch, K slots, C colours (1 or 3), F = 3C + 6 + N channels, H W image.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

import kernels
from kernels.launch import jit, launch, tl, triton
from kernels.mixture import (
    FirstDerivative,
    Layout,
    add_contender,
    add_term,
    add_weight,
    block,
    check_inputs,
    compare_slots,
    component_log_density,
    constants,
    cotangent_planes,
    empty_contest,
    join_columns,
    launch_on_pixels,
    layout,
    load_channels,
    load_plane,
    locate,
    logsumexp_and_softmax,
    logsumexp_of_others,
    mixture_backward,
    mixture_reference,
    nats,
    new_like,
    open_slots,
    posterior,
    quotient,
    read_slot,
    refuse_bad_inputs,
    refuse_second_derivative,
    score,
    slot_terms,
    store_channels,
    tile_of,
    wide_dtype,
)


def channel_slices(num_channels: int, num_coordinates: int) -> dict[str, slice]:
    """Where each input lies on the channel axis of `RefinementInputs.packed`."""
    colours = num_channels
    widths = {"image": colours, "means": colours, "mask": 1, "mask_logits": 1, "mask_posterior": 1}
    widths |= {"grad_means": colours, "grad_mask": 1, "log_likelihood": 1, "leave_one_out": 1}
    slices, start = {}, 0
    for name, width in (widths | {"coordinates": num_coordinates}).items():
        slices[name] = slice(start, start + width)
        start += width
    return slices


CHANNELS = channel_slices(num_channels=3, num_coordinates=2)  # the paper's 17


class RefinementInputs(NamedTuple):
    """What `refinement_inputs` returns."""

    packed: Tensor  # (B, K, F, H, W)             channels-last memory per image
    log_likelihood: Tensor  # (B, H, W)           log p(x|z), nats, differentiable
    grad_decoded: Tensor  # (B, K, C+1, H, W)     of −Σ log p(x|z), constant: for the decoder's vjp


def refinement_inputs_reference(
    image: Tensor,
    decoded: Tensor,
    weight: Tensor,
    bias: Tensor,
    coordinates: Tensor,
    sigma: float,
    component: str = "gaussian",
    posterior_epsilon: float = 0.0,
    log_ratio: bool = False,
    eps: float = 1e-5,
) -> RefinementInputs:
    """`refinement_inputs` as one would write it down, with automatic differentiation."""
    image, decoded, weight, bias, coordinates = _check_inputs(
        image, decoded, weight, bias, coordinates, sigma, component, posterior_epsilon
    )
    colours, slots = image.shape[1], decoded.shape[1]
    terms = mixture_reference(image, decoded, sigma, component, posterior_epsilon)
    with torch.enable_grad():
        leaf = decoded.detach().requires_grad_()
        nll = -mixture_reference(image, leaf, sigma, component).log_likelihood.sum()
        (grad_decoded,) = torch.autograd.grad(nll, leaf)  # (B, K, C+1, H, W)
    log_likelihood = terms.log_likelihood.detach()[:, None, None]  # (B, 1, 1, H, W)
    leave_one_out = terms.leave_one_out[:, :, None]  # (B, K, 1, H, W)
    if log_ratio:
        leave_one_out = log_likelihood - leave_one_out
    stopped = [grad_decoded[:, :, :-1], grad_decoded[:, :, -1:], log_likelihood, leave_one_out]
    normalised = [F.layer_norm(value, value.shape[2:], eps=eps) for value in stopped]
    normalised[2] = normalised[2].expand_as(leave_one_out)
    affine = torch.cat(normalised, 2) * weight[:, None, None] + bias[:, None, None]
    packed = torch.cat(
        [
            image[:, None].expand(-1, slots, -1, -1, -1),
            decoded[:, :, :colours],
            terms.masks[:, :, None],
            decoded[:, :, colours:],
            terms.posterior_masks[:, :, None],
            affine,
            coordinates.expand(*decoded.shape[:2], -1, -1, -1),
        ],
        2,
    )  # (B, K, F, H, W)
    return RefinementInputs(to_channels_last(packed), terms.log_likelihood, grad_decoded)


def to_channels_last(packed: Tensor) -> Tensor:
    """The same (B, K, F, H, W), in memory as the convolution of its (B·K, F, H, W) wants it."""
    images = packed.flatten(0, 1).contiguous(memory_format=torch.channels_last)
    return images.unflatten(0, packed.shape[:2])


def _check_inputs(image, decoded, weight, bias, coordinates, sigma, component, epsilon):
    """Refuse what has no meaning; give all five at the precision of the arithmetic."""
    _refuse_bad_inputs(image, decoded, weight, bias, coordinates, sigma, component, epsilon)
    image, decoded = check_inputs(image, decoded, sigma, component, epsilon)
    wide = decoded.dtype
    return image, decoded, weight.to(wide), bias.to(wide), coordinates.detach().to(wide)


def _refuse_bad_inputs(image, decoded, weight, bias, coordinates, sigma, component, epsilon):
    """Raise ValueError, in one line, for what has no meaning."""
    refuse_bad_inputs(image, decoded, sigma, component, epsilon)
    normalised = image.shape[1] + 3
    if weight.shape != (normalised,) or bias.shape != (normalised,):
        raise ValueError(
            f"weight and bias must be ({normalised},) for {image.shape[1]} colours, "
            f"not {tuple(weight.shape)} and {tuple(bias.shape)}"
        )
    if coordinates.ndim != 3 or coordinates.shape[1:] != image.shape[2:]:
        raise ValueError(
            f"coordinates must be (N, {image.shape[2]}, {image.shape[3]}) for this image, "
            f"not {tuple(coordinates.shape)}"
        )


class _RefinementInputs(torch.autograd.Function):
    """All of it, with its backward by hand: on a CPU twice as fast as the reference under autograd.

    The work is done on contiguous planes (channels-last ones are copied once), where every torch
    operation is vectorised over pixels, and a single copy at the end turns them channels-last.
    """

    @staticmethod
    def forward(
        ctx, image, decoded, weight, bias, coordinates, sigma, component, epsilon, log_ratio, eps
    ):
        planes, slots = decoded.contiguous(), decoded.shape[1]
        means, logits = planes.split([image.shape[1], 1], 2)
        difference = image[:, None] - means  # (B, K, C, H, W)
        slope = score(difference, sigma, component)  # (B, K, C, H, W)
        log_density = component_log_density(difference, sigma, component)  # (B, K, H, W)
        log_masks, masks = logits.squeeze(2).log_softmax(1), logits.softmax(1)
        joint = log_masks + log_density  # (B, K, H, W)
        log_likelihood, responsibilities = logsumexp_and_softmax(joint)
        if slots == 1:
            leave_one_out = log_likelihood[:, None]  # (B, 1, H, W)
        else:
            leave_one_out = logsumexp_of_others(joint) - logsumexp_of_others(log_masks)
        if log_ratio:
            leave_one_out = log_likelihood[:, None] - leave_one_out
        responsibilities = responsibilities[:, :, None]  # (B, K, 1, H, W)
        grad_means = responsibilities.neg() * slope  # (B, K, C, H, W)
        grad_mask = masks - responsibilities  # (B, K, 1, H, W)
        # The likelihood's plane is the same for every slot, so to normalise per slot is per image.
        likelihood_planes = log_likelihood[:, None, None].expand_as(grad_mask)
        single = torch.cat([grad_mask, likelihood_planes, leave_one_out[:, :, None]], 2)
        by_colours = F.layer_norm(grad_means, grad_means.shape[2:], eps=eps)
        by_plane = F.layer_norm(single, single.shape[3:], eps=eps)
        normalised = torch.cat([by_colours, by_plane], 2)  # (B, K, C+3, H, W)
        posterior_masks = posterior(log_density, epsilon)[:, :, None]  # (B, K, 1, H, W)
        packed = torch.cat(
            [
                image[:, None].expand_as(means),
                means,
                masks,
                logits,
                posterior_masks,
                torch.addcmul(bias[:, None, None], normalised, weight[:, None, None]),
                coordinates.expand(*decoded.shape[:2], -1, -1, -1),
            ],
            2,
        )  # (B, K, F, H, W)
        packed = to_channels_last(packed)
        grad_decoded = torch.cat([grad_means, grad_mask], 2)  # (B, K, C+1, H, W)
        ctx.save_for_backward(
            decoded, weight, grad_decoded, slope, masks, posterior_masks, normalised
        )
        ctx.mark_non_differentiable(grad_decoded)
        return packed, log_likelihood, grad_decoded

    @staticmethod
    def backward(ctx, d_packed, d_log_likelihood, _):
        decoded, weight, *saved = ctx.saved_tensors
        with torch.no_grad():
            gradients = _backward(d_packed, d_log_likelihood, *saved)
        sources = decoded, weight, d_packed, d_log_likelihood
        gradients = [FirstDerivative.apply(gradient, *sources) for gradient in gradients]
        return None, *gradients, None, None, None, None, None, None


def _backward(d_packed, d_log_likelihood, grad_decoded, slope, masks, posterior_masks, normalised):
    """The cotangents of decoded, weight and bias; the formulas are in the file's docstring."""
    colours = slope.shape[2]
    widths = [colours, 1, 1, 1, colours + 3]  # means to leave_one_out; the rest are constants
    differentiable = d_packed[:, :, colours : colours + sum(widths)].contiguous()
    d_means, d_masks, d_logits, d_posterior, d_normalised = differentiable.split(widths, 2)
    d_decoded = grad_decoded * -d_log_likelihood[:, None, None]  # (B, K, C+1, H, W)
    d_decoded[:, :, -1:] += _through_softmax(masks, d_masks) + d_logits
    d_log_density = _through_softmax(posterior_masks, d_posterior)  # (B, K, 1, H, W)
    d_decoded[:, :, :-1] += torch.addcmul(d_means, slope, d_log_density)
    d_weight = (d_normalised * normalised).sum((3, 4)).sum((0, 1))  # (C+3,)
    d_bias = d_normalised.sum((3, 4)).sum((0, 1))  # (C+3,)
    return d_decoded, d_weight, d_bias


def _through_softmax(probabilities: Tensor, cotangent: Tensor) -> Tensor:
    """Vector-Jacobian product of a softmax over axis 1."""
    weighted = probabilities * cotangent
    return weighted - probabilities * weighted.sum(1, keepdim=True)


# -- Triton ----------------------------------------------------------------------------------------
#
# A mean over the image is known only when all of it has been read: hence statistics_kernel, which
# leaves mean and sum of squares (M2) of every tile, combine_kernel, a program for each of the 3K+1
# normalisations, and pack_kernel, which computes everything again rather than read it back. Tiles
# are combined by Chan's formula in a fixed order: no E[x²] − E[x]², no atomics, the same bits in
# every run. Statistics are numbered: 0 log_likelihood; 1 + 3k, 2 + 3k and 3 + 3k grad_means,
# grad_mask and leave_one_out of slot k.


@jit
def store_moments(partial, statistic, tiles, values, WIDTH: tl.constexpr, pixels, count):
    """Mean and M2 of a tile of WIDTH planes; (B, 3K+1, 2, tiles), from this tile on."""
    inside = pixels[1]
    total = values[0]
    for c in tl.static_range(1, WIDTH):
        total += values[c]
    mean = tl.sum(tl.where(inside, total, 0.0)) / (count * WIDTH)
    squares = tl.zeros_like(total)
    for c in tl.static_range(WIDTH):
        squares += (values[c] - mean) * (values[c] - mean)
    partial += statistic * 2 * tiles
    tl.store(partial, mean)
    tl.store(partial + tiles, tl.sum(tl.where(inside, squares, 0.0)))


@jit
def stopped_inputs(
    joint, prior, likelihood, logit, density, scores, k,
    K: tl.constexpr, COLOURS: tl.constexpr, LOG_RATIO: tl.constexpr,
):  # fmt: skip
    """`slot_terms`, with the ratio of likelihoods for the one without the slot if wanted."""
    mask, responsibility, gradient, left_out = slot_terms(
        joint, prior, likelihood, logit, density, scores, k, K, COLOURS
    )
    if LOG_RATIO:
        left_out = likelihood - left_out
    return mask, responsibility, gradient, left_out


@jit
def statistics_kernel(
    image,  # (B, C, P) any strides
    decoded,  # (B, K, C+1, P) any strides, or UNIT numbers a pixel
    log_likelihood,  # out (B, P) nats
    grad_decoded,  # out (B, K, C+1, P), or (B, K, P, C+1) where UNIT says so
    partial,  # out (B, 3K+1, 2, tiles) mean and M2 of every tile
    image_batch, image_channel, image_pixel,  # strides in numbers
    batch_stride, slot_stride, channel_stride, pixel_stride,  # of decoded, in pixels of UNIT
    num_pixels,
    precision: "tl.float64", slope: "tl.float64", log_norm: "tl.float64",
    K: tl.constexpr, COLOURS: tl.constexpr, LOGISTIC: tl.constexpr, UNIT: tl.constexpr,
    LOG_RATIO: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    dtype: tl.constexpr = log_likelihood.dtype.element_ty
    batch, start, pixels = locate(num_pixels, BLOCK)
    image += batch * image_batch + start * image_pixel
    x = load_channels(image, image_channel, image_pixel, pixels, COLOURS, 0, BLOCK, dtype)
    decoded = open_slots(
        decoded, (batch_stride, slot_stride, channel_stride, pixel_stride), x,
        (precision, slope, log_norm), (batch, start, pixels), UNIT, BLOCK, dtype,
    )  # fmt: skip
    joint, prior, _density_sum = compare_slots(
        decoded, float("-inf"), K, COLOURS, LOGISTIC, UNIT, BLOCK, dtype
    )

    lanes, inside = pixels
    likelihood = nats(quotient(joint, prior))
    tl.store(log_likelihood + batch * num_pixels + start + lanes, likelihood, mask=inside)
    tiles = tl.cdiv(num_pixels, BLOCK)
    count = tl.minimum(num_pixels - start, BLOCK).to(dtype)
    partial += batch * (3 * K + 1) * 2 * tiles + start // BLOCK
    store_moments(partial, 0, tiles, (likelihood,), 1, pixels, count)
    for k in range(K):
        _slot, logit, density, scores = read_slot(decoded, k, COLOURS, LOGISTIC, UNIT, BLOCK, dtype)
        _, _, gradient, left_out = stopped_inputs(
            joint, prior, likelihood, logit, density, scores, k, K, COLOURS, LOG_RATIO
        )
        store_channels(
            grad_decoded, batch * K + k, start, num_pixels, pixels, gradient,
            COLOURS + 1, UNIT, BLOCK,
        )  # fmt: skip
        store_moments(partial, 3 * k + 1, tiles, gradient, COLOURS, pixels, count)
        store_moments(partial, 3 * k + 2, tiles, (gradient[COLOURS],), 1, pixels, count)
        store_moments(partial, 3 * k + 3, tiles, (left_out,), 1, pixels, count)


@jit
def combine_kernel(
    partial,  # (B, 3K+1, 2, TILES) mean and M2 of tiles of TILE pixels, the last one shorter
    statistics,  # out (B, 3K+1, 2) mean and 1 / standard deviation
    num_pixels,
    eps: "tl.float64",
    K: tl.constexpr, COLOURS: tl.constexpr, TILES: tl.constexpr, TILE: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    dtype: tl.constexpr = statistics.dtype.element_ty
    row = tl.program_id(0).to(tl.int64)
    width = tl.where(row % (3 * K + 1) % 3 == 1, COLOURS, 1)  # grad_means has C planes
    partial += row * 2 * TILES
    numbers = tl.arange(0, BLOCK)
    sums = tl.zeros([BLOCK], dtype)
    for first in range(0, TILES, BLOCK):
        tile = first + numbers
        count = tl.minimum(num_pixels - tile.to(tl.int64) * TILE, TILE).to(dtype)
        sums += count * tl.load(partial + tile, mask=tile < TILES, other=0.0)
    mean = tl.sum(sums) / num_pixels
    squares = tl.zeros([BLOCK], dtype)
    for first in range(0, TILES, BLOCK):
        tile = first + numbers
        count = tl.minimum(num_pixels - tile.to(tl.int64) * TILE, TILE).to(dtype)
        gap = tl.load(partial + tile, mask=tile < TILES, other=mean) - mean
        squares += tl.load(partial + TILES + tile, mask=tile < TILES, other=0.0)
        squares += width * count * gap * gap
    variance = tl.sum(squares) / (width * num_pixels)
    tl.store(statistics + row * 2, mean)
    eps = tl.full([], eps, dtype)
    tl.store(statistics + row * 2 + 1, 1.0 / tl.sqrt(variance + eps))


@jit
def normalise(statistics, values, k, COLOURS: tl.constexpr):
    """grad_means (C), grad_mask, log_likelihood and leave_one_out of slot k, mean 0, variance 1."""
    normalised = ()
    for c in tl.static_range(COLOURS + 3):
        if c == COLOURS + 1:
            statistic = statistics
        else:
            number = 1 if c < COLOURS else (2 if c == COLOURS else 3)
            statistic = statistics + (3 * k + number) * 2
        normalised = normalised + ((values[c] - tl.load(statistic)) * tl.load(statistic + 1),)
    return normalised


@jit
def pack_kernel(
    image,  # (B, C, P) any strides
    decoded,  # (B, K, C+1, P) any strides, or UNIT numbers a pixel
    weight,  # (C+3,) gains
    bias,  # (C+3,)
    coordinates,  # (N, P)
    statistics,  # (B, 3K+1, 2) mean and 1 / standard deviation
    packed,  # out (B, K, P, F)
    image_batch, image_channel, image_pixel,  # strides in numbers
    batch_stride, slot_stride, channel_stride, pixel_stride,  # of decoded, in pixels of UNIT
    num_pixels,
    precision: "tl.float64", slope: "tl.float64", log_norm: "tl.float64", floor: "tl.float64",
    K: tl.constexpr, COLOURS: tl.constexpr, LOGISTIC: tl.constexpr, UNIT: tl.constexpr,
    LOG_RATIO: tl.constexpr, COORDINATES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    dtype: tl.constexpr = packed.dtype.element_ty
    batch, start, pixels = locate(num_pixels, BLOCK)
    image += batch * image_batch + start * image_pixel
    x = load_channels(image, image_channel, image_pixel, pixels, COLOURS, 0, BLOCK, dtype)
    decoded = open_slots(
        decoded, (batch_stride, slot_stride, channel_stride, pixel_stride), x,
        (precision, slope, log_norm), (batch, start, pixels), UNIT, BLOCK, dtype,
    )  # fmt: skip
    statistics += batch * (3 * K + 1) * 2

    # 16 channels are a tile, and the coordinates that do not fit in it are another.
    COMPUTED: tl.constexpr = 3 * COLOURS + 6
    FEATURES: tl.constexpr = COMPUTED + COORDINATES
    FIRST: tl.constexpr = COORDINATES if COORDINATES < 16 - COMPUTED else 16 - COMPUTED
    REST: tl.constexpr = COORDINATES - FIRST
    coordinates += start
    first = load_channels(coordinates, num_pixels, 1, pixels, FIRST, 0, BLOCK, dtype)
    if REST > 0:
        PADDED: tl.constexpr = triton.next_power_of_2(REST)
        rest_offsets, rest_wanted = tile_of(pixels, REST, PADDED, FEATURES)
        planes = (FIRST + tl.arange(0, PADDED))[None, :].to(tl.int64) * num_pixels
        rest = tl.load(coordinates + planes + pixels[0][:, None], mask=rest_wanted, other=0.0)
        rest = rest.to(dtype)
    joint, prior, density_sum = compare_slots(
        decoded, floor, K, COLOURS, LOGISTIC, UNIT, BLOCK, dtype
    )

    likelihood = nats(quotient(joint, prior))
    for k in range(K):
        slot, logit, density, scores = read_slot(decoded, k, COLOURS, LOGISTIC, UNIT, BLOCK, dtype)
        mask, _, gradient, left_out = stopped_inputs(
            joint, prior, likelihood, logit, density, scores, k, K, COLOURS, LOG_RATIO
        )
        posterior_mask = tl.exp2(density - density_sum[0]) / density_sum[1]
        normalised = normalise(statistics, gradient + (likelihood, left_out), k, COLOURS)
        channels = x
        for c in tl.static_range(COLOURS):
            channels = channels + (slot[c],)
        channels = channels + (mask, slot[COLOURS], posterior_mask)
        for c in tl.static_range(COLOURS + 3):
            gain, shift = tl.load(weight + c).to(dtype), tl.load(bias + c).to(dtype)
            channels = channels + (normalised[c] * gain + shift,)
        channels = channels + first
        store_channels(
            packed, batch * K + k, start, num_pixels, pixels, channels,
            COMPUTED + FIRST, FEATURES, BLOCK,
        )  # fmt: skip
        if REST > 0:
            row = packed + ((batch * K + k) * num_pixels + start) * FEATURES
            tl.store(row + COMPUTED + FIRST + rest_offsets, rest, mask=rest_wanted)


@jit
def refinement_inputs_backward_kernel(
    image,  # (B, C, P) any strides
    decoded,  # (B, K, C+1, P) any strides, or UNIT numbers a pixel
    statistics,  # (B, 3K+1, 2) mean and 1 / standard deviation
    d_packed,  # (B, K, F, P) any strides, or FEATURES numbers a pixel
    d_log_likelihood,  # (B, P) any strides, or None
    d_decoded,  # out (B, K, C+1, P), or (B, K, P, C+1) where UNIT says so
    d_affine,  # out (B * tiles, SUMS) gradients of weight, then of bias, from every program
    image_batch, image_channel, image_pixel,  # strides in numbers
    batch_stride, slot_stride, channel_stride, pixel_stride,  # of decoded, in pixels of UNIT
    packed_batch, packed_slot, packed_channel, packed_pixel,  # of d_packed, in pixels of FEATURES
    likelihood_batch, likelihood_pixel,  # of d_log_likelihood
    num_pixels,
    precision: "tl.float64", slope: "tl.float64", log_norm: "tl.float64", floor: "tl.float64",
    K: tl.constexpr, COLOURS: tl.constexpr, LOGISTIC: tl.constexpr, UNIT: tl.constexpr,
    LOG_RATIO: tl.constexpr, FEATURES: tl.constexpr, SUMS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    dtype: tl.constexpr = statistics.dtype.element_ty
    batch, start, pixels = locate(num_pixels, BLOCK)
    image += batch * image_batch + start * image_pixel
    x = load_channels(image, image_channel, image_pixel, pixels, COLOURS, 0, BLOCK, dtype)
    decoded = open_slots(
        decoded, (batch_stride, slot_stride, channel_stride, pixel_stride), x,
        (precision, slope, log_norm), (batch, start, pixels), UNIT, BLOCK, dtype,
    )  # fmt: skip
    statistics += batch * (3 * K + 1) * 2
    # From the means on: the image is a constant, as the coordinates at the end are.
    STEP: tl.constexpr = FEATURES if FEATURES > 0 else 1
    d_packed += (batch * packed_batch + start * packed_pixel) * STEP + COLOURS * packed_channel
    plane = batch * likelihood_batch + start * likelihood_pixel
    d_likelihood = load_plane(d_log_likelihood, plane, pixels, dtype, likelihood_pixel)

    zero = tl.zeros([BLOCK], dtype)
    joint, prior = empty_contest(BLOCK, dtype), empty_contest(BLOCK, dtype)
    density_sum = tl.full([BLOCK], floor, dtype), zero + 1.0
    prior_mean, density_mean = zero, zero
    for k in range(K):
        _slot, logit, density, _ = read_slot(decoded, k, COLOURS, LOGISTIC, UNIT, BLOCK, dtype)
        d_slot = d_packed + tl.cast(k, tl.int64) * packed_slot * STEP
        row = packed_pixel * STEP
        d_mask = load_plane(d_slot, COLOURS * packed_channel, pixels, dtype, row)
        d_posterior = load_plane(d_slot, (COLOURS + 2) * packed_channel, pixels, dtype, row)
        joint = add_contender(joint, logit + density, k)
        prior_mean = add_weight(prior_mean, prior[0], logit, d_mask)
        prior = add_contender(prior, logit, k)
        density_mean = add_weight(density_mean, density_sum[0], density, d_posterior)
        density_sum = add_term(density_sum, density)

    prior_mean, density_mean = prior_mean / prior[1], density_mean / density_sum[1]
    likelihood = nats(quotient(joint, prior))
    gains, shifts = (), ()  # sums over slots, of every pixel
    for _ in tl.static_range(COLOURS + 3):
        gains = gains + (zero,)
        shifts = shifts + (zero,)
    for k in range(K):
        _slot, logit, density, scores = read_slot(decoded, k, COLOURS, LOGISTIC, UNIT, BLOCK, dtype)
        mask, responsibility, gradient, left_out = stopped_inputs(
            joint, prior, likelihood, logit, density, scores, k, K, COLOURS, LOG_RATIO
        )
        posterior_mask = tl.exp2(density - density_sum[0]) / density_sum[1]
        normalised = normalise(statistics, gradient + (likelihood, left_out), k, COLOURS)
        # Two tiles, one after the other, as sixteen addresses at a time need many registers.
        d_slot = d_packed + tl.cast(k, tl.int64) * packed_slot * STEP
        d_channels = load_channels(
            d_slot, packed_channel, packed_pixel, pixels, COLOURS + 3, FEATURES, BLOCK, dtype
        )
        d_mask, d_logit = d_channels[COLOURS], d_channels[COLOURS + 1]
        d_posterior = d_channels[COLOURS + 2]
        d_density = responsibility * d_likelihood + posterior_mask * (d_posterior - density_mean)
        d_logit += mask * (d_mask - prior_mean) + d_likelihood * (responsibility - mask)
        d_out = ()
        for c in tl.static_range(COLOURS):
            d_out = d_out + (d_channels[c] + d_density * scores[c],)
        store_channels(
            d_decoded, batch * K + k, start, num_pixels, pixels, d_out + (d_logit,),
            COLOURS + 1, UNIT, BLOCK,
        )  # fmt: skip
        d_channels = load_channels(
            d_slot + (COLOURS + 3) * packed_channel,
            packed_channel, packed_pixel, pixels, COLOURS + 3, FEATURES, BLOCK, dtype,
        )  # fmt: skip
        more_gains, more_shifts = (), ()
        for c in tl.static_range(COLOURS + 3):
            d_normalised = d_channels[c]
            more_gains = more_gains + (gains[c] + d_normalised * normalised[c],)
            more_shifts = more_shifts + (shifts[c] + d_normalised,)
        gains, shifts = more_gains, more_shifts

    tile = join_columns(gains + shifts, 2 * COLOURS + 6, BLOCK, SUMS)
    row = d_affine + tl.program_id(0).to(tl.int64) * SUMS
    tl.store(row + tl.arange(0, SUMS), tl.sum(tile, 0))


# Kernel -> pixels of a program, pixels of a thread. Sums over a single warp need no barrier.
BLOCKS = {"statistics": (64, 2), "combine": (256, 8), "pack": (128, 1), "backward": (128, 1)}


@torch.library.custom_op("slot_kernels::refinement_inputs", mutates_args=())
def _fused(
    image: Tensor, decoded: Tensor, weight: Tensor, bias: Tensor, coordinates: Tensor,
    sigma: float, component: str, posterior_epsilon: float, log_ratio: bool, eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    given = layout(decoded)
    outputs = packed, log_likelihood, grad_decoded, statistics = _empty(image, given, coordinates)
    batch, slots, colours = decoded.shape[0], decoded.shape[1], image.shape[1]
    num_pixels = image.shape[2] * image.shape[3]
    numbers = constants(sigma, component, colours, posterior_epsilon)
    options = dict(LOGISTIC=component == "logistic", LOG_RATIO=log_ratio)
    tile = block(BLOCKS["statistics"], num_pixels)["BLOCK"]
    tiles = -(-num_pixels // tile)
    partial = statistics.new_empty((*statistics.shape, tiles))  # (B, 3K+1, 2, tiles)
    launch_on_pixels(
        statistics_kernel, BLOCKS["statistics"], image, given,
        (log_likelihood, grad_decoded, partial), (), numbers[:3], **options,
    )  # fmt: skip
    launch(
        combine_kernel, (batch * (3 * slots + 1),), partial, statistics, num_pixels, float(eps),
        K=slots, COLOURS=colours, TILES=tiles, TILE=tile, **block(BLOCKS["combine"], tiles),
    )  # fmt: skip
    launch_on_pixels(
        pack_kernel, BLOCKS["pack"], image, given,
        (weight.contiguous(), bias.contiguous(), coordinates.contiguous(), statistics, packed),
        (), numbers, COORDINATES=len(coordinates), **options,
    )  # fmt: skip
    return outputs


def _empty(image: Tensor, decoded: Layout, coordinates: Tensor) -> tuple[Tensor, ...]:
    """packed, log_likelihood, grad_decoded and statistics (B, 3K+1, 2)."""
    batch, slots, _, height, width = decoded.tensor.shape
    features = 3 * image.shape[1] + 6 + len(coordinates)
    dtype = wide_dtype(image, decoded.tensor)
    packed, log_likelihood, statistics = (
        decoded.tensor.new_empty(shape, dtype=dtype)
        for shape in (
            (batch, slots, height, width, features),
            (batch, height, width),
            (batch, 3 * slots + 1, 2),
        )
    )
    return packed.movedim(-1, 2), log_likelihood, new_like(decoded, dtype), statistics


@_fused.register_fake
def _(image, decoded, weight, bias, coordinates, *_):
    return _empty(image, layout(decoded), coordinates)


@torch.library.custom_op("slot_kernels::refinement_inputs_backward", mutates_args=())
def _fused_backward(
    image: Tensor, decoded: Tensor, statistics: Tensor, d_packed: Tensor,
    d_log_likelihood: Tensor | None, sigma: float, component: str, posterior_epsilon: float,
    log_ratio: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    given, cotangent, colours = layout(decoded), layout(d_packed), image.shape[1]
    d_decoded = new_like(given, decoded.dtype)
    d_log_likelihood, likelihood_strides = cotangent_planes(d_log_likelihood)
    num_pixels = image.shape[2] * image.shape[3]
    tiles = -(-num_pixels // block(BLOCKS["backward"], num_pixels)["BLOCK"])
    width = triton.next_power_of_2(2 * colours + 6)
    d_affine = statistics.new_empty((len(image) * tiles, width))
    launch_on_pixels(
        refinement_inputs_backward_kernel, BLOCKS["backward"], image, given,
        (statistics, cotangent.tensor, d_log_likelihood, d_decoded, d_affine),
        (*cotangent.strides, *likelihood_strides),
        constants(sigma, component, colours, posterior_epsilon),
        LOGISTIC=component == "logistic", LOG_RATIO=log_ratio, FEATURES=cotangent.unit, SUMS=width,
    )  # fmt: skip
    sums = d_affine.sum(0)  # the second stage
    return d_decoded, sums[: colours + 3].clone(), sums[colours + 3 : 2 * colours + 6].clone()


@_fused_backward.register_fake
def _(image, decoded, statistics, *_):
    vector = statistics.new_empty(image.shape[1] + 3)
    return new_like(layout(decoded), decoded.dtype), vector, torch.empty_like(vector)


def _save(ctx, inputs, output):
    image, decoded, weight, bias, *_ = inputs
    statistics = output[3]
    ctx.save_for_backward(image, decoded, statistics)
    ctx.dtypes, ctx.options = (weight.dtype, bias.dtype), inputs[5:9]
    ctx.mark_non_differentiable(output[2], statistics)
    ctx.set_materialize_grads(False)  # an output that nothing is asked of is not read


def _backward_of_fused(ctx, d_packed, d_log_likelihood, *_):
    (image, decoded, statistics), d_weight, d_bias = ctx.saved_tensors, None, None
    if d_packed is not None:
        d_decoded, d_weight, d_bias = _fused_backward(
            image, decoded, statistics, d_packed, d_log_likelihood, *ctx.options
        )
        d_weight, d_bias = d_weight.to(ctx.dtypes[0]), d_bias.to(ctx.dtypes[1])
    else:
        nothing = [None] * 3
        d_decoded = mixture_backward(image, decoded, d_log_likelihood, *nothing, *ctx.options[:3])
    return None, d_decoded, d_weight, d_bias, *[None] * 6


_fused.register_autograd(_backward_of_fused, setup_context=_save)
_fused_backward.register_autograd(refuse_second_derivative)


def _triton_refinement_inputs(
    image, decoded, weight, bias, coordinates, sigma, component="gaussian",
    posterior_epsilon=0.0, log_ratio=False, eps=1e-5,
) -> RefinementInputs:  # fmt: skip
    _refuse_bad_inputs(
        image, decoded, weight, bias, coordinates, sigma, component, posterior_epsilon
    )
    outputs = _fused(
        image.detach(), decoded, weight, bias, coordinates.detach(), sigma, component,
        posterior_epsilon, log_ratio, eps,
    )  # fmt: skip
    return RefinementInputs(*outputs[:3])


if triton is not None:
    kernels.TRITON["refinement_inputs"] = _triton_refinement_inputs


def refinement_inputs(
    image: Tensor,
    decoded: Tensor,
    weight: Tensor,
    bias: Tensor,
    coordinates: Tensor,
    sigma: float,
    component: str = "gaussian",
    posterior_epsilon: float = 0.0,
    log_ratio: bool = False,
    eps: float = 1e-5,
) -> RefinementInputs:
    """The refinement network's image-sized inputs, the likelihood and its gradient, in one go.

    image, decoded, sigma, component, posterior_epsilon: as for `kernels.mixture`. weight and bias
    (C+3,): gain and bias of grad_means (C), grad_mask, log_likelihood, leave_one_out. coordinates
    (N, H, W): fixed channels that come last, N >= 0. log_ratio feeds log p(x|z) − log p(x|z∖k) as
    leave_one_out, as the authors' code does. eps: of the normalisations.

    Differentiable once with respect to decoded, weight and bias. `packed.flatten(0, 1)` is
    contiguous in torch.channels_last. Raises ValueError for shapes that do not fit, sigma <= 0
    and an unknown component.
    """
    if kernels.backend(decoded, "refinement_inputs") == "triton":
        return kernels.TRITON["refinement_inputs"](
            image, decoded, weight, bias, coordinates, sigma, component, posterior_epsilon,
            log_ratio, eps,
        )  # fmt: skip
    tensors = _check_inputs(
        image, decoded, weight, bias, coordinates, sigma, component, posterior_epsilon
    )
    return RefinementInputs(
        *_RefinementInputs.apply(*tensors, sigma, component, posterior_epsilon, log_ratio, eps)
    )
