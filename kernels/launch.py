"""How every Triton kernel of this folder is written and started, with or without triton installed.

    @jit                                                     # triton.jit, or nothing at all
    def kernel(image, out, num_pixels, BLOCK: tl.constexpr): ...

    launch(kernel, grid, image, out, num_pixels, BLOCK=256)  # BLOCK and num_warps by keyword

One door for all launches, so that a test can stand in it: tests/test_compile.py compiles whatever
the public operations launch for GPUs that are not there.
"""

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
    """Run a kernel on the device of its first argument, a tensor.

    Multiply-adds are fused, said explicitly: Triton 3.10 changes the default. Does nothing for an
    empty grid.
    """
    if 0 in grid:
        return
    first: Tensor = arguments[0]
    with torch.cuda.device(first.device) if first.is_cuda else nullcontext():
        kernel[grid](*arguments, num_warps=num_warps, enable_fp_fusion=True, **constants)
