"""The package kernels/ from outside: what operations share, the choice of back-end, launches."""

import contextlib
import importlib.util
import inspect
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from kernel_checks import DEVICE, assert_near, backend, slot_inputs, triton_only
from torch import Tensor

import kernels
from kernels import launch as host

__all__ = ["backend", "triton_only"]  # fixtures
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
    reason = "triton cannot be imported" if without_triton else "there is no CUDA device"
    assert error.startswith("kernels: triton cannot run here:") and reason in error


# -- what all operations share -------------------------------------------------------------------


def refinement_inputs(image: Tensor, decoded: Tensor, sigma: float | Tensor) -> list[Tensor]:
    vector, maps = torch.linspace(-1, 1, 6).to(image), image.new_ones(2, *image.shape[2:])
    inputs = kernels.refinement_inputs(image, decoded, vector, vector + 1, maps, sigma)
    return [inputs.packed, inputs.log_likelihood, inputs.grad_decoded]


OPERATIONS: dict[str, Callable[..., list[Tensor]]] = {  # of image, decoded and sigma
    "leave_one_out": lambda *arguments: [kernels.leave_one_out(*arguments)],
    "masks": lambda image, decoded, sigma: [kernels.masks(decoded[:, :, -1] / sigma)],
    "mixture": lambda *arguments: [kernels.mixture_log_likelihood(*arguments)],
    "refinement_inputs": refinement_inputs,
}
every_operation = pytest.mark.parametrize("name", OPERATIONS)
every_derivative = pytest.mark.parametrize("name", list(OPERATIONS)[1:])


def total(name: str, *arguments: Tensor | float) -> Tensor:
    """A number that depends on every output."""
    return sum(output.square().sum() for output in OPERATIONS[name](*arguments))


@every_derivative
def test_backward_twice_but_no_second_derivative(triton_only, name):
    image, decoded = slot_inputs(1, 2)
    result = total(name, image, decoded.requires_grad_(), 0.3)
    (first,) = torch.autograd.grad(result, decoded, retain_graph=True)
    (second,) = torch.autograd.grad(result, decoded, create_graph=True)
    assert torch.equal(first, second)
    with pytest.raises(RuntimeError, match="no second derivative"):
        (decoded.sum() + second.square().sum()).backward()


@every_operation
def test_in_a_compiled_graph_sigma_may_change(backend, name):
    image, decoded = slot_inputs(1, 2)
    decoded.requires_grad_()

    def function(decoded: Tensor, sigma: Tensor) -> Tensor:
        return total(name, image, decoded * 1.0, sigma) + decoded.square().sum()

    compiled = torch.compile(function, backend="aot_eager", fullgraph=True)
    for sigma in image.new_tensor([0.3, 0.2]):
        actual, expected = compiled(decoded, sigma), function(decoded, sigma)
        torch.testing.assert_close(actual, expected)
        (gradient,) = torch.autograd.grad(actual, decoded)
        torch.testing.assert_close(gradient, torch.autograd.grad(expected, decoded)[0])


@every_operation
def test_an_image_is_as_in_a_batch_slots_permute_and_inputs_stay(backend, name):
    image, decoded = slot_inputs(3, 7)
    before, order = (image.clone(), decoded.clone()), [3, 0, 6, 4, 2, 1, 5]
    alone = OPERATIONS[name](image[1:2], decoded[1:2, order], 0.3)
    for actual, expected in zip(alone, OPERATIONS[name](image, decoded, 0.3), strict=True):
        has_slots = expected.shape[1] == len(order)
        assert_near(actual, expected[1:2, order] if has_slots else expected[1:2])
    assert torch.equal(image, before[0]) and torch.equal(decoded, before[1])


@every_operation
@pytest.mark.parametrize("shape", [(0, 3, 5, 4), (2, 3, 0, 4)])
def test_no_images_and_no_pixels(backend, name, shape):
    if name == "refinement_inputs" and shape[2] == 0:
        pytest.skip("nothing has no mean")
    image = torch.zeros(shape, device=DEVICE)
    decoded = torch.zeros(shape[0], 2, 4, *shape[2:], device=DEVICE, requires_grad=True)
    for output in OPERATIONS[name](image, decoded, 0.3):
        assert output.numel() == 0 and output.shape[-2:] == shape[2:]
        assert not output.requires_grad or not output.sum().backward(retain_graph=True)


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="needs an NVIDIA device")
@every_derivative
def test_same_bits_every_time(triton_only, name):
    image, decoded = (value.float() for value in slot_inputs(8, 7, 3, 128, 128))
    decoded.requires_grad_()
    results = [total(name, image, decoded, 0.1) for _ in range(3)]
    gradients = [torch.autograd.grad(result, decoded)[0] for result in results]
    assert all(torch.equal(result, results[0]) for result in results)
    assert all(torch.equal(gradient, gradients[0]) for gradient in gradients)


# -- the choice of back-end ----------------------------------------------------------------------


@pytest.fixture
def machine(monkeypatch) -> SimpleNamespace:
    """A GPU and triton, which a test may take away."""
    has = SimpleNamespace(triton=True, cuda=True, compiler=True)

    def ask() -> None:
        if not has.compiler:
            raise RuntimeError("Failed to find C compiler.\nPlease set CC.")

    driver = SimpleNamespace(active=SimpleNamespace(get_current_target=ask))
    triton = SimpleNamespace(runtime=SimpleNamespace(driver=driver))
    there = property(lambda _: triton if has.triton else None)
    monkeypatch.setattr(kernels, "launch", type("Launch", (), dict(triton=there))())
    kernels._ask_driver.cache_clear()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: has.cuda)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with kernels.use("auto"):
        yield has
    kernels._ask_driver.cache_clear()


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
    with pytest.raises(RuntimeError, match="triton cannot be imported"):
        kernels.use("triton")


def test_describe_says_which_kernels_run_and_why(machine):
    assert kernels.describe("cpu") == "torch (the device is cpu)"
    assert kernels.describe(torch.device("cuda", 1)) == "triton"
    machine.triton = False
    assert kernels.describe("cuda").startswith("torch (the package triton cannot be imported")
    machine.triton = True
    with kernels.use("torch"):
        assert kernels.describe("cuda") == "torch (--kernels torch)"
    with kernels.use("triton"):
        assert kernels.describe("cuda") == "triton (--kernels triton)"
        with pytest.raises(RuntimeError, match="on cpu, not on CUDA"):
            kernels.describe("cpu")


def test_without_a_c_compiler_auto_takes_torch_and_says_why(machine):
    machine.compiler = False
    assert kernels.backend("cuda") == "torch"
    assert kernels.describe("cuda") == "torch (RuntimeError: Failed to find C compiler.)"
    machine.cuda = False  # else the next line would look for it
    ask = torch.compile(lambda x: (x, kernels._driver_obstacle()), backend="eager", fullgraph=True)
    assert "C compiler" in ask(torch.ones(1))[1]


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
    conv = kernels.Conv2d(2, 2, kernel_size, stride)
    for layout in (torch.contiguous_format, torch.channels_last):
        found = conv.layout(torch.empty(1, 2, 3, 3, device=device).to(memory_format=layout))
        assert found.is_contiguous() == planes
        assert found.is_contiguous(memory_format=torch.channels_last) != planes
    assert conv.padding == (kernel_size // 2,) * 2
    assert kernels.Conv2d(2, 2, 5, padding=1).padding == (1, 1)


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


def test_launch_selects_the_device_and_says_that_multiply_adds_are_fused(monkeypatch):
    """Triton launches on the current device, whatever the tensors are on."""
    selected, launches = [], []

    class Kernel:
        def __class_getitem__(cls, grid):
            return lambda *arguments, **options: launches.append((grid, arguments, options))

    def select(device: str) -> contextlib.AbstractContextManager:
        selected.append(device)
        return contextlib.nullcontext()

    monkeypatch.setattr(torch.cuda, "device", select)
    tensor = SimpleNamespace(is_cuda=True, device="cuda:1")
    host.launch(Kernel, (2, 3), tensor, 7, BLOCK=64)
    host.launch(Kernel, (2, 0), tensor, 7, BLOCK=64)  # an empty grid
    with pytest.raises(ValueError, match="8 million pixels"):
        host.launch(Kernel, (2, 65_536), tensor, 7, BLOCK=64)
    constants = dict(num_warps=4, enable_fp_fusion=True, BLOCK=64)
    assert selected == ["cuda:1"] and launches == [((2, 3), (tensor, 7), constants)]


def test_every_launch_goes_through_launch():
    """What went around it would escape tests/test_compile.py and the device of the tensors."""
    for path in (ROOT / "kernels").glob("*.py"):
        source = path.read_text()
        if path.name != "launch.py":
            assert "import triton" not in source and "triton.jit" not in source, path.name
            assert "_kernel[" not in source, path.name
