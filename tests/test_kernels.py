"""The package kernels/ from outside: the choice of back-end, without triton, without a GPU."""

import importlib.util
import inspect
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import kernels
from kernels import launch as host

ROOT = Path(kernels.__file__).parents[1]

# Calls every operation forward and backward, and says what could be imported and chosen.
CHILD = """
import importlib, pathlib, sys
if {without_triton}:
    sys.modules["triton"] = None  # the import system then says that there is none
import torch
torch.cuda.is_available = lambda: False
import kernels
for file in sorted(pathlib.Path("kernels").glob("*.py")):
    if file.stem not in ("__init__", "benchmark"):
        importlib.import_module("kernels." + file.stem)

image = torch.rand(2, 3, 5, 4)
decoded = torch.rand(2, 3, 4, 5, 4, requires_grad=True)
gain, shift = (torch.rand(6, requires_grad=True) for _ in range(2))
z, weight, maps = (torch.rand(*s, requires_grad=True) for s in ((6, 7), (8, 7, 3, 3), (8, 5, 4)))
calls = dict(
    broadcast_conv=[z, weight, maps],
    leave_one_out=[image, decoded, 0.3],
    masks=[decoded[:, :, -1]],
    mixture_log_likelihood=[image, decoded, 0.3],
    refinement_inputs=[image, decoded, gain, shift, torch.rand(2, 5, 4), 0.3],
)
for name, arguments in calls.items():
    outputs = getattr(kernels, name)(*arguments)
    outputs = [outputs] if isinstance(outputs, torch.Tensor) else outputs
    assert all(output.isfinite().all() for output in outputs), name
    total = sum(output.square().sum() for output in outputs if output.requires_grad)
    sources = [a for a in arguments if isinstance(a, torch.Tensor) and a.requires_grad]
    if name != "leave_one_out":
        assert all(g.isfinite().all() for g in torch.autograd.grad(total, sources)), name
print(len(calls), "operations on", kernels.backend(decoded))
try:
    kernels.use("triton")
except RuntimeError as error:
    print(error)
print(kernels.describe("cpu"))
"""


@pytest.mark.parametrize("without_triton", [True, False])
def test_without_triton_or_without_a_gpu_everything_runs_in_torch(without_triton):
    if not without_triton and host.triton is None:
        pytest.skip("triton is not installed")
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", CHILD.format(without_triton=without_triton)]
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    before, error, after = run.stdout.splitlines()
    assert before == "5 operations on torch" and after == "torch (the device is cpu)"
    reason = "triton is not installed" if without_triton else "there is no CUDA device"
    assert error.startswith("kernels: triton cannot run here:") and reason in error


# -- the choice of back-end ----------------------------------------------------------------------


@pytest.fixture
def machine(monkeypatch) -> SimpleNamespace:
    """A GPU and triton, which a test may take away."""
    has = SimpleNamespace(triton=True, cuda=True)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name if has.triton else None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: has.cuda)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with kernels.use("auto"):
        yield has


def test_use_is_a_switch_and_a_context_manager(machine):
    kernels.use("torch")
    with kernels.use("auto"), kernels.use("triton"):
        assert kernels.backend("cuda") == "triton"
    with pytest.raises(KeyError), kernels.use("auto"):
        raise KeyError
    assert kernels.backend("cuda") == "torch"
    with pytest.raises(ValueError, match="choose triton, torch or auto"):
        kernels.use("cuda")


def test_auto_takes_triton_on_cuda_only(machine, monkeypatch):
    assert kernels.backend("cuda") == "triton"
    assert kernels.backend() == kernels.backend(torch.zeros(1)) == "torch"
    monkeypatch.setenv("TRITON_INTERPRET", "1")  # the interpreter runs only where it is asked for
    assert kernels.backend("cpu") == "torch"
    with kernels.use("triton"):
        assert kernels.backend("cpu") == "triton"


def test_triton_is_refused_where_it_cannot_run(machine):
    with kernels.use("triton"), pytest.raises(RuntimeError, match="on cpu, not on CUDA"):
        kernels.masks(torch.zeros(1, 2, 3, 3))
    machine.cuda = False
    with pytest.raises(RuntimeError, match="no CUDA device"):
        kernels.use("triton")
    machine.triton = False
    with pytest.raises(RuntimeError, match="triton is not installed"):
        kernels.use("triton")


def test_describe_says_which_kernels_run_and_why(machine):
    assert kernels.describe("cpu") == "torch (the device is cpu)"
    assert kernels.describe(torch.device("cuda", 1)) == "triton"
    machine.triton = False
    assert kernels.describe("cuda").startswith("torch (the package triton is not installed")
    machine.triton = True
    with kernels.use("torch"):
        assert kernels.describe("cuda") == "torch (--kernels torch)"
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


# -- launches ------------------------------------------------------------------------------------


@pytest.mark.skipif(host.triton is None, reason="triton is not installed")
def test_kernels_have_few_arguments_each_with_a_comment():
    """At most 15 besides constants of the compiler; a comment for every pointer."""
    number = 0
    for file in "masks", "mixture", "leave_one_out", "refinement_inputs":
        for name, kernel in vars(importlib.import_module(f"kernels.{file}")).items():
            if name.endswith("_kernel"):
                head = inspect.getsource(kernel.fn).split("):\n")[0].splitlines()[2:]
                arguments = [line for line in head if "constexpr" not in line]
                assert len(arguments) <= 15 and all("#" in line for line in arguments), name
                number += 1
    assert number == 8


class Recorder:
    """Stands in for a kernel and keeps what it is launched with."""

    def __init__(self):
        self.launches = []

    def __getitem__(self, grid):
        return lambda *arguments, **options: self.launches.append((grid, arguments, options))


def test_launch_selects_the_device_and_says_that_multiply_adds_are_fused(monkeypatch):
    """Triton launches on the current device, whatever the tensors are on."""
    selected, kernel = [], Recorder()

    class Selected:
        def __init__(self, device):
            self.device = device

        def __enter__(self):
            selected.append(self.device)

        def __exit__(self, *_):
            selected.append(None)

    monkeypatch.setattr(torch.cuda, "device", Selected)
    tensor = SimpleNamespace(is_cuda=True, device="cuda:1")
    host.launch(kernel, (2, 3), tensor, 7, BLOCK=64)
    host.launch(kernel, (2, 0), tensor, 7, BLOCK=64)  # an empty grid
    assert selected == ["cuda:1", None]
    assert kernel.launches == [
        ((2, 3), (tensor, 7), dict(num_warps=4, enable_fp_fusion=True, BLOCK=64))
    ]


def test_every_launch_goes_through_launch():
    """What went around it would escape tests/test_compile.py and the device of the tensors."""
    for path in (ROOT / "kernels").glob("*.py"):
        source = path.read_text()
        if path.name != "launch.py":
            assert "import triton" not in source and "triton.jit" not in source, path.name
            assert "_kernel[" not in source, path.name
