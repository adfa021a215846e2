"""Masks: the softmax over slots of mask logits (Greff et al. 2019, eq. 1). Read this kernel first.

    m_k = exp(a_k) / Σ_j exp(a_j)
    backward, from the cotangents dm = ∂L/∂m:        da_k = ∂L/∂a_k = m_k (dm_k − Σ_j m_j dm_j)

How a Triton kernel works. `launch(kernel, grid, ...)`, Triton's `kernel[grid](...)`, starts many
copies of one function, the programs, here B times ⌈P / BLOCK⌉; `tl.program_id(axis)` says which one
this is. A program computes with whole blocks of numbers, here of BLOCK pixels, as torch does with
tensors; the compiler spreads a block over the threads. Tensors arrive as pointers to their first
number, of type `dtype.element_ty`. A pointer plus a block of offsets is a block of pointers, where
`tl.load` reads numbers and `tl.store` writes them, in the tensor's type. Where `mask=` is False, no
memory is touched, and a load gives `other`. Each value of a `tl.constexpr` compiles a new kernel.

Here a program goes through the K slots of its pixels three times: for the largest logit, for the
sum of exponentials relative to it (so that none overflows), and to write the masks. Only the first
time reads the GPU's memory: the logits then lie in the cache. A block of all slots would need more
registers, of which a thread has few, and padding: sizes of blocks are powers of two.

Bytes, in numbers per pixel: forward reads K and writes K, backward reads 2K and writes K. Eager
torch moves as many, as tests/baselines.py counts; inside softmax, where that cannot see, a view
such as `decoded[:, :, -1]` is copied, 2K more. Memory comes in pieces of 32 bytes, and such a view
brings the colours along: in truth 5K against 7K. So expect forward to be at most 1.4 times as fast.

Axes: B batch, K slots, H W image, P = H·W pixels.
"""

import torch
from torch import Tensor

import kernels
from kernels.launch import jit, launch, refuse_second_derivative, tl, triton

BLOCK = 128  # pixels of a program: one for each of its 4 x 32 threads. Tests change it.


def masks_torch(logits: Tensor) -> Tensor:
    """`masks` in torch."""
    return logits.softmax(1)


@jit
def forward_kernel(
    logits,  # (B, K, P), any strides
    masks,  # out (B, K, P), contiguous
    batch_stride,  # numbers from an image of logits to the next
    slot_stride,  # from a slot to the next
    pixel_stride,  # from a pixel to the next
    num_pixels,  # P
    K: tl.constexpr,
    BLOCK: tl.constexpr,
):
    FLOAT: tl.constexpr = tl.float64 if logits.dtype.element_ty == tl.float64 else tl.float32
    batch = tl.program_id(0).to(tl.int64)  # 64 bits, so that no offset overflows
    pixel = tl.program_id(1).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)  # (BLOCK,)
    inside = pixel < num_pixels  # the last block of an image has fewer pixels
    slot_stride = tl.cast(slot_stride, tl.int64)  # `.to` fails on 1: Triton makes that a constant
    logits += batch * batch_stride + pixel * pixel_stride  # (BLOCK,), pointers to slot 0
    masks += batch * K * num_pixels + pixel

    largest = tl.full([BLOCK], float("-inf"), FLOAT)
    for k in range(K):
        logit = tl.load(logits + k * slot_stride, mask=inside, other=0.0).to(FLOAT)
        largest = tl.maximum(largest, logit)
    total = tl.zeros([BLOCK], FLOAT)
    for k in range(K):
        logit = tl.load(logits + k * slot_stride, mask=inside, other=0.0).to(FLOAT)
        total += tl.exp(logit - largest)
    for k in range(K):
        logit = tl.load(logits + k * slot_stride, mask=inside, other=0.0).to(FLOAT)
        tl.store(masks + k * num_pixels, tl.exp(logit - largest) / total, mask=inside)


@jit
def backward_kernel(
    d_masks,  # (B, K, P), contiguous as all three: the cotangents of the masks
    masks,  # (B, K, P)
    d_logits,  # out (B, K, P)
    num_pixels,  # P
    K: tl.constexpr,
    BLOCK: tl.constexpr,
):
    FLOAT: tl.constexpr = tl.float64 if masks.dtype.element_ty == tl.float64 else tl.float32
    batch = tl.program_id(0).to(tl.int64)
    pixel = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)  # no stride: 32 bits suffice
    inside = pixel < num_pixels
    first = batch * K * num_pixels + pixel  # (BLOCK,), offsets of slot 0

    mean = tl.zeros([BLOCK], FLOAT)  # Σ_j m_j dm_j
    for k in range(K):
        mask = tl.load(masks + first + k * num_pixels, mask=inside, other=0.0).to(FLOAT)
        d_mask = tl.load(d_masks + first + k * num_pixels, mask=inside, other=0.0).to(FLOAT)
        mean += mask * d_mask
    for k in range(K):
        mask = tl.load(masks + first + k * num_pixels, mask=inside, other=0.0).to(FLOAT)
        d_mask = tl.load(d_masks + first + k * num_pixels, mask=inside, other=0.0).to(FLOAT)
        tl.store(d_logits + first + k * num_pixels, mask * (d_mask - mean), mask=inside)


# As operators of torch the launches have a derivative, and torch.compile does not look inside.
@torch.library.custom_op("slot_kernels::masks", mutates_args=())
def _forward(logits: Tensor) -> Tensor:
    batch, slots, height, width = logits.shape
    masks = _empty(logits)
    logits = logits.flatten(2)  # (B, K, P), a copy only where pixels are not evenly spaced
    launch(
        forward_kernel, (batch, triton.cdiv(height * width, BLOCK)),
        logits, masks, *logits.stride(), height * width, K=slots, BLOCK=BLOCK,
    )  # fmt: skip
    return masks


@torch.library.custom_op("slot_kernels::masks_backward", mutates_args=())
def _backward(d_masks: Tensor, masks: Tensor) -> Tensor:
    batch, slots, height, width = masks.shape
    d_logits = _empty(masks)
    launch(
        backward_kernel, (batch, triton.cdiv(height * width, BLOCK)),
        d_masks.contiguous(), masks.contiguous(), d_logits, height * width, K=slots, BLOCK=BLOCK,
    )  # fmt: skip
    return d_logits


@_forward.register_fake
@_backward.register_fake
def _empty(like: Tensor, *_: Tensor) -> Tensor:
    """The output, to be filled; torch.compile asks only for its shape and type."""
    return torch.empty(like.shape, dtype=like.dtype, device=like.device)


_forward.register_autograd(
    lambda ctx, d_masks: _backward(d_masks, *ctx.saved_tensors),
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(output),
)
_backward.register_autograd(refuse_second_derivative)


def masks(logits: Tensor) -> Tensor:
    """Softmax over slots: logits (B, K, H, W), any strides -> masks of the same shape and type.

    bfloat16 and float16 are computed in float32. Differentiable; under Triton, once. Raises
    ValueError for anything but floating-point numbers (B, K, H, W) with K > 0.
    """
    if logits.ndim != 4 or logits.shape[1] == 0 or not logits.is_floating_point():
        raise ValueError(
            f"logits must be floating point and (B, K, H, W) with K > 0, "
            f"not {logits.dtype} {tuple(logits.shape)}"
        )
    if kernels.backend(logits) == "triton":
        return _forward(logits)
    return masks_torch(logits)
