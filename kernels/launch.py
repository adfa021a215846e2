"""What the host side of all Triton kernels shares; works with and without triton installed.

    @jit                                                     # triton.jit, or nothing at all
    def kernel(image, out, num_pixels, BLOCK: tl.constexpr): ...

    launch(kernel, grid, image, out, num_pixels, BLOCK=128)  # constants by keyword

Every launch goes through here, so that tests/test_compile.py can compile all kernels for GPUs that
are not present.
"""

import math
from collections.abc import Callable
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError:  # macOS, Windows: the torch paths run, and kernels.use("triton") says why not
    triton, tl = None, SimpleNamespace(constexpr=None)


def jit(function: Callable) -> Callable:
    """triton.jit where there is triton; else the function, which nobody then calls."""
    return function if triton is None else triton.jit(function)


def launch(
    kernel: Any, grid: tuple[int, ...], *arguments: Any, num_warps: int = 4, **constants: Any
) -> None:
    """Run a kernel on the device of its first argument, a tensor; an empty grid runs nothing.

    Multiply-adds are fused, said explicitly: Triton 3.10 changes the default.
    """
    if 0 in grid:
        return
    if max(grid[1:], default=0) > 65_535:  # CUDA's limit; blocks of 128 pixels
        raise ValueError("kernels: images of more than 8 million pixels need kernels.use('torch')")
    first: Tensor = arguments[0]
    with torch.cuda.device(first.device) if first.is_cuda else nullcontext():
        kernel[grid](*arguments, num_warps=num_warps, enable_fp_fusion=True, **constants)


def refuse_second_derivative(ctx: Any, *_: Any) -> None:
    """The backward function of every backward operator."""
    raise RuntimeError("kernels: there is no second derivative; kernels.use('torch') has one")


def check_mixture(
    image: Tensor, decoded: Tensor, sigma: float | Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Refuse what has no meaning, with ValueError; image and sigma as constants, sigma as a tensor.

    sigma gets the type of the arithmetic: half precision would round x − μ to 1 % of σ and more.
    """
    if image.ndim != 4 or decoded.ndim != 5:
        raise ValueError(
            f"image must be (B, C, H, W) and decoded (B, K, C+1, H, W), "
            f"not {tuple(image.shape)} and {tuple(decoded.shape)}"
        )
    batch, colours, height, width = image.shape
    if colours not in (1, 3):
        raise ValueError(f"image must have 1 or 3 colours, not {colours}")
    slots = decoded.shape[1]
    if decoded.shape != (batch, slots, colours + 1, height, width) or slots == 0:
        raise ValueError(
            f"decoded must be ({batch}, K, {colours + 1}, {height}, {width}) with K > 0 "
            f"for this image, not {tuple(decoded.shape)}"
        )
    if not (image.is_floating_point() and decoded.is_floating_point()):
        raise ValueError(
            f"image and decoded must be floating point, not {image.dtype} and {decoded.dtype}"
        )
    wide = torch.promote_types(torch.promote_types(image.dtype, decoded.dtype), torch.float32)
    if isinstance(sigma, Tensor):  # its value is not checked: that would wait for the GPU
        if sigma.ndim:
            raise ValueError(f"sigma must be one number, not {tuple(sigma.shape)}")
        return image.detach(), decoded, sigma.detach().to(decoded.device, wide)
    if not 0 < sigma < math.inf:
        raise ValueError(f"sigma must be positive and finite, not {sigma}")
    return image.detach(), decoded, decoded.new_full((), sigma, dtype=wide)
