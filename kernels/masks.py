"""Masks alone: the softmax over slots of mask logits (Greff et al. 2019, eq. 1).

    m_k = exp(a_k) / Σ_j exp(a_j)
    backward, from the cotangents dm:   da_k = m_k (dm_k − Σ_j m_j dm_j)

For those who want the masks and nothing else; with the likelihood they come from `mixture`.

Two sweeps over the slots of a pixel, so that the registers do not grow with K. The first keeps a
running maximum and the sum of exponentials relative to it, with one exponential a slot: either the
sum so far is scaled down or the new term is. The second reads the logits again, from the cache, and
writes. Backward needs the masks alone, and also sweeps twice: Σ_j m_j dm_j, then da.

Bytes, in numbers per pixel: forward reads K and writes K, backward reads 2K and writes K. Eager
torch moves no more for contiguous logits, as its softmax is one kernel, so no speed-up is to be
expected there. Strided ones, such as `decoded[:, :, -1]`, it copies first: 4K instead of 2K.

Axes: B batch, K slots, H W image, P = H·W pixels.
"""

import torch
from torch import Tensor

import kernels
from kernels.launch import jit, launch, tl, triton
from kernels.mixture import refuse_second_derivative

BLOCK = 128  # pixels of a program, one for each thread. Tests raise it.
VECTOR = 4  # times as many, 16 bytes of float32 a thread, where pixels are neighbours in memory


def masks_reference(logits: Tensor) -> Tensor:
    """`masks` in one line of torch."""
    return logits.softmax(1)


@jit
def exp(x):
    """The exponential; in float32 by way of base 2, for which the device has an instruction."""
    return tl.exp(x) if x.dtype == tl.float64 else tl.exp2(x * 1.4426950408889634)  # log2 e


@jit
def _tile(num_pixels, BLOCK: tl.constexpr):
    """The image of this program, 64 bits, the pixels that it has of it, and which of them exist."""
    num_tiles = tl.cdiv(num_pixels, BLOCK)
    image = (tl.program_id(0) // num_tiles).to(tl.int64)
    pixel = (tl.program_id(0) % num_tiles) * BLOCK + tl.arange(0, BLOCK)
    return image, pixel, pixel < num_pixels


@jit
def _load(pointer, inside, FLOAT: tl.constexpr):
    return tl.load(pointer, mask=inside, other=0).to(FLOAT)


@jit
def _forward_kernel(
    logits,  # (B, K, P), any strides
    out,  # (B, K, P), contiguous: the masks
    num_pixels,  # P
    batch_stride,  # of logits, as the next two
    slot_stride,
    pixel_stride,
    K: tl.constexpr,
    FLOAT: tl.constexpr,  # the type of the arithmetic
    BLOCK: tl.constexpr,
):
    image, pixel, inside = _tile(num_pixels, BLOCK)
    # Pointers walk from slot to slot, so that no product of a slot and its stride can overflow.
    first = logits + image * batch_stride + pixel.to(tl.int64) * pixel_stride
    logits = first
    largest = tl.full([BLOCK], float("-inf"), FLOAT)
    total = tl.zeros([BLOCK], FLOAT)
    for _ in range(K):
        value = _load(logits, inside, FLOAT)
        # Equal is 1 without a subtraction, because slots may be switched off by logits of −∞.
        ratio = tl.where(value == largest, 1, exp(-tl.abs(value - largest)))
        total = tl.where(value > largest, total * ratio + 1, total + ratio)
        largest = tl.where(value > largest, value, largest)
        logits += slot_stride
    logits = first
    out += image * K * num_pixels + pixel
    for _ in range(K):
        value = _load(logits, inside, FLOAT)
        tl.store(out, exp(value - largest) / total, mask=inside)
        logits += slot_stride
        out += num_pixels


@jit
def _backward_kernel(
    gradient,  # (B, K, P), any strides: the cotangent of the masks
    masks,  # (B, K, P), contiguous
    out,  # (B, K, P), contiguous: the cotangent of the logits
    num_pixels,  # P
    batch_stride,  # of gradient, as the next two
    slot_stride,
    pixel_stride,
    K: tl.constexpr,
    FLOAT: tl.constexpr,  # the type of the arithmetic
    BLOCK: tl.constexpr,
):
    image, pixel, inside = _tile(num_pixels, BLOCK)
    first = gradient + image * batch_stride + pixel.to(tl.int64) * pixel_stride
    offset = image * K * num_pixels + pixel
    gradient, mask = first, masks + offset
    total = tl.zeros([BLOCK], FLOAT)
    for _ in range(K):
        total += _load(mask, inside, FLOAT) * _load(gradient, inside, FLOAT)
        gradient += slot_stride
        mask += num_pixels
    gradient, mask, out = first, masks + offset, out + offset
    for _ in range(K):
        difference = _load(gradient, inside, FLOAT) - total
        tl.store(out, _load(mask, inside, FLOAT) * difference, mask=inside)
        gradient += slot_stride
        mask += num_pixels
        out += num_pixels


def _launch(kernel, strided: Tensor, *contiguous: Tensor) -> None:
    """Run a kernel of this file; its first tensor may have any strides."""
    batch, slots = strided.shape[:2]
    strided = strided.flatten(2)  # (B, K, P), a copy only where pixels are not evenly spaced
    num_pixels, neighbours = strided.shape[2], strided.stride(2) == 1
    block = BLOCK * VECTOR if neighbours and num_pixels % 16 == 0 else BLOCK
    grid = (batch * triton.cdiv(num_pixels, block),)
    float_type = tl.float64 if strided.dtype == torch.float64 else tl.float32
    launch(
        kernel, grid, strided, *contiguous, num_pixels, *strided.stride(),
        K=slots, FLOAT=float_type, BLOCK=block,
    )  # fmt: skip


@torch.library.custom_op("slot_kernels::masks", mutates_args=())
def _masks(logits: Tensor) -> Tensor:
    out = _empty(logits)
    _launch(_forward_kernel, logits, out)
    return out


@torch.library.custom_op("slot_kernels::masks_backward", mutates_args=())
def _masks_backward(gradient: Tensor, masks: Tensor) -> Tensor:
    out = _empty(masks)
    _launch(_backward_kernel, gradient, masks.contiguous(), out)
    return out


@_masks.register_fake
@_masks_backward.register_fake
def _empty(like: Tensor, *_) -> Tensor:
    return torch.empty(like.shape, dtype=like.dtype, device=like.device)


_masks.register_autograd(
    lambda ctx, gradient: _masks_backward(gradient, *ctx.saved_tensors),
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(output),
)
_masks_backward.register_autograd(refuse_second_derivative)
if triton is not None:
    kernels.TRITON["masks"] = _masks


def masks(logits: Tensor) -> Tensor:
    """Softmax over slots: logits (B, K, H, W), any strides -> masks of the same shape and type.

    bfloat16 and float16 are computed in float32. Differentiable; under Triton, once. Raises
    ValueError for anything but floating-point numbers (B, K, H, W) with K > 0.
    """
    if logits.ndim != 4 or logits.shape[1] == 0:
        raise ValueError(f"logits must be (B, K, H, W) with K > 0, not {tuple(logits.shape)}")
    if not logits.is_floating_point():
        raise ValueError(f"logits must be floating point, not {logits.dtype}")
    if kernels.backend(logits, "masks") == "triton":
        return kernels.TRITON["masks"](logits)
    return masks_reference(logits)
