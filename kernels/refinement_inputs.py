"""The image-sized inputs of IODINE's refinement network (Greff et al. 2019, app. C), packed.

    channel            formula             LN  SG  channels
    image              x                           C
    means              μ_k                         C
    mask               m_k                         1
    mask_logits        a_k                         1
    mask_posterior     P_k = softmax_k(log N_k)    1
    grad_means         ∂L/∂μ_k             ✓   ✓   C
    grad_mask          ∂L/∂a_k             ✓   ✓   1
    log_likelihood     log p(x|z)          ✓   ✓   1
    leave_one_out      log p(x|z∖k)        ✓   ✓   1
    coordinates        fixed                       N      total F = 3C + 6 + N: 17 for C = 3, N = 2

L = −Σ log p(x|z); symbols and closed-form gradients as in mixture.py. SG: no gradient flows back.
LN: layer normalisation, over (C, H, W) of a slot for grad_means, else over (H, W); a gain and a
bias for each of the C + 3 channels.

Paper: ∂L/∂m_k, P = p(x|z), Q = p(x|z∖k). Released code: ∂L/∂a_k, log P, log of the ratio of P and
Q. Here: ∂L/∂a_k, log P, log Q: 1/m_k overflows and densities underflow in float32.

Backward, from the cotangents dμ dm da dP of the unstopped channels and dL of the likelihood:

    logit:  da + m_k (dm_k − Σ_j m_j dm_j) + dL (r_k − m_k)
    means:  dμ_c + (x_c − μ_kc) / σ² (dL r_k + P_k (dP_k − Σ_j P_j dP_j))

A mean over the image is known only when all of it has been read. So forward has two kernels: one
computes what is normalised and the moments of every block, which torch combines in a fixed order;
the other normalises and packs. Bytes, in numbers per pixel for C = 3, N = 2, of eager torch
operation by operation, with automatic differentiation (tests/baselines.py):

                      fused reads   writes      eager moves           at K = 7
    terms             3 + 4K        1 + 5K
    pack              6 + 9K        17K
    both              9 + 13K       1 + 22K     10K² + 346K + 32      12 times as much
    backward          5 + 26K       4K          221K + 2              7 times

Rows of 17 numbers do not fit 16-byte stores, and torch would copy padded rows in front of the
convolution; so they are stored in tiles of a few columns.

Axes: B batch, K slots, C colours (1 or 3), N coordinates, P = H·W pixels; CHANNELS = C + 1.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

import kernels
from kernels.device import (
    compare_slots,
    empty_sum,
    load_block,
    load_slot,
    log_density_and_score,
    slot_offsets,
    update_logsumexp,
    without_slot,
)
from kernels.launch import check_mixture, jit, launch, refuse_second_derivative, tl, triton
from kernels.leave_one_out import leave_one_out_torch
from kernels.mixture import log_density_torch

BLOCK = 128  # pixels of a program. Tests change it.
EPS = 1e-5  # of the normalisations


class RefinementInputs(NamedTuple):
    """What `refinement_inputs` returns."""

    packed: Tensor  # (B, K, F, H, W)             channels-last memory
    log_likelihood: Tensor  # (B, H, W)           log p(x|z), nats, differentiable
    grad_decoded: Tensor  # (B, K, C+1, H, W)     of −Σ log p(x|z), constant: for the decoder's vjp


def refinement_inputs_torch(
    image: Tensor, decoded: Tensor, norm_weight: Tensor, norm_bias: Tensor, coordinates: Tensor,
    sigma: Tensor,
) -> RefinementInputs:  # fmt: skip
    """`refinement_inputs` in torch; the arithmetic has the type of sigma."""
    decoded = decoded.contiguous().to(sigma.dtype)  # sums over colours are slow channels-last
    means, logits = decoded[:, :, :-1], decoded[:, :, -1:]  # (B, K, C, H, W), (B, K, 1, H, W)
    log_masks = logits.log_softmax(1)  # (B, K, 1, H, W)
    log_density = log_density_torch(image, means, sigma)[:, :, None]  # (B, K, 1, H, W)
    joint = log_masks + log_density  # (B, K, 1, H, W)
    log_likelihood, masks = joint.logsumexp(1), log_masks.exp()  # (B, 1, H, W), (B, K, 1, H, W)
    with torch.no_grad():
        responsibilities = joint.softmax(1)  # (B, K, 1, H, W)
        grad_means = -responsibilities * ((image[:, None] - means) / sigma**2)  # (B, K, C, H, W)
        grad_mask = masks - responsibilities  # (B, K, 1, H, W)
        others = leave_one_out_torch(image, decoded, sigma)[:, :, None]  # (B, K, 1, H, W)
        stopped = grad_means, grad_mask, log_likelihood[:, None].expand_as(others), others
        normalised = torch.cat([F.layer_norm(v, v.shape[2:], eps=EPS) for v in stopped], 2)
    affine = normalised * norm_weight[:, None, None] + norm_bias[:, None, None]
    shape = (*decoded.shape[:2], -1, -1, -1)
    image, coordinates = image[:, None].expand(shape), coordinates.expand(shape)
    channels = image, means, masks, logits, log_density.softmax(1), affine, coordinates
    packed = torch.cat(channels, 2).flatten(0, 1)  # (B·K, F, H, W)
    packed = packed.contiguous(memory_format=torch.channels_last).unflatten(0, shape[:2])
    grad_decoded = torch.cat([grad_means, grad_mask], 2)  # (B, K, C+1, H, W)
    return RefinementInputs(packed, log_likelihood[:, 0], grad_decoded)


@jit
def terms_kernel(
    image,  # (B, C, P)
    decoded,  # (B, K, P, C+1)
    sigma,  # (), in the type of the arithmetic, as all that follow
    log_likelihood,  # out (B, P), nats
    leave_one_out,  # out (B, K, P), nats
    grad_decoded,  # out (B, K, P, C+1)
    moments,  # out (B, K, C+3, 2, blocks)
    num_pixels,  # P
    K: tl.constexpr,
    CHANNELS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """What is normalised, and its moments in every block of pixels."""
    x, sigma, batch, pixel, inside = load_block(image, sigma, num_pixels, CHANNELS, BLOCK)
    sums = compare_slots(x, decoded, batch, pixel, inside, num_pixels, sigma, K)
    logit1, _, prior, term1, _, _, total, _, _ = sums
    likelihood = term1 + tl.log(total / prior)
    tl.store(log_likelihood + batch * num_pixels + pixel, likelihood, mask=inside)
    is_logit = tl.arange(0, CHANNELS)[None, :] == CHANNELS - 1  # (1, C+1)
    for k in range(K):
        index = batch * K + k
        slot, logit = load_slot(x, decoded, index, pixel, inside, num_pixels)
        log_density, score = log_density_and_score(x, slot, sigma)
        responsibility = tl.exp(logit - logit1 + log_density - term1) / total
        by_logit = tl.exp(logit - logit1) / prior - responsibility
        gradient = tl.where(is_logit, by_logit[:, None], -responsibility[:, None] * score)
        offset = slot_offsets(index, pixel, num_pixels, CHANNELS)
        tl.store(grad_decoded + offset, gradient, mask=inside[:, None])
        others = without_slot(sums, logit, log_density, k, K)
        tl.store(leave_one_out + index * num_pixels + pixel, others, mask=inside)
        first = index * (CHANNELS + 2)  # the first of its C + 3 normalised channels
        store_moments(moments, gradient, first, inside)
        store_moments(moments, side_by_side(likelihood, others), first + CHANNELS, inside)


@jit
def store_moments(moments, tile, first, inside):
    """Mean and sum of squares about it of every column of a tile, as channels from `first` on."""
    WIDTH: tl.constexpr = tile.shape[1]
    count = tl.sum(inside.to(tile.dtype), 0)
    mean = tl.sum(tl.where(inside[:, None], tile, 0.0), 0) / count  # (WIDTH,)
    gap = tl.where(inside[:, None], tile - mean[None, :], 0.0)
    num_blocks = tl.num_programs(1)
    moments += (first + tl.arange(0, WIDTH)) * 2 * num_blocks + tl.program_id(1)
    tl.store(moments, mean)
    tl.store(moments + num_blocks, tl.sum(gap * gap, 0))


@jit
def side_by_side(left, right):
    """Two (BLOCK,) as the columns of (BLOCK, 2)."""
    return tl.where(tl.arange(0, 2)[None, :] == 0, left[:, None], right[:, None])


@jit
def sum_over_slots(x, decoded, batch, pixel, inside, num_pixels, sigma, K: tl.constexpr):
    """The largest terms and the sums of the softmaxes over logits and over log densities."""
    logit1, prior = empty_sum(x)
    density1, total = empty_sum(x)
    for k in range(K):
        slot, logit = load_slot(x, decoded, batch * K + k, pixel, inside, num_pixels)
        log_density, _ = log_density_and_score(x, slot, sigma)
        logit1, prior = update_logsumexp(logit1, prior, logit)
        density1, total = update_logsumexp(density1, total, log_density)
    return logit1, prior, density1, total


@jit
def normalise(tile, statistics, first):
    """A tile whose columns are the normalised channels from `first` on."""
    column = statistics + (first + tl.arange(0, tile.shape[1])[None, :]) * 2
    return (tile - tl.load(column)) * tl.load(column + 1)


@jit
def pack_kernel(
    image,  # (B, C, P)
    decoded,  # (B, K, P, C+1)
    sigma,  # (), in the type of the arithmetic, as all that follow
    log_likelihood,  # (B, P)
    leave_one_out,  # (B, K, P)
    grad_decoded,  # (B, K, P, C+1)
    statistics,  # (B, K, C+3, 2): mean and 1 / standard deviation
    affine,  # (2, C+3): gains, then biases
    coordinates,  # (N, P)
    packed,  # out (B, K, P, F)
    num_pixels,  # P
    K: tl.constexpr,
    CHANNELS: tl.constexpr,
    COORDINATES: tl.constexpr,  # N
    BLOCK: tl.constexpr,
):
    COLOURS: tl.constexpr = CHANNELS - 1
    x, sigma, batch, pixel, inside = load_block(image, sigma, num_pixels, CHANNELS, BLOCK)
    likelihood = tl.load(log_likelihood + batch * num_pixels + pixel, mask=inside, other=0.0)
    gain = affine + tl.arange(0, CHANNELS)[None, :]
    pair_gain = affine + CHANNELS + tl.arange(0, 2)[None, :]
    logit1, prior, density1, total = sum_over_slots(
        x, decoded, batch, pixel, inside, num_pixels, sigma, K
    )
    for k in range(K):
        index = batch * K + k
        slot, logit = load_slot(x, decoded, index, pixel, inside, num_pixels)
        log_density, _ = log_density_and_score(x, slot, sigma)
        mask, posterior = tl.exp(logit - logit1) / prior, tl.exp(log_density - density1) / total
        first = index * (CHANNELS + 2)  # the first of its C + 3 normalised channels
        gradient, _ = load_slot(x, grad_decoded, index, pixel, inside, num_pixels)
        gradient = normalise(gradient, statistics, first)
        gradient = gradient * tl.load(gain) + tl.load(gain + CHANNELS + 2)
        others = tl.load(leave_one_out + index * num_pixels + pixel, mask=inside, other=0.0)
        pair = normalise(side_by_side(likelihood, others), statistics, first + CHANNELS)
        pair = pair * tl.load(pair_gain) + tl.load(pair_gain + CHANNELS + 2)
        row = packed + (index * num_pixels + pixel) * (3 * COLOURS + 6 + COORDINATES)  # (BLOCK,)
        store_columns(row, x, COLOURS, inside)
        store_columns(row + COLOURS, slot, COLOURS, inside)
        store_columns(row + 2 * COLOURS, side_by_side(mask, logit), 2, inside)
        tl.store(row + 2 * COLOURS + 2, posterior, mask=inside)
        store_columns(row + 2 * COLOURS + 3, gradient, CHANNELS, inside)
        store_columns(row + 3 * COLOURS + 4, pair, 2, inside)
        for n in range(COORDINATES):
            fixed = tl.load(coordinates + n * num_pixels + pixel, mask=inside, other=0.0)
            tl.store(row + 3 * COLOURS + 6 + n, fixed, mask=inside)


@jit
def store_columns(row, tile, WIDTH: tl.constexpr, inside):
    """The first WIDTH columns of a tile, from where `row` points to for every pixel."""
    column = tl.arange(0, tile.shape[1])[None, :]
    tl.store(row[:, None] + column, tile, mask=inside[:, None] & (column < WIDTH))


@jit
def backward_kernel(
    image,  # (B, C, P)
    decoded,  # (B, K, P, C+1)
    sigma,  # (), in the type of the arithmetic, as all that follow but d_decoded
    log_likelihood,  # (B, P)
    leave_one_out,  # (B, K, P)
    grad_decoded,  # (B, K, P, C+1)
    statistics,  # (B, K, C+3, 2): mean and 1 / standard deviation
    d_packed,  # (B, K, P, F): the cotangent of packed
    d_log_likelihood,  # (B, P)
    d_decoded,  # out (B, K, P, C+1)
    d_affine,  # out (B, blocks, 2, C+3): cotangents of gains and biases, to be summed
    num_pixels,  # P
    K: tl.constexpr,
    CHANNELS: tl.constexpr,
    FEATURES: tl.constexpr,  # F
    BLOCK: tl.constexpr,
):
    COLOURS: tl.constexpr = CHANNELS - 1
    x, sigma, batch, pixel, inside = load_block(image, sigma, num_pixels, CHANNELS, BLOCK)
    likelihood = tl.load(log_likelihood + batch * num_pixels + pixel, mask=inside, other=0.0)
    d_likelihood = tl.load(d_log_likelihood + batch * num_pixels + pixel, mask=inside, other=0.0)
    logit1, prior, density1, total = sum_over_slots(
        x, decoded, batch, pixel, inside, num_pixels, sigma, K
    )
    mask_mean, posterior_mean = tl.zeros([BLOCK], x.dtype), tl.zeros([BLOCK], x.dtype)
    for k in range(K):  # Σ_j m_j dm_j and Σ_j P_j dP_j
        index = batch * K + k
        slot, logit = load_slot(x, decoded, index, pixel, inside, num_pixels)
        log_density, _ = log_density_and_score(x, slot, sigma)
        row = d_packed + (index * num_pixels + pixel) * FEATURES + 2 * COLOURS
        d_mask = tl.load(row, mask=inside, other=0.0)
        d_posterior = tl.load(row + 2, mask=inside, other=0.0)
        mask_mean += tl.exp(logit - logit1) / prior * d_mask
        posterior_mean += tl.exp(log_density - density1) / total * d_posterior

    column, pair_column = tl.arange(0, CHANNELS)[None, :], tl.arange(0, 2)[None, :]
    d_gain, d_pair_gain = tl.zeros([BLOCK, CHANNELS], x.dtype), tl.zeros([BLOCK, 2], x.dtype)
    d_bias, d_pair_bias = tl.zeros([BLOCK, CHANNELS], x.dtype), tl.zeros([BLOCK, 2], x.dtype)
    for k in range(K):
        index = batch * K + k
        slot, logit = load_slot(x, decoded, index, pixel, inside, num_pixels)
        log_density, score = log_density_and_score(x, slot, sigma)
        mask, posterior = tl.exp(logit - logit1) / prior, tl.exp(log_density - density1) / total
        row = d_packed + (index * num_pixels + pixel) * FEATURES + COLOURS
        d_means = tl.load(row[:, None] + column, mask=inside[:, None], other=0.0)
        d_mask = tl.load(row + COLOURS, mask=inside, other=0.0)
        d_logit = tl.load(row + COLOURS + 1, mask=inside, other=0.0)
        d_posterior = tl.load(row + COLOURS + 2, mask=inside, other=0.0)
        by_logit = d_logit + mask * (d_mask - mask_mean)
        by_means = d_means + (posterior * (d_posterior - posterior_mean))[:, None] * score
        d_slot = tl.where(column == COLOURS, by_logit[:, None], by_means)
        gradient, _ = load_slot(x, grad_decoded, index, pixel, inside, num_pixels)
        d_slot -= d_likelihood[:, None] * gradient
        offset = slot_offsets(index, pixel, num_pixels, CHANNELS)
        tl.store(d_decoded + offset, d_slot, mask=inside[:, None])

        first = index * (CHANNELS + 2)
        gradient = normalise(gradient, statistics, first)
        others = tl.load(leave_one_out + index * num_pixels + pixel, mask=inside, other=0.0)
        pair = normalise(side_by_side(likelihood, others), statistics, first + CHANNELS)
        stopped = row[:, None] + COLOURS + 3
        d_gradient = tl.load(stopped + column, mask=inside[:, None], other=0.0)
        d_pair = tl.load(stopped + CHANNELS + pair_column, mask=inside[:, None], other=0.0)
        d_gain, d_pair_gain = d_gain + d_gradient * gradient, d_pair_gain + d_pair * pair
        d_bias, d_pair_bias = d_bias + d_gradient, d_pair_bias + d_pair
    sums = d_affine + (batch * tl.num_programs(1) + tl.program_id(1)) * 2 * (CHANNELS + 2)
    tl.store(sums + column, tl.sum(d_gain, 0)[None, :])
    tl.store(sums + CHANNELS + pair_column, tl.sum(d_pair_gain, 0)[None, :])
    tl.store(sums + CHANNELS + 2 + column, tl.sum(d_bias, 0)[None, :])
    tl.store(sums + 2 * CHANNELS + 2 + pair_column, tl.sum(d_pair_bias, 0)[None, :])


def combine(moments: Tensor, num_pixels: int, block: int) -> Tensor:
    """(B, K, C+3, 2, blocks) -> mean, 1 / standard deviation (B, K, C+3, 2), by Chan's formula."""
    starts = torch.arange(0, num_pixels, block, device=moments.device)
    count = (num_pixels - starts).clamp(max=block).to(moments.dtype)  # (blocks,)
    parts = []
    for part in moments.split([moments.shape[2] - 3, 1, 1, 1], 2):  # the normalisations
        mean, squares = part.unbind(3)  # (B, K, channels, blocks)
        size = part.shape[2] * num_pixels
        overall = (mean * count).sum((2, 3), keepdim=True) / size  # (B, K, 1, 1)
        squares = squares + count * (mean - overall).square()
        deviation = (squares.sum((2, 3), keepdim=True) / size + EPS).rsqrt()  # (B, K, 1, 1)
        parts.append(torch.cat([overall, deviation], 3).expand(-1, -1, part.shape[2], -1))
    return torch.cat(parts, 2)


@torch.library.custom_op("slot_kernels::refinement_inputs", mutates_args=())
def _forward(
    image: Tensor, decoded: Tensor, affine: Tensor, coordinates: Tensor, sigma: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """packed (B, K, H, W, F), log_likelihood, leave_one_out, grad_decoded, statistics."""
    slots, height, width, channels = decoded.shape[1:]
    packed, *terms, statistics = _empty(image, decoded, affine, coordinates, sigma)
    grid = len(image), triton.cdiv(height * width, BLOCK)
    moments = statistics.new_empty((*statistics.shape, grid[1]))
    launch(
        terms_kernel, grid, image, decoded, sigma, *terms, moments, height * width,
        K=slots, CHANNELS=channels, BLOCK=BLOCK,
    )  # fmt: skip
    statistics = combine(moments, height * width, BLOCK)
    launch(
        pack_kernel, grid, image, decoded, sigma, *terms, statistics, affine, coordinates, packed,
        height * width, K=slots, CHANNELS=channels, COORDINATES=len(coordinates), BLOCK=BLOCK,
    )  # fmt: skip
    return packed, *terms, statistics


@_forward.register_fake
def _empty(image, decoded, affine, coordinates, sigma):
    features = 3 * decoded.shape[-1] + 3 + len(coordinates)
    shape = decoded.shape[:-1]  # (B, K, H, W)
    return (
        sigma.new_empty((*shape, features)),
        sigma.new_empty((shape[0], *shape[2:])),
        sigma.new_empty(shape),
        sigma.new_empty(decoded.shape),
        sigma.new_empty((*shape[:2], affine.shape[1], 2)),
    )


@torch.library.custom_op("slot_kernels::refinement_inputs_backward", mutates_args=())
def _backward(
    image: Tensor, decoded: Tensor, sigma: Tensor, log_likelihood: Tensor, leave_one_out: Tensor,
    grad_decoded: Tensor, statistics: Tensor, d_packed: Tensor, d_log_likelihood: Tensor,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    slots, height, width, channels = decoded.shape[1:]
    grid = len(image), triton.cdiv(height * width, BLOCK)
    d_decoded = torch.empty_like(decoded)
    d_affine = sigma.new_empty((*grid, 2, channels + 2))
    launch(
        backward_kernel, grid, image, decoded, sigma, log_likelihood, leave_one_out, grad_decoded,
        statistics, d_packed.contiguous(), d_log_likelihood.contiguous(), d_decoded, d_affine,
        height * width, K=slots, CHANNELS=channels, FEATURES=d_packed.shape[-1], BLOCK=BLOCK,
    )  # fmt: skip
    return d_decoded, d_affine.sum((0, 1))  # the second stage of the sums


def _save(ctx, inputs, output):
    image, decoded, _, _, sigma = inputs
    ctx.save_for_backward(image, decoded, sigma, *output[1:])
    ctx.mark_non_differentiable(*output[2:])


def _differentiate(ctx, d_packed, d_log_likelihood, *_):
    d_decoded, d_affine = _backward(*ctx.saved_tensors, d_packed, d_log_likelihood)
    return None, d_decoded, d_affine, None, None


@_backward.register_fake
def _(image, decoded, sigma, *_):
    return torch.empty_like(decoded), sigma.new_empty((2, decoded.shape[-1] + 2))


_forward.register_autograd(_differentiate, setup_context=_save)
_backward.register_autograd(refuse_second_derivative)


def refinement_inputs(
    image: Tensor, decoded: Tensor, norm_weight: Tensor, norm_bias: Tensor, coordinates: Tensor,
    sigma: float | Tensor,
) -> RefinementInputs:  # fmt: skip
    """The refinement network's image-sized inputs, the likelihood and its gradient, in one go.

    image, decoded, sigma: as for `kernels.mixture_log_likelihood`. norm_weight and norm_bias
    (C+3,): gain and bias of grad_means (C), grad_mask, log_likelihood, leave_one_out. coordinates
    (N, H, W): fixed channels that come last, N >= 0.

    Differentiable with respect to decoded, norm_weight and norm_bias; under Triton, once.
    `packed.flatten(0, 1)` is contiguous in torch.channels_last. With one slot, leave_one_out is
    the likelihood. Raises ValueError for shapes that do not fit and for a number sigma <= 0.
    """
    image, decoded, sigma = check_mixture(image, decoded, sigma)
    vector, maps = (image.shape[1] + 3,), (*coordinates.shape[:1], *image.shape[2:])
    given = dict(norm_weight=norm_weight, norm_bias=norm_bias, coordinates=coordinates)
    for (name, value), shape in zip(given.items(), (vector, vector, maps), strict=True):
        if value.shape != shape:
            raise ValueError(f"{name} must be {shape} for this image, not {tuple(value.shape)}")
    affine = torch.stack([norm_weight, norm_bias]).to(sigma.dtype)  # (2, C+3)
    coordinates = coordinates.detach().to(sigma.dtype).contiguous()
    if kernels.backend(decoded) == "triton":
        last = decoded.movedim(2, -1).contiguous()  # (B, K, H, W, C+1)
        packed, log_likelihood, _, grad_decoded, _ = _forward(
            image.contiguous(), last, affine, coordinates, sigma
        )
        return RefinementInputs(packed.movedim(-1, 2), log_likelihood, grad_decoded.movedim(-1, 2))
    return refinement_inputs_torch(image.to(sigma.dtype), decoded, *affine, coordinates, sigma)
