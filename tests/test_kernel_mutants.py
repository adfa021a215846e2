"""Changed kernels have to be found out: every mutant below fails a check that the original passes.

The checks compare a kernel, interpreted on the CPU, with the plain torch reference in float64:
outputs and gradients, of images whose pixels fill one block and a part of the next. The memory that
the operations allocate is full of NaN and lies between guards: what a kernel leaves out is seen,
and what it writes beside its output.
"""

import functools
import importlib.util
import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch
from kernel_checks import guarded_memory
from torch import Tensor

import kernels
from kernels.launch import triton

pytestmark = [
    pytest.mark.skipif(triton is None, reason="there are no kernels without triton"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),  # of numpy, of the mutants' NaN
    pytest.mark.skipif(torch.cuda.is_available(), reason="mutants are for the interpreter"),
]
FOLDER = Path(kernels.__file__).parent
HEIGHT, WIDTH = 7, 5  # 35 pixels: a block of 32, and 3

# -- checks ----------------------------------------------------------------------------------------

Operation = Callable[..., Tensor | tuple[Tensor, ...]]


def compare(operation: Operation, reference: Operation, arguments: tuple, *options) -> None:
    """Outputs first; then gradients, of whatever asks for them, from random cotangents."""

    def outputs_of(function: Operation) -> tuple[Tensor, ...]:
        outputs = function(*arguments, *options)
        return (outputs,) if isinstance(outputs, Tensor) else tuple(outputs)

    def gradients_of(outputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        differentiable = [output for output in outputs if output.requires_grad]
        cotangents = [random(*out.shape, seed=i).detach() for i, out in enumerate(differentiable)]
        sources = [argument for argument in arguments if argument.requires_grad]
        return torch.autograd.grad(differentiable, sources, cotangents)

    outputs, expected = outputs_of(operation), outputs_of(reference)
    torch.testing.assert_close(outputs, expected, rtol=1e-8, atol=1e-8)
    gradients, expected = gradients_of(outputs), gradients_of(expected)
    torch.testing.assert_close(gradients, expected, rtol=1e-8, atol=1e-8)


def random(*shape: int, seed: int = 0, last: bool = False) -> Tensor:
    """Uniform in [-1, 1], float64; `last`: channels last in memory, the channels being axis -3."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.rand(shape, generator=generator, dtype=torch.float64) * 2 - 1
    if last:
        values = values.movedim(-3, -1).contiguous().movedim(-1, -3)
    return values.requires_grad_()


def mixture_arguments(slots: int, last: bool) -> tuple[Tensor, Tensor]:
    image = random(2, 3, HEIGHT, WIDTH, last=last).detach()
    return image, random(2, slots, 4, HEIGHT, WIDTH, seed=1, last=last)


def check_mixture(module: ModuleType) -> None:
    module.BLOCKS = {"mixture": (32, 1), "log_likelihood": (64, 1), "mixture_backward": (64, 1)}
    operation, reference = module.mixture, module.mixture_reference
    compare(operation, reference, mixture_arguments(3, last=True), 0.5, "gaussian", 0.5)
    compare(operation, reference, mixture_arguments(2, last=False), 0.5, "logistic")
    compare(operation, reference, mixture_arguments(1, last=True), 0.5)
    compare(
        module.mixture_log_likelihood,
        lambda *arguments: module.mixture_reference(*arguments).log_likelihood,
        mixture_arguments(2, last=True),
        0.5,
    )


def check_refinement_inputs(module: ModuleType) -> None:
    module.BLOCKS = module.BLOCKS | {"statistics": (32, 1), "pack": (64, 1), "backward": (64, 1)}
    operation, reference = module.refinement_inputs, module.refinement_inputs_reference
    affine, coordinates = random(2, 6, seed=2).unbind(), random(2, HEIGHT, WIDTH, seed=3).detach()
    arguments = *mixture_arguments(2, last=True), *affine, coordinates
    compare(operation, reference, arguments, 0.5, "gaussian", 0.5, True, 0.01)
    arguments = *mixture_arguments(1, last=False), *affine, coordinates
    compare(operation, reference, arguments, 0.5, "logistic")


def check_masks(module: ModuleType) -> None:
    module.BLOCK = 32
    for last in (True, False):
        logits = mixture_arguments(3, last)[1].detach()[:, :, -1].requires_grad_()
        compare(module.masks, module.masks_reference, (logits,))


def check_bias_elu(module: ModuleType) -> None:
    module.NUMBERS, module.PROGRAMS = 64, 1  # 16 pixels of four channels, and several such tiles
    for last in (True, False):
        arguments = random(2, 3, HEIGHT, WIDTH, last=last), random(3, seed=1)
        compare(module.bias_elu, module.bias_elu_reference, arguments)


def check_broadcast_conv(module: ModuleType) -> None:
    module.NUMBERS, module.in_turn = 128, lambda *_: 2  # two images of three, then one
    for kernel, activation, layout in (
        (3, "elu", torch.channels_last),
        (5, "relu", torch.contiguous_format),
    ):
        z, weight, bias = random(3, 2), random(3, 4, kernel, kernel, seed=1), random(3, seed=2)
        arguments = z, weight, bias, random(2, HEIGHT, WIDTH, seed=3).detach()
        operation = functools.partial(module.broadcast_conv, memory_format=layout)
        compare(operation, module.broadcast_conv_reference, arguments, activation)


# -- mutants ---------------------------------------------------------------------------------------

CHECKS: dict[str, Callable[[ModuleType], None]] = {
    "mixture": check_mixture,
    "refinement_inputs": check_refinement_inputs,
    "masks": check_masks,
    "bias_elu": check_bias_elu,
    "broadcast_conv": check_broadcast_conv,
}

MUTANTS: dict[str, tuple[str, str, str]] = {  # name: file, what is replaced, by what
    "the first slot is skipped": (
        "mixture",
        "# ε is a component\n    for k in range(K):",
        "\n    for k in range(1, K):",
    ),
    "the best slot keeps its place as second best": (
        "mixture",
        "second = tl.where(wins, top, tl.where(follows, value, second))",
        "second = tl.where(follows, value, second)",
    ),
    "the sum without the best slot is stale": (
        "mixture", "rest = tl.where(wins, total, rest)\n", "\n",
    ),
    "a running sum that a new largest term does not rescale": (
        "mixture", "weighted * gap + weight, weighted + gap", "weighted + weight, weighted + gap",
    ),
    "weights are added after the largest term has moved": (
        "mixture",
        "prior_mean, prior = add_weight(prior_mean, prior[0], logit, weight), "
        "add_term(prior, logit)",
        "prior = add_term(prior, logit)\n"
        "        prior_mean = add_weight(prior_mean, prior[0], logit, weight)",
    ),
    "the left-out slot stays in the sum": ("mixture", "total - joint_term)", "total)"),
    "no renormalisation of the other masks": (
        "mixture", "tl.where(leads, prior_rest, prior_total - prior_term)", "prior_total",
    ),
    "no branch for a single slot": ("mixture", "if K > 1:", "if K > 0:"),
    "gradient of the likelihood, not of minus it": (
        "mixture", "(-responsibility * scores[c],)", "(responsibility * scores[c],)",
    ),
    "the logistic score has the same sign on both sides": (
        "mixture", "(tl.where(difference < 0, -score, score),)", "(score,)",
    ),
    "the posterior's epsilon is left out": (
        "mixture",
        "tl.full([BLOCK], floor, dtype), tl.full([BLOCK], 1.0, dtype)",
        'tl.full([BLOCK], float("-inf"), dtype), tl.full([BLOCK], 0.0, dtype)',
    ),
    "masks are stored beyond the last pixel": (
        "mixture",
        "tl.store(masks + plane + lanes, mask, mask=inside)",
        "tl.store(masks + plane + lanes, mask)",
    ),
    "the last pixels are taken for outside": (
        "mixture", "tl.minimum(num_pixels - start,", "tl.minimum(num_pixels - start - 1,",
    ),
    "planes of the gradient in the wrong order": (
        "mixture", "(slot * WIDTH + c) * num_pixels", "(slot * WIDTH + WIDTH - 1 - c) * num_pixels",
    ),
    "columns of a tile in the wrong order": ("mixture", "parts = even + odd", "parts = odd + even"),
    "backward: the likelihood's part of the logits has the wrong sign": (
        "mixture", "mask * (d_mask - d_likelihood)", "mask * (d_mask + d_likelihood)",
    ),
    "backward: the softmax's mean is not subtracted": (
        "mixture", "plane, pixels, dtype) - joint_mean", "plane, pixels, dtype)",
    ),
    "the mask prior is missing in the likelihood": (
        "mixture", "add_term(prior, logit)\n    lanes", "add_term(prior, logit * 0)\n    lanes",
    ),
    "M2 of the tiles is added without the gap of their means": (
        "refinement_inputs", "squares += width * count * gap * gap", "squares += 0 * gap",
    ),
    "the last tile counts as a full one": (
        "refinement_inputs", "sums += count * tl.load", "sums += TILE * tl.load",
    ),
    "pixels beyond the edge enter the mean": (
        "refinement_inputs", "tl.sum(tl.where(inside, total, 0.0))", "tl.sum(total)",
    ),
    "pixels beyond the edge enter the variance": (
        "refinement_inputs", "tl.sum(tl.where(inside, squares, 0.0))", "tl.sum(squares)",
    ),
    "the variance of colours is that of one plane": (
        "refinement_inputs", "% 3 == 1, COLOURS, 1)", "% 3 == 2, COLOURS, 1)",
    ),
    "all slots are normalised with the statistics of the first": (
        "refinement_inputs", "statistics + (3 * k + number) * 2", "statistics + number * 2",
    ),
    "eps outside the root": (
        "refinement_inputs", "1.0 / tl.sqrt(variance + eps)", "1.0 / (tl.sqrt(variance) + eps)",
    ),
    "masks and logits exchanged": (
        "refinement_inputs",
        "(mask, slot[COLOURS], posterior_mask)",
        "(slot[COLOURS], mask, posterior_mask)",
    ),
    "the log-ratio upside down": (
        "refinement_inputs", "left_out = likelihood - left_out", "left_out = left_out - likelihood",
    ),
    "backward: the gain gets the gradient of the bias": (
        "refinement_inputs", "gains[c] + d_normalised * normalised[c]", "gains[c] + d_normalised",
    ),
    "backward: sums of the last slot only": (
        "refinement_inputs", "(shifts[c] + d_normalised,)", "(d_normalised,)",
    ),
    "backward: nothing comes back through the likelihood": (
        "refinement_inputs", "+ d_likelihood * (responsibility - mask)", "",
    ),
    "masks: a running sum that a new largest term does not rescale": (
        "masks", "total * ratio + 1, total", "total + 1, total",
    ),
    "masks, backward: the mean is not subtracted": ("masks", "FLOAT) - total", "FLOAT)"),
    "masks, backward: the mask of the first slot for all": (
        "masks", "mask += num_pixels\n        out", "out",
    ),
    "elu' is one too small below 0": ("bias_elu", "gradient * (out + 1)", "gradient * out"),
    "elu' has its kink at 1": ("bias_elu", "tl.where(out > 0,", "tl.where(out > 1,"),
    "the bias sums the last tile only": ("bias_elu", "total += cotangent", "total = cotangent"),
    "channels of padding are stored": (
        "bias_elu", " & (channel < NUM_CHANNELS)\n    if", "\n    if",
    ),
    "border cases are off by one row": (
        "broadcast_conv", "index - size + half + 1,", "index - size + half,",
    ),
    "the middle case sums over the border too": (
        "broadcast_conv", "tl.where(case == K * K // 2, cotangent, 0.0)", "cotangent",
    ),
    "the response sums the last image only": (
        "broadcast_conv", "total += cotangent\n", "total = cotangent\n",
    ),
    "a case of the border that is one pixel too long": (
        "broadcast_conv", "width, K)) - 2 * half", "width, K)) - 2 * half + 1",
    ),
    "an image more than there are": (
        "broadcast_conv", "tl.where(image < num_images, NUM_CHANNELS, 0)", "NUM_CHANNELS",
    ),
}  # fmt: skip


@pytest.fixture
def load(monkeypatch, tmp_path) -> Iterator[Callable[..., ModuleType]]:
    """A function that loads a file of kernels/ as a module of its own, with a replacement."""
    monkeypatch.setattr(kernels, "TRITON", dict(kernels.TRITON))  # the module writes into it
    numbers = itertools.count()

    def load(file: str, old: str = "", new: str = "") -> ModuleType:
        source = (FOLDER / f"{file}.py").read_text()
        if old:
            assert source.count(old) == 1, f"{source.count(old)} times in {file}.py: {old}"
        name = f"mutant_{file}_{next(numbers)}"
        path = tmp_path / f"{name}.py"  # Triton reads the source of a kernel from its file
        # Operators of a name of their own, or they would take the place of the originals.
        path.write_text(source.replace(old, new).replace("slot_kernels::", f"{name}::"))
        spec = importlib.util.spec_from_file_location(name, path)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    with kernels.use("triton"):
        yield load


@pytest.mark.parametrize("file", CHECKS)
def test_the_original_passes(file, load, monkeypatch):
    with guarded_memory(monkeypatch):
        CHECKS[file](load(file))


@pytest.mark.parametrize("name", MUTANTS)
def test_mutant_is_found_out(name, load, monkeypatch):
    file, old, new = MUTANTS[name]
    mutant = load(file, old, new)
    with pytest.raises(AssertionError), guarded_memory(monkeypatch):
        CHECKS[file](mutant)
