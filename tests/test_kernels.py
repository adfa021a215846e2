"""The package kernels/ from outside: without triton, without a GPU, and its door for launches.

The switch itself is tested in tests/test_mixture.py, which it was written with.
"""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import kernels
from kernels import launch as door

ROOT = Path(kernels.__file__).parents[1]

# Calls every operation forward and backward, and says what could be imported and chosen.
CHILD = """
import importlib, os, pathlib, sys
if {without_triton}:
    sys.modules["triton"] = None  # the import system then says that there is none
import torch
torch.cuda.is_available = lambda: False
import kernels
for file in sorted(pathlib.Path("kernels").glob("*.py")):
    importlib.import_module("kernels." + file.stem if file.stem != "__init__" else "kernels")

image = torch.rand(2, 3, 5, 4)
decoded = torch.rand(2, 3, 4, 5, 4, requires_grad=True)
gain, shift = (torch.rand(6, requires_grad=True) for _ in range(2))
coordinates = torch.rand(2, 5, 4)
z, bias = (torch.rand(shape, requires_grad=True) for shape in ((6, 7), (8,)))
weight = torch.rand(8, 9, 3, 3, requires_grad=True)
x = torch.rand(6, 8, 5, 4, requires_grad=True)
calls = dict(
    bias_elu=[x, bias],
    broadcast_conv=[z, weight, bias, coordinates],
    masks=[decoded[:, :, -1]],
    mixture=[image, decoded, 0.3],
    mixture_log_likelihood=[image, decoded, 0.3],
    refinement_inputs=[image, decoded, gain, shift, coordinates, 0.3],
)
assert set(kernels.TRITON) in (set(), set(calls)), kernels.TRITON.keys()
for name, arguments in calls.items():
    outputs = getattr(kernels, name)(*arguments)
    outputs = [outputs] if isinstance(outputs, torch.Tensor) else outputs
    total = sum(output.square().sum() for output in outputs if output.requires_grad)
    sources = [a for a in arguments if isinstance(a, torch.Tensor) and a.requires_grad]
    assert all(g.isfinite().all() for g in torch.autograd.grad(total, sources)), name
print(len(calls), "operations on", kernels.backend(decoded))
try:
    kernels.use("triton")
except RuntimeError as error:
    print(error)
print(kernels.backend(decoded))
"""


def run_child(without_triton: bool) -> list[str]:
    """The lines that the child prints, with no hint of an interpreter in its environment."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    code = CHILD.format(without_triton=without_triton)
    run = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT, env=environment, capture_output=True, text=True,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    return run.stdout.splitlines()


def test_without_triton_everything_runs_in_torch():
    before, error, after = run_child(without_triton=True)
    assert before == "6 operations on torch" and after == "torch"
    assert error == (
        "kernels: triton cannot run here: "
        "the package triton is not installed (pip install triton, Linux only)"
    )


@pytest.mark.skipif(door.triton is None, reason="triton is not installed")
def test_without_a_gpu_everything_runs_in_torch():
    before, error, after = run_child(without_triton=False)
    assert before == "6 operations on torch" and after == "torch"
    assert error == (
        "kernels: triton cannot run here: there is no CUDA device "
        "(TRITON_INTERPRET=1 runs the kernels on a CPU, slowly)"
    )


@pytest.mark.skipif(door.triton is None, reason="triton is not installed")
def test_every_operation_with_kernels_is_public():
    assert set(kernels.TRITON) <= set(kernels.__all__)


def test_describe_says_which_kernels_run_and_why(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with kernels.use("auto"):
        assert kernels.describe("cpu") == "torch (the device is cpu)"
        assert kernels.describe(torch.device("cuda", 1)) == "triton"
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
        assert kernels.describe("cuda").startswith("torch (the package triton is not installed")
    with kernels.use("torch"):
        assert kernels.describe("cuda") == "torch (--kernels torch)"
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    with kernels.use("triton"):
        assert kernels.describe("cuda") == "triton (--kernels triton)"
        with pytest.raises(RuntimeError, match="on cpu, not on CUDA"):
            kernels.describe("cpu")


@pytest.mark.parametrize(
    ("device", "kernel_size", "stride", "avx512", "planes"),
    [
        ("cpu", 3, 1, False, True),
        ("cpu", 3, 1, True, False),
        ("cpu", 1, 1, False, False),
        ("cpu", 3, 2, False, False),
        ("meta", 3, 1, False, False),
    ],
)
def test_layout(device, kernel_size, stride, avx512, planes, monkeypatch):
    monkeypatch.setattr(kernels, "AVX512", avx512)
    found = kernels.layout(torch.empty(1, 2, 3, 3, device=device), kernel_size, stride)
    assert found == (torch.contiguous_format if planes else torch.channels_last)


# -- kernels/launch.py -----------------------------------------------------------------------------


class Recorder:
    """Stands in for a kernel and keeps what it is launched with."""

    def __init__(self):
        self.launches = []

    def __getitem__(self, grid):
        return lambda *arguments, **options: self.launches.append((grid, arguments, options))


def test_launch_hands_everything_over_and_says_that_multiply_adds_are_fused():
    kernel, tensor = Recorder(), torch.zeros(3)
    door.launch(kernel, (2, 3), tensor, 7, 0.5, num_warps=8, BLOCK=64)
    [(grid, arguments, options)] = kernel.launches
    assert grid == (2, 3) and arguments[0] is tensor and arguments[1:] == (7, 0.5)
    assert options == dict(num_warps=8, enable_fp_fusion=True, BLOCK=64)
    door.launch(kernel, (1,), tensor)
    assert kernel.launches[1][2] == dict(num_warps=4, enable_fp_fusion=True)


@pytest.mark.parametrize("grid", [(0,), (4, 0), (0, 3)])
def test_an_empty_grid_launches_nothing(grid):
    kernel = Recorder()
    door.launch(kernel, grid, torch.zeros(0))
    assert not kernel.launches


def test_launch_selects_the_device_of_the_first_argument(monkeypatch):
    """Triton launches on the current device, whatever the tensors are on."""
    selected = []

    class Selected:
        def __init__(self, device):
            self.device = device

        def __enter__(self):
            selected.append(self.device)

        def __exit__(self, *_):
            selected.append(None)

    monkeypatch.setattr(torch.cuda, "device", Selected)
    kernel, tensor = Recorder(), SimpleNamespace(is_cuda=True, device="cuda:1")
    door.launch(kernel, (1,), tensor)
    assert selected == ["cuda:1", None] and len(kernel.launches) == 1


def test_without_triton_jit_leaves_the_function_alone(monkeypatch):
    monkeypatch.setattr(door, "triton", None)

    def function():
        return 7

    assert door.jit(function) is function


def test_every_launch_goes_through_the_door():
    """What went around it would escape tests/test_compile.py and the device of the tensors."""
    for path in (ROOT / "kernels").glob("*.py"):
        source = path.read_text()
        if path.name != "launch.py":
            assert "import triton" not in source and "triton.jit" not in source, path.name
            assert "_kernel[" not in source, path.name
