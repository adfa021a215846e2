"""Every mutant of kernels/ below fails a check that the original passes.

The checks compare both back-ends, Triton interpreted on the CPU, with brute force in linear space
in float64: outputs and gradients, of images whose pixels fill one block and a part of the next.
What the operations allocate is full of NaN and lies between guards: numbers that a kernel does not
write and numbers that it writes elsewhere are both caught.
"""

import importlib.util
import itertools
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch
from kernel_checks import (
    assert_near,
    brute_leave_one_out,
    brute_log_likelihood,
    brute_masks,
    guarded_memory,
)
from test_refinement_inputs import brute_inputs, make_arguments
from torch import Tensor

import kernels
from kernels.launch import triton

pytestmark = [
    pytest.mark.skipif(triton is None, reason="there are no kernels without triton"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),  # of numpy, of the mutants' NaN
    pytest.mark.skipif(torch.cuda.is_available(), reason="mutants are for the interpreter"),
]
FOLDER = Path(kernels.__file__).parent


def compare(operation: Callable, reference: Callable, arguments: list[Tensor]) -> None:
    """Outputs first; then gradients of what is differentiable, from random cotangents."""
    sources = [value.requires_grad_() for value in arguments[1:4]]
    pairs = list(zip(operation(*arguments), reference(*arguments), strict=True))
    for actual, expected in pairs:
        assert_near(actual, expected)
    pairs = [pair for pair in pairs if pair[1].requires_grad]
    generator = torch.Generator().manual_seed(0)
    cotangents = [torch.randn(a.shape, generator=generator, dtype=a.dtype) for a, _ in pairs]
    found, wanted = (
        torch.autograd.grad(outputs, sources, cotangents, allow_unused=True)
        for outputs in zip(*pairs, strict=True)
    )
    for actual, expected in zip(found, wanted, strict=True):
        assert expected is None or not assert_near(actual, expected)


def check_masks(module: ModuleType, arguments: list[Tensor]) -> None:
    compare(
        lambda image, decoded, *_: module.masks(decoded[:, :, -1]).unbind(1),
        lambda image, decoded, *_: brute_masks(decoded),
        arguments,
    )


def check_mixture(module: ModuleType, arguments: list[Tensor]) -> None:
    compare(
        lambda image, decoded, *_: [module.mixture_log_likelihood(image, decoded, 0.3)],
        lambda image, decoded, *_: [brute_log_likelihood(image, decoded, 0.3)],
        arguments,
    )


def check_leave_one_out(module: ModuleType, arguments: list[Tensor]) -> None:
    image, decoded = arguments[:2]
    expected = brute_leave_one_out(image, decoded, 0.3)
    assert_near(module.leave_one_out(image, decoded, 0.3), expected)
    if decoded.shape[1] > 1:  # where slot 0 has all of the mask, the others are as before
        decoded[:, 0, -1, 0] = 1e30
        actual = module.leave_one_out(image, decoded, 0.3)
        assert_near(actual[:, 0], expected[:, 0])


def check_refinement_inputs(module: ModuleType, arguments: list[Tensor]) -> None:
    def unbind(packed: Tensor, *others: Tensor) -> tuple[Tensor, ...]:
        return *packed.unbind(2), *others  # every channel by its own largest number

    compare(
        lambda *arguments: unbind(*module.refinement_inputs(*arguments, 0.3)),
        lambda *arguments: unbind(*brute_inputs(*arguments, 0.3)),
        arguments,
    )


CHECKS: dict[str, Callable[[ModuleType, list[Tensor]], None]] = {
    "masks": check_masks,
    "mixture": check_mixture,
    "leave_one_out": check_leave_one_out,
    "refinement_inputs": check_refinement_inputs,
}


def check(operation: str, module: ModuleType, backends: tuple[str, ...]) -> None:
    """An operation of a module, with several slots and with one."""
    module.BLOCK = 32  # of 35 pixels
    for backend in backends:
        with kernels.use(backend):
            CHECKS[operation](module, make_arguments(2, 3, 3, 7, 5))
            CHECKS[operation](module, make_arguments(1, 1, 1, 1, 3))


# name: file and, of device.py, an operation that uses it; what is replaced, by what
MUTANTS: dict[str, tuple[str, str, str]] = {
    "masks: the sum of exponentials is the last one": (
        "masks", "total += tl.exp(logit - largest)", "total = tl.exp(logit - largest)",
    ),
    "masks: the last pixels are not written": (
        "masks", "inside = pixel < num_pixels  #", "inside = pixel < num_pixels - 1  #",
    ),
    "masks: written beyond the last pixel": (
        "masks", "(logit - largest) / total, mask=inside)", "(logit - largest) / total)",
    ),
    "masks, backward: the mean is not subtracted": ("masks", "(d_mask - mean)", "d_mask"),
    "masks, backward: the mean is of the last slot": (
        "masks", "mean += mask * d_mask", "mean = mask * d_mask",
    ),
    "masks in torch: over columns": ("masks", "logits.softmax(1)", "logits.softmax(3)"),
    "a running sum that a new largest term does not rescale": (
        "device mixture", "total * tl.exp(largest - shift)", "total",
    ),
    "the last colour is left out": (
        "device mixture", "tl.where(column < CHANNELS - 1, x - slot",
        "tl.where(column < CHANNELS - 2, x - slot",
    ),
    "the norm of one colour only": ("device mixture", "(CHANNELS - 1) * (tl.log", "(tl.log"),
    "the score is by sigma, not by its square": (
        "device mixture", "log_norm, standard / sigma", "log_norm, standard",
    ),
    "the first channel is the logit": (
        "device mixture", "column == CHANNELS - 1, slot", "column == 0, slot",
    ),
    "planes of the image in the wrong order": (
        "device mixture", "(batch * (CHANNELS - 1) + column)",
        "(batch * (CHANNELS - 1) + CHANNELS - 2 - column)",
    ),
    "all slots are the first": ("device mixture", "(index * num_pixels + pixel", "(pixel"),
    "the best slot keeps its place as second best": (
        "device leave_one_out", "tl.where(wins, first, tl.maximum(second, value))",
        "tl.maximum(second, value)",
    ),
    "the second best slot is forgotten": (
        "device leave_one_out", "first, tl.maximum(second, value)", "first, second",
    ),
    "the left-out slot stays in the sum": (
        "device leave_one_out", "total - tl.exp(logit - logit1 + log_density - term1)", "total",
    ),
    "no renormalisation of the other masks": (
        "device leave_one_out", "prior - tl.exp(logit - logit1)", "prior",
    ),
    "the owner's term is in the rest": (
        "device leave_one_out", "rest += tl.where(k == owner, 0.0,", "rest += tl.where(k < 0, 0.0,",
    ),
    "the leader is in the sum of the others": (
        "device leave_one_out", "total += tl.where(k == leader", "total += tl.where(k < 0",
    ),
    "without the leader, logits are still relative to it": (
        "device leave_one_out", "result = tl.where(k == leader, without_leader, result)", "pass",
    ),
    "no branch for a single slot": ("device leave_one_out", "if K == 1:", "if K == 0:"),
    "the likelihood is not normalised": ("mixture", "tl.log(total / prior)", "tl.log(total)"),
    "backward: the logit's gradient has the wrong sign": (
        "mixture", "responsibility - tl.exp(logit - largest) / prior",
        "tl.exp(logit - largest) / prior - responsibility",
    ),
    "backward: the cotangent of the first pixel for all": (
        "mixture", "d_log_likelihood + batch * num_pixels + pixel", "d_log_likelihood + pixel * 0",
    ),
    "in torch: a mixture for every colour": (
        "mixture", "(log_masks + log_density_torch(image, decoded[:, :, :-1], sigma)).logsumexp(1)",
        "sum((log_masks + log_density_torch(image[:, c : c + 1], decoded[:, :, c : c + 1], sigma))"
        ".logsumexp(1) for c in range(image.shape[1]))",
    ),
    "in torch: the norm of one colour only": (
        "mixture", "image.shape[1] * (sigma.log()", "(sigma.log()",
    ),
    "in torch: masks over rows": ("mixture", ".log_softmax(1)", ".log_softmax(2)"),
    "in torch: leave-one-out keeps the full masks": (
        "leave_one_out", "logits[:, others].log_softmax(1)", "logits.log_softmax(1)[:, others]",
    ),
    "in torch: leave-one-out keeps the slot": ("leave_one_out", "if j != k]", "if j >= 0]"),
    "gradient of the likelihood, not of minus it": (
        "refinement_inputs", "-responsibility[:, None] * score", "responsibility[:, None] * score",
    ),
    "pixels beyond the edge enter the mean": (
        "refinement_inputs", "tl.where(inside[:, None], tile, 0.0), 0)", "tile, 0)",
    ),
    "pixels beyond the edge enter the variance": (
        "refinement_inputs", "tl.where(inside[:, None], tile - mean[None, :], 0.0)",
        "tile - mean[None, :]",
    ),
    "moments of the first slot for all": (
        "refinement_inputs", "column = statistics + (first +",
        "column = statistics + (first * 0 +",
    ),
    "the gap between the means of blocks is left out": (
        "refinement_inputs", "squares + count * (mean - overall).square()", "squares",
    ),
    "the last block counts as a full one": (
        "refinement_inputs", ".clamp(max=block)", ".clamp(min=block, max=block)",
    ),
    "the variance of colours is that of one": (
        "refinement_inputs", "size = part.shape[2] * num_pixels", "size = num_pixels",
    ),
    "eps outside the root": (
        "refinement_inputs", "/ size + EPS).rsqrt()", "/ size).sqrt().add(EPS).reciprocal()",
    ),
    "masks and logits exchanged": (
        "refinement_inputs", "side_by_side(mask, logit)", "side_by_side(logit, mask)",
    ),
    "the posterior with the mask prior": (
        "refinement_inputs", "density1, total = update_logsumexp(density1, total, log_density)",
        "density1, total = update_logsumexp(density1, total, log_density + logit)",
    ),
    "the second coordinate is the first": (
        "refinement_inputs", "coordinates + n * num_pixels", "coordinates",
    ),
    "backward: nothing comes back through the likelihood": (
        "refinement_inputs", "d_slot -= d_likelihood[:, None] * gradient", "pass",
    ),
    "backward: the softmax's mean is not subtracted": (
        "refinement_inputs", "d_mask - mask_mean", "d_mask",
    ),
    "backward: the posterior's mean is not subtracted": (
        "refinement_inputs", "d_posterior - posterior_mean", "d_posterior",
    ),
    "backward: the gain gets the gradient of the bias": (
        "refinement_inputs", "d_gain + d_gradient * gradient", "d_gain + d_gradient",
    ),
    "backward: sums of the last slot only": (
        "refinement_inputs", "= d_bias + d_gradient", "= d_gradient",
    ),
    "in torch: the gradient of the mask itself": (
        "refinement_inputs", "grad_mask = masks - responsibilities",
        "grad_mask = -responsibilities / masks",
    ),
    "in torch: one normalisation of all slots": (
        "refinement_inputs", "F.layer_norm(v, v.shape[2:], eps=EPS)",
        "F.layer_norm(v, v.shape[1:], eps=EPS)",
    ),
}  # fmt: skip


@pytest.fixture
def load(tmp_path) -> Iterator[Callable[..., ModuleType]]:
    """A function that loads a file of kernels/ as a module of its own, with a replacement."""
    numbers = itertools.count()
    added = []

    def load_source(file: str, source: str) -> ModuleType:
        name = f"mutant_{file}_{next(numbers)}"
        path = tmp_path / f"{name}.py"  # Triton reads the source of a kernel from its file
        # Operators of a name of their own, or they would take the place of the originals.
        path.write_text(source.replace("slot_kernels::", f"{name}::"))
        spec = importlib.util.spec_from_file_location(name, path)
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module
        added.append(name)
        spec.loader.exec_module(module)
        return module

    def load(files: str, old: str = "", new: str = "") -> ModuleType:
        file, *user = files.split()
        source = (FOLDER / f"{file}.py").read_text()
        if old:
            assert source.count(old) == 1, f"{source.count(old)} times in {file}.py: {old}"
        module = load_source(file, source.replace(old, new))
        for name in user:  # imports the mutated device functions
            source = (FOLDER / f"{name}.py").read_text()
            module = load_source(name, source.replace("kernels.device", module.__name__))
        return module

    yield load
    for name in added:
        del sys.modules[name]


@pytest.mark.parametrize("file", CHECKS)
def test_the_original_passes(file, load, monkeypatch):
    with guarded_memory(monkeypatch):
        check(file, load(file), ("torch", "triton"))


@pytest.mark.parametrize("name", MUTANTS)
def test_mutant_is_caught(name, load, monkeypatch):
    files, old, new = MUTANTS[name]
    mutant = load(files, old, new)
    with pytest.raises(AssertionError), guarded_memory(monkeypatch):
        check(files.split()[-1], mutant, ("torch" if "in torch" in name else "triton",))
