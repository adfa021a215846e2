"""The spatial mixture likelihood of slot models: one mixture per pixel (Greff et al. 2019, eq. 1).

Pixel x with colours x_c; K slots with mask logits a_k and means μ_kc:

    m_k = softmax_k(a_k)                             masks
    N_k = Π_c N(x_c; μ_kc, σ²)                       one density per slot, colours multiplied
    log p(x|z) = log Σ_k m_k N_k                     the mixture is over whole pixels

The gradient has a closed form. With the responsibilities r_k = m_k N_k / Σ_j m_j N_j:

    ∂ log p/∂μ_kc = r_k (x_c − μ_kc) / σ²            ∂ log p/∂a_k = r_k − m_k

Everything stays in log space: in float32 every N_k underflows once a colour is 1.3 away at σ = 0.1.
The largest logit is subtracted before anything is added to a logit, as a logit of 1e8 has no digits
left for log N_k; so the result does not depend on a constant added to all logits.

Two sweeps over the slots, one for the sum of the softmax and one for the likelihood's, keep the
registers independent of K; the second reads from the cache. Backward does both again, and a third
that writes: it needs nothing saved but the inputs. As sizes of blocks are powers of two, a pixel's
C means and its logit are one row of a block (BLOCK, C + 1); device.py loads and stores such rows.

Bytes, in numbers per pixel for C = 3, of eager torch operation by operation (tests/baselines.py):

                    fused reads    writes    eager moves    at K = 7
    forward         3 + 4K         1         70K + 9        16 times as much
    backward        4 + 4K         4K        73K + 2        9 times

On large images that is the speed-up to expect, if the arithmetic fits in the time of the transfers;
on small ones the number of kernels counts: 1 instead of 19 or more.

Axes: B batch, K slots, C colours (1 or 3), H W image, P = H·W pixels; CHANNELS = C + 1.
"""

import math

import torch
from torch import Tensor

import kernels
from kernels.device import (
    empty_sum,
    load_block,
    load_slot,
    log_density_and_score,
    slot_offsets,
    update_logsumexp,
)
from kernels.launch import check_mixture, jit, launch, refuse_second_derivative, tl, triton

BLOCK = 128  # pixels of a program. Tests change it.


def log_density_torch(image: Tensor, means: Tensor, sigma: Tensor) -> Tensor:
    """log N_k, nats: image (B, C, H, W), means (B, K, C, H, W) -> (B, K, H, W)."""
    standard = (image[:, None] - means) / sigma  # (B, K, C, H, W)
    log_norm = image.shape[1] * (sigma.log() + 0.5 * math.log(2 * math.pi))
    return -0.5 * standard.square().sum(2) - log_norm


def mixture_log_likelihood_torch(image: Tensor, decoded: Tensor, sigma: Tensor) -> Tensor:
    """`mixture_log_likelihood` in torch; the arithmetic has the type of sigma."""
    decoded = decoded.to(sigma.dtype)
    log_masks = decoded[:, :, -1].log_softmax(1)  # (B, K, H, W)
    return (log_masks + log_density_torch(image, decoded[:, :, :-1], sigma)).logsumexp(1)


@jit
def sum_over_slots(x, decoded, batch, pixel, inside, num_pixels, sigma, K: tl.constexpr):
    """Of Σ_k exp(a_k) = prior · exp(largest) and Σ_k exp(a_k) N_k = total · exp(largest + top):

    largest, prior, top and total, each (BLOCK,). A new largest term rescales a sum so far.
    """
    largest, prior = empty_sum(x)
    for k in range(K):
        # slot (BLOCK, C+1): means and logit of each pixel; logit (BLOCK,): the last column again.
        _, logit = load_slot(x, decoded, batch * K + k, pixel, inside, num_pixels)
        largest, prior = update_logsumexp(largest, prior, logit)
    top, total = empty_sum(x)
    for k in range(K):
        slot, logit = load_slot(x, decoded, batch * K + k, pixel, inside, num_pixels)
        log_density, _ = log_density_and_score(x, slot, sigma)  # (BLOCK,)
        top, total = update_logsumexp(top, total, logit - largest + log_density)
    return largest, prior, top, total


@jit
def forward_kernel(
    image,  # (B, C, P)
    decoded,  # (B, K, P, C+1)
    sigma,  # (), in the type of the arithmetic
    log_likelihood,  # out (B, P), nats
    num_pixels,  # P
    K: tl.constexpr,
    CHANNELS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    # x (BLOCK, C+1) with a last column of 0; batch, pixel (BLOCK,) and inside as in masks.py.
    x, sigma, batch, pixel, inside = load_block(image, sigma, num_pixels, CHANNELS, BLOCK)
    _, prior, top, total = sum_over_slots(x, decoded, batch, pixel, inside, num_pixels, sigma, K)
    result = top + tl.log(total / prior)  # `largest` cancels
    tl.store(log_likelihood + batch * num_pixels + pixel, result, mask=inside)


@jit
def backward_kernel(
    image,  # (B, C, P)
    decoded,  # (B, K, P, C+1)
    sigma,  # (), in the type of the arithmetic
    d_log_likelihood,  # (B, P): the cotangent of log p(x|z)
    d_decoded,  # out (B, K, P, C+1)
    num_pixels,  # P
    K: tl.constexpr,
    CHANNELS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    x, sigma, batch, pixel, inside = load_block(image, sigma, num_pixels, CHANNELS, BLOCK)
    largest, prior, top, total = sum_over_slots(
        x, decoded, batch, pixel, inside, num_pixels, sigma, K
    )
    cotangent = tl.load(d_log_likelihood + batch * num_pixels + pixel, mask=inside, other=0.0)
    is_logit = tl.arange(0, CHANNELS)[None, :] == CHANNELS - 1  # (1, C+1)
    for k in range(K):
        slot, logit = load_slot(x, decoded, batch * K + k, pixel, inside, num_pixels)
        log_density, score = log_density_and_score(x, slot, sigma)  # score (x − μ) / σ², last 0
        responsibility = tl.exp(logit - largest + log_density - top) / total  # r_k
        by_logit = responsibility - tl.exp(logit - largest) / prior  # r_k − m_k
        gradient = tl.where(is_logit, by_logit[:, None], responsibility[:, None] * score)
        offset = slot_offsets(batch * K + k, pixel, num_pixels, CHANNELS)
        tl.store(d_decoded + offset, cotangent[:, None] * gradient, mask=inside[:, None])


@torch.library.custom_op("slot_kernels::mixture_log_likelihood", mutates_args=())
def _forward(image: Tensor, decoded: Tensor, sigma: Tensor) -> Tensor:
    batch, slots, height, width, channels = decoded.shape  # channels-last
    log_likelihood = _empty_likelihood(image, decoded, sigma)
    launch(
        forward_kernel, (batch, triton.cdiv(height * width, BLOCK)),
        image, decoded, sigma, log_likelihood, height * width,
        K=slots, CHANNELS=channels, BLOCK=BLOCK,
    )  # fmt: skip
    return log_likelihood


@torch.library.custom_op("slot_kernels::mixture_log_likelihood_backward", mutates_args=())
def _backward(image: Tensor, decoded: Tensor, sigma: Tensor, d_log_likelihood: Tensor) -> Tensor:
    batch, slots, height, width, channels = decoded.shape
    d_decoded = torch.empty_like(decoded)
    launch(
        backward_kernel, (batch, triton.cdiv(height * width, BLOCK)),
        image, decoded, sigma, d_log_likelihood.contiguous(), d_decoded, height * width,
        K=slots, CHANNELS=channels, BLOCK=BLOCK,
    )  # fmt: skip
    return d_decoded


@_forward.register_fake
def _empty_likelihood(image: Tensor, decoded: Tensor, sigma: Tensor) -> Tensor:
    return sigma.new_empty((decoded.shape[0], *decoded.shape[2:4]))  # (B, H, W)


_backward.register_fake(lambda image, decoded, sigma, _: torch.empty_like(decoded))
_forward.register_autograd(
    lambda ctx, cotangent: (None, _backward(*ctx.saved_tensors, cotangent), None),
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs),
)
_backward.register_autograd(refuse_second_derivative)


def mixture_log_likelihood(image: Tensor, decoded: Tensor, sigma: float | Tensor) -> Tensor:
    """log p(x|z) of every pixel, nats, (B, H, W); differentiable with respect to decoded.

    image (B, C, H, W), C 1 or 3; decoded (B, K, C+1, H, W), means first and the mask logit last;
    sigma a number or a 0-d tensor. Other layouts of decoded than channels-last are copied first.
    bfloat16 and float16 are computed and returned in float32. Under Triton, differentiable once.

    Raises ValueError for shapes that do not fit and for a number sigma <= 0.
    """
    image, decoded, sigma = check_mixture(image, decoded, sigma)
    if kernels.backend(decoded) == "triton":
        return _forward(image.contiguous(), decoded.movedim(2, -1).contiguous(), sigma)
    return mixture_log_likelihood_torch(image, decoded, sigma)
