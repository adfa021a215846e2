"""The likelihood of every pixel as if each slot in turn were missing (Greff et al. 2019, app. C).

    log p(x|z∖k) = log Σ_{j≠k} exp(a_j) N_j − log Σ_{j≠k} exp(a_j)     the other masks sum to 1

Symbols as in mixture.py. An input of IODINE's refinement network, without a gradient.

The kernel is O(K), not O(K²), and never subtracts the largest term from a sum: this would leave
nothing but rounding error where one slot owns the pixel. A sum without slot k is

    total − own      where another slot's term is the largest: the difference is 1 or more of it
    rest             where slot k's term is the largest: the sum of all others, kept apart

Each sum subtracts its own largest logit first; without the slot of the largest, that is the second
largest. So there are four sweeps: the two largest logits, the two largest terms, the sums, and the
results.

Bytes, in numbers per pixel for C = 3: the kernel reads 3 + 4K and writes K. Eager torch, a loop
over slots, moves 10K² + 59K + 8 (tests/baselines.py counts), at K = 7 24 times as much.

Axes: B batch, K slots, C colours (1 or 3), H W image, P = H·W pixels; CHANNELS = C + 1.
"""

import torch
from torch import Tensor

import kernels
from kernels.device import compare_slots, load_block, load_slot, log_density_and_score, without_slot
from kernels.launch import check_mixture, jit, launch, tl, triton
from kernels.mixture import log_density_torch

BLOCK = 128  # pixels of a program. Tests change it.


@torch.no_grad()
def leave_one_out_torch(image: Tensor, decoded: Tensor, sigma: Tensor) -> Tensor:
    """`leave_one_out` in torch; the arithmetic has the type of sigma."""
    decoded = decoded.to(sigma.dtype)
    logits, slots = decoded[:, :, -1], range(decoded.shape[1])  # (B, K, H, W)
    log_density = log_density_torch(image, decoded[:, :, :-1], sigma)  # (B, K, H, W)
    without = []
    for k in slots:
        others = [j for j in slots if j != k] or [k]
        joint = logits[:, others].log_softmax(1) + log_density[:, others]  # (B, K-1, H, W)
        without.append(joint.logsumexp(1))
    return torch.stack(without, 1)


@jit
def leave_one_out_kernel(
    image,  # (B, C, P)
    decoded,  # (B, K, P, C+1)
    sigma,  # (), in the type of the arithmetic
    out,  # (B, K, P), nats
    num_pixels,  # P
    K: tl.constexpr,
    CHANNELS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    x, sigma, batch, pixel, inside = load_block(image, sigma, num_pixels, CHANNELS, BLOCK)
    sums = compare_slots(x, decoded, batch, pixel, inside, num_pixels, sigma, K)
    for k in range(K):
        slot, logit = load_slot(x, decoded, batch * K + k, pixel, inside, num_pixels)
        log_density, _ = log_density_and_score(x, slot, sigma)
        result = without_slot(sums, logit, log_density, k, K)
        tl.store(out + (batch * K + k) * num_pixels + pixel, result, mask=inside)


@torch.library.custom_op("slot_kernels::leave_one_out", mutates_args=())
def _leave_one_out(image: Tensor, decoded: Tensor, sigma: Tensor) -> Tensor:
    batch, slots, height, width, channels = decoded.shape
    out = _empty(image, decoded, sigma)
    launch(
        leave_one_out_kernel, (batch, triton.cdiv(height * width, BLOCK)),
        image, decoded, sigma, out, height * width,
        K=slots, CHANNELS=channels, BLOCK=BLOCK,
    )  # fmt: skip
    return out


@_leave_one_out.register_fake
def _empty(image: Tensor, decoded: Tensor, sigma: Tensor) -> Tensor:
    return sigma.new_empty(decoded.shape[:4])  # (B, K, H, W)


def leave_one_out(image: Tensor, decoded: Tensor, sigma: float | Tensor) -> Tensor:
    """log p(x|z) without each slot, nats, (B, K, H, W), a constant: no gradient flows back.

    Arguments and errors as for `kernels.mixture_log_likelihood`. With one slot, nothing is left
    out: the result is the likelihood.
    """
    image, decoded, sigma = check_mixture(image, decoded.detach(), sigma)
    if kernels.backend(decoded) == "triton":
        return _leave_one_out(image.contiguous(), decoded.movedim(2, -1).contiguous(), sigma)
    return leave_one_out_torch(image, decoded, sigma)
