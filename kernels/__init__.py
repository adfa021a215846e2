"""Per-pixel operations of the models, a file each, with a choice of back-end; and two for layers.

    kernels.use("torch")                # until further notice
    with kernels.use("triton"): ...     # for a block
    kernels.backend(tensor)             # what runs for it: "triton" or "torch"
    kernels.describe("cuda")            # the same with the reason, for the header of a run

"auto", the default, takes the Triton kernels for CUDA tensors, and plain torch everywhere else.
Nothing here needs triton to be installed, or a GPU. To learn Triton, read masks.py and mixture.py.
"""

import os
from contextlib import ExitStack
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from kernels import launch

AVX512 = torch.backends.cpu.get_cpu_capability() == "AVX512"
_choice = "auto"


def use(name: str) -> ExitStack:
    """Choose "triton", "torch" or "auto" from here on; as a context manager, for its block only.

    Raises ValueError for another name, RuntimeError where Triton cannot run.
    """
    global _choice
    if name not in ("triton", "torch", "auto"):
        raise ValueError(f"kernels: unknown back-end {name!r}: choose triton, torch or auto")
    if name == "triton" and (reason := _triton_obstacle()):
        raise RuntimeError(f"kernels: triton cannot run here: {reason}")
    restore = ExitStack()  # runs its callback at the end of a with block, and only then
    restore.callback(_set_choice, _choice)
    _choice = name
    return restore


def backend(where: Tensor | torch.device | str = "cpu") -> str:
    """What runs for a tensor or device: "triton" or "torch".

    Raises RuntimeError where `use("triton")` is in force and Triton cannot run there.
    """
    device = where.device if isinstance(where, Tensor) else torch.device(where)
    # The interpreter is for tests: "auto" never picks it, it is far slower than torch.
    if _choice == "torch" or (_choice == "auto" and device.type != "cuda"):
        return "torch"
    reason = _triton_obstacle(device)
    if reason and _choice == "triton":
        raise RuntimeError(f"kernels: triton cannot run here: {reason}")
    return "torch" if reason else "triton"


def describe(device: torch.device | str) -> str:
    """For the header of a run: which kernels run there, and why, such as "torch (--kernels torch)".

    Raises as `backend` does.
    """
    device = torch.device(device)
    chosen = backend(device)
    if _choice != "auto":
        return f"{chosen} (--kernels {_choice})"
    if device.type != "cuda":
        return f"torch (the device is {device.type})"
    reason = _triton_obstacle(device)
    return f"torch ({reason})" if reason else "triton"


class Conv2d(nn.Conv2d):
    """nn.Conv2d that puts x (N, C, H, W) into the memory layout in which it is faster.

    That is channels-last, except for stride 1 and a kernel of more than one pixel on a CPU without
    AVX-512 (measured on an AMD EPYC with AVX2, torch 2.13). padding=None: half of the kernel, which
    with stride 1 keeps the size.
    """

    def __init__(self, inputs: int, outputs: int, kernel_size: int, stride: int = 1,
                 padding: int | None = None):
        padding = kernel_size // 2 if padding is None else padding
        super().__init__(inputs, outputs, kernel_size, stride, padding)

    def layout(self, x: Tensor) -> Tensor:
        """x, or an output of this convolution, in its layout."""
        slides = self.kernel_size != (1, 1) and self.stride == (1, 1)
        planes = slides and x.device.type == "cpu" and not AVX512
        return x.contiguous(memory_format=torch.contiguous_format if planes
                            else torch.channels_last)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(self.layout(x))


def full_precision(layer: nn.Module, *inputs: Any) -> Any:
    """The layer in its own type even under autocast: a likelihood divides rounding by sigma."""
    dtype = next(layer.parameters()).dtype
    with torch.autocast(inputs[0].device.type, enabled=False):
        return layer(*(x.to(dtype) if isinstance(x, Tensor) else x for x in inputs))


def _triton_obstacle(device: torch.device | None = None) -> str | None:
    """The first reason why Triton cannot run, in one line; None if it can."""
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    if launch.triton is None:
        return "the package triton cannot be imported: pip install triton, Linux only"
    if not interpreted and not torch.cuda.is_available():
        return "there is no CUDA device; TRITON_INTERPRET=1 runs the kernels on a CPU, slowly"
    if not interpreted and device is not None and device.type != "cuda":
        return f"the tensor is on {device.type}, not on CUDA"
    return None if interpreted else _driver_obstacle()


@torch.compiler.assume_constant_result
def _driver_obstacle() -> str | None:
    """The answer of `_ask_driver`, which torch.compile takes as it is and does not trace."""
    return _ask_driver()


@cache
def _ask_driver() -> str | None:
    """What hinders Triton's driver, which compiles a file of C when it is first used."""
    try:
        launch.triton.runtime.driver.active.get_current_target()
    except Exception as error:  # without a compiler, or without Python's headers
        return f"{type(error).__name__}: {error}".partition("\n")[0]
    return None


def _set_choice(name: str) -> None:
    global _choice
    _choice = name


# Last, because the files of the ops look up the names above. An op has the name of its file, so
# `kernels.masks` is the function, and `from kernels.masks import ...` still reads the file.
from kernels.broadcast_conv import broadcast_conv  # noqa: E402
from kernels.leave_one_out import leave_one_out  # noqa: E402
from kernels.masks import masks  # noqa: E402
from kernels.mixture import mixture_log_likelihood  # noqa: E402
from kernels.refinement_inputs import (  # noqa: E402
    RefinementInputs,
    refinement_inputs,
)

__all__ = [
    "Conv2d",
    "RefinementInputs",
    "backend",
    "broadcast_conv",
    "describe",
    "full_precision",
    "leave_one_out",
    "masks",
    "mixture_log_likelihood",
    "refinement_inputs",
    "use",
]
