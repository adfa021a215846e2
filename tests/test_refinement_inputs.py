"""kernels/refinement_inputs.py against the table of app. C, written out channel by channel."""

import importlib
import itertools

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from kernel_checks import DEVICE
from test_mixture import (
    KERNEL_LAYOUTS,
    LAYOUTS,
    SIZES,
    SLOTS,
    assert_near,
    assert_same,
    brute_densities,
    brute_force,
    brute_likelihood,
    brute_masks,
    drawn_inputs,
    extreme_inputs,
    load_mutant,
    make_inputs,
    on,
    triton_backend,
)
from torch import Tensor

import kernels

ops = importlib.import_module("kernels.refinement_inputs")
__all__ = ["triton_backend"]  # a fixture
STOPPED = ("grad_means", "grad_mask", "log_likelihood", "leave_one_out")


@pytest.fixture(autouse=True)
def torch_backend():
    with kernels.use("torch"):
        yield


def make_arguments(batch=2, slots=3, colours=3, height=5, width=4, coordinates=2):
    """image, decoded, weight, bias, coordinates; the middle three ask for gradients."""
    image, decoded = make_inputs(batch, slots, colours, height, width)
    generator = torch.Generator().manual_seed(1)
    shapes = (colours + 3,), (colours + 3,), (coordinates, height, width)
    weight, bias, fixed = (
        torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes
    )
    return (
        image,
        decoded.requires_grad_(),
        weight.requires_grad_(),
        bias.requires_grad_(),
        fixed,
    )


def brute_layer_norm(value: Tensor, eps=1e-5) -> Tensor:
    """Every number of one value, without an affine part."""
    mean = value.sum() / value.numel()
    variance = ((value - mean) ** 2).sum() / value.numel()
    return (value - mean) / (variance + eps) ** 0.5


def brute_inputs(
    image, decoded, weight, bias, coordinates, sigma, component, epsilon=0.0, log_ratio=False
) -> ops.RefinementInputs:
    """One channel after another of one slot after another, from linear space."""
    colours = image.shape[1]
    masks = brute_masks(decoded)
    densities = brute_densities(image, decoded, sigma, component)
    posterior = [density / (sum(densities) + epsilon) for density in densities]
    constant = brute_force(image, decoded, sigma, component)
    left_out = constant.leave_one_out
    if log_ratio:
        left_out = constant.log_likelihood[:, None] - left_out
    packed = torch.empty(*decoded.shape[:2], 3 * colours + 6 + len(coordinates), *image.shape[2:])
    packed = packed.to(image)
    for b in range(decoded.shape[0]):
        for k in range(decoded.shape[1]):
            gradient = constant.grad_decoded[b, k]
            normalised = [
                *brute_layer_norm(gradient[:colours]),
                brute_layer_norm(gradient[colours]),
                brute_layer_norm(constant.log_likelihood[b]),
                brute_layer_norm(left_out[b, k]),
            ]
            channels = [
                *image[b],
                *decoded[b, k, :colours],
                masks[k][b],
                decoded[b, k, colours],
                posterior[k][b],
                *(g * n + s for g, n, s in zip(weight, normalised, bias, strict=True)),
                *coordinates,
            ]
            packed[b, k] = torch.stack(channels)
    likelihood = brute_likelihood(image, decoded, sigma, component).log()
    return ops.RefinementInputs(packed, likelihood, constant.grad_decoded)


def gradients(outputs: ops.RefinementInputs, sources) -> tuple[Tensor, ...]:
    """Of a fixed random functional of both differentiable outputs."""
    generator = torch.Generator().manual_seed(2)
    differentiable = outputs[:2]
    cotangents = [
        torch.randn(output.shape, generator=generator, dtype=torch.float64).to(output)
        for output in differentiable
    ]
    return torch.autograd.grad(differentiable, sources, cotangents)


def check_against_brute_force(op, component="gaussian", epsilon=0.0, log_ratio=False, **sizes):
    """The three outputs, and the gradients of decoded, weight and bias."""
    arguments = make_arguments(**sizes)
    actual = op(*arguments, 0.3, component, epsilon, log_ratio)
    expected = brute_inputs(*arguments, 0.3, component, epsilon, log_ratio)
    assert_same(actual, expected, rtol=1e-9, atol=1e-9)
    sources = arguments[1:4]
    for one, other in zip(gradients(actual, sources), gradients(expected, sources), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)


BOTH = pytest.mark.parametrize("op", [ops.refinement_inputs, ops.refinement_inputs_reference])


@BOTH
@pytest.mark.parametrize("colours", [1, 3])
@pytest.mark.parametrize("slots", SLOTS)
def test_outputs_and_gradients_equal_brute_force(slots, colours, op):
    check_against_brute_force(op, slots=slots, colours=colours)


@BOTH
@pytest.mark.parametrize("log_ratio", [False, True])
@pytest.mark.parametrize("epsilon", [0.0, 0.5])
@pytest.mark.parametrize("component", ["gaussian", "logistic"])
def test_every_option_equals_brute_force(component, epsilon, log_ratio, op):
    check_against_brute_force(op, component, epsilon, log_ratio)


@BOTH
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("coordinates", [0, 2, 9])
def test_every_size_and_number_of_coordinates(coordinates, size, op):
    check_against_brute_force(op, height=size[0], width=size[1], coordinates=coordinates)


def test_channels_are_those_of_the_paper():
    assert list(ops.CHANNELS) == [
        *("image", "means", "mask", "mask_logits", "mask_posterior"),
        *STOPPED,
        "coordinates",
    ]
    widths = [where.stop - where.start for where in ops.CHANNELS.values()]
    assert widths == [3, 3, 1, 1, 1, 3, 1, 1, 1, 2] and sum(widths) == 17
    assert ops.channel_slices(3, 9)["coordinates"] == slice(15, 24)
    assert ops.channel_slices(1, 0)["leave_one_out"] == slice(8, 9)
    assert ops.channel_slices(1, 0)["coordinates"] == slice(9, 9)


def test_normalised_channels_are_layer_norms_with_an_affine_part_per_channel():
    image, decoded, weight, bias, coordinates = make_arguments()
    packed = ops.refinement_inputs(image, decoded, weight, bias, coordinates, 0.3).packed
    terms = kernels.mixture(image, decoded, 0.3)
    values = {
        "grad_means": terms.grad_decoded[:, :, :3],
        "grad_mask": terms.grad_decoded[:, :, 3:],
        "log_likelihood": terms.log_likelihood[:, None, None],
        "leave_one_out": terms.leave_one_out[:, :, None],
    }
    for name, value in values.items():
        where = ops.CHANNELS[name]
        shape = value.shape[2:]
        channels = slice(where.start - 9, where.stop - 9)
        gain = weight[channels, None, None].expand(shape)
        shift = bias[channels, None, None].expand(shape)
        expected = F.layer_norm(value, shape, gain, shift, eps=1e-5)
        actual = packed[:, :, where]
        torch.testing.assert_close(actual, expected.expand_as(actual), rtol=1e-10, atol=1e-10)


@BOTH
@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_strides(layout, op):
    image, decoded, *rest = make_arguments()
    expected = op(image, decoded, *rest, 0.3)
    strided_image = image.contiguous(memory_format=torch.channels_last)
    other = LAYOUTS[layout](decoded.detach()).requires_grad_()
    actual = op(strided_image, other, *rest, 0.3)
    assert_same(actual, expected, rtol=1e-12, atol=1e-12)
    (gradient,), (same,) = gradients(actual, [other]), gradients(expected, [decoded])
    torch.testing.assert_close(gradient, same)


def test_expanded_inputs():
    image, decoded, *rest = make_arguments()
    image = image[:1].expand(2, -1, -1, -1)
    one = decoded.detach()[:, :1].expand(-1, 3, -1, -1, -1).requires_grad_()
    many = one.detach().contiguous().requires_grad_()
    actual = ops.refinement_inputs(image, one, *rest, 0.3)
    expected = ops.refinement_inputs(image.contiguous(), many, *rest, 0.3)
    assert_same(actual, expected, rtol=1e-12, atol=1e-12)
    (gradient,), (same,) = gradients(actual, [one]), gradients(expected, [many])
    torch.testing.assert_close(gradient, same)


@BOTH
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("colours", [1, 3])
@pytest.mark.parametrize("batch, slots", [(1, 1), (2, 3)])
def test_packed_is_channels_last_for_the_convolution(batch, slots, colours, size, op):
    arguments = make_arguments(batch, slots, colours, *size)
    images = op(*arguments, 0.3).packed.flatten(0, 1)
    assert images.is_contiguous(memory_format=torch.channels_last)
    assert images.contiguous(memory_format=torch.channels_last).data_ptr() == images.data_ptr()
    with torch.no_grad():
        assert op(*arguments, 0.3).packed.stride() == op(*arguments, 0.3).packed.stride()


def test_gradients_stop_where_the_paper_says():
    image, decoded, weight, bias, coordinates = make_arguments()
    image.requires_grad_(), coordinates.requires_grad_()
    outputs = ops.refinement_inputs(image, decoded, weight, bias, coordinates, 0.3)
    assert not outputs.grad_decoded.requires_grad
    for name, where in ops.CHANNELS.items():
        total = outputs.packed[:, :, where].pow(3).sum()
        found = torch.autograd.grad(
            total, (image, decoded, weight, coordinates), retain_graph=True, allow_unused=True
        )
        reached = [gradient is not None and bool(gradient.any()) for gradient in found]
        to_decoded = name in ("means", "mask", "mask_logits", "mask_posterior")
        assert reached == [False, to_decoded, name in STOPPED, False], name


def test_gradcheck():
    image, decoded, weight, bias, coordinates = make_arguments(height=2, width=3)
    stopped = slice(ops.CHANNELS["grad_means"].start, ops.CHANNELS["leave_one_out"].stop)
    for component in ("gaussian", "logistic"):

        def of_decoded(value, component=component):
            outputs = ops.refinement_inputs(
                image, value, weight, bias, coordinates, 0.3, component, 0.5
            )
            return outputs.packed[:, :, : stopped.start], outputs.log_likelihood

        torch.autograd.gradcheck(of_decoded, decoded)

    def of_affine(gain, shift):
        return ops.refinement_inputs(image, decoded, gain, shift, coordinates, 0.3).packed

    torch.autograd.gradcheck(of_affine, (weight, bias))


@pytest.mark.parametrize("source", [1, 2, 3])
def test_second_derivative_raises(source):
    arguments = make_arguments()
    outputs = ops.refinement_inputs(*arguments, 0.3)
    total = outputs.packed.square().sum() + outputs.log_likelihood.sum()
    (gradient,) = torch.autograd.grad(total, arguments[source], create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        (arguments[1].sum() + gradient.square().sum()).backward()


def test_likelihood_alone_and_packed_alone_have_gradients():
    arguments = make_arguments()
    outputs = ops.refinement_inputs(*arguments, 0.3)
    (of_likelihood,) = torch.autograd.grad(outputs.log_likelihood.sum(), arguments[1])
    torch.testing.assert_close(of_likelihood, -outputs.grad_decoded)
    packed = ops.refinement_inputs(*arguments, 0.3).packed
    expected = ops.refinement_inputs_reference(*arguments, 0.3).packed
    cotangent = torch.randn_like(packed)
    (actual,) = torch.autograd.grad(packed, arguments[1], cotangent)
    (reference,) = torch.autograd.grad(expected, arguments[1], cotangent)
    torch.testing.assert_close(actual, reference)


@BOTH
def test_no_grad_gives_the_same_values(op):
    arguments = make_arguments()
    expected = op(*arguments, 0.3)
    with torch.no_grad():
        actual = op(*arguments, 0.3)
    assert all(map(torch.equal, actual, expected))
    assert not actual.packed.requires_grad


def test_permuting_slots_permutes_outputs():
    image, decoded, *rest = make_arguments(slots=5)
    order = torch.tensor([3, 0, 4, 2, 1])
    first = ops.refinement_inputs(image, decoded, *rest, 0.3)
    second = ops.refinement_inputs(image, decoded[:, order], *rest, 0.3)
    expected = first.packed[:, order], first.log_likelihood, first.grad_decoded[:, order]
    assert_same(second, expected)


def test_image_alone_equals_image_in_a_batch():
    image, decoded, *rest = make_arguments(batch=3)
    alone = ops.refinement_inputs(image[:1], decoded[:1], *rest, 0.3)
    batch = ops.refinement_inputs(image, decoded, *rest, 0.3)
    assert_same(alone, tuple(field[:1] for field in batch), rtol=1e-12, atol=1e-12)


def test_gain_of_zero_and_inputs_left_alone():
    arguments = make_arguments()
    with torch.no_grad():
        arguments[2].zero_()
    before = [value.detach().clone() for value in arguments]
    found = gradients(ops.refinement_inputs(*arguments, 0.3), arguments[1:4])
    expected = gradients(ops.refinement_inputs_reference(*arguments, 0.3), arguments[1:4])
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other)
    assert all(map(torch.equal, arguments, before))


def check_extremes(image, decoded, component):
    """float32 against the reference in float64."""
    decoded = decoded.clone().requires_grad_()
    wide = decoded.detach().double().requires_grad_()
    rest = [torch.ones(6), torch.zeros(6), torch.zeros(2, 7, 7)]
    rest = [value.to(image) for value in rest]
    options = (0.03, component, 1e-6, True)
    actual = ops.refinement_inputs(image, decoded, *rest, *options)
    expected = ops.refinement_inputs_reference(
        image.double(), wide, *(value.double() for value in rest), *options
    )
    for name, where in ops.CHANNELS.items():
        # log p is known to 1e-4 where it is -1700. Where the slots are equal too, the gradient of
        # the masks and the log-ratio are 0, and a normalisation divides that noise by 0.003, the
        # root of eps.
        noise = 0.1 if name in STOPPED else 1e-3
        one, other = actual.packed[:, :, where].double(), expected.packed[:, :, where]
        torch.testing.assert_close(
            one, other, rtol=1e-3, atol=noise, msg=lambda text, name=name: f"{name}: {text}"
        )
    (gradient,), (other,) = gradients(actual, [decoded]), gradients(expected, [wide])
    assert gradient.isfinite().all()
    torch.testing.assert_close(
        gradient.double(), other, rtol=0, atol=1e-3 * other.abs().max().item()
    )


@pytest.mark.parametrize("component", ["gaussian", "logistic"])
@pytest.mark.parametrize("case", extreme_inputs())
def test_float32_survives_extremes(case, component):
    check_extremes(*extreme_inputs()[case], component)


def test_half_precision_is_computed_in_float32():
    image, decoded, *rest = (value.detach() for value in make_arguments())
    rest = [value.float() for value in rest]
    image, decoded = image.bfloat16(), decoded.bfloat16().requires_grad_()
    wide = decoded.detach().float().requires_grad_()
    narrow = ops.refinement_inputs(image, decoded, *rest, 0.1)
    expected = ops.refinement_inputs(image.float(), wide, *rest, 0.1)
    assert all(field.dtype == torch.float32 for field in narrow)
    assert all(map(torch.equal, narrow, expected))
    (gradient,), (other,) = gradients(narrow, [decoded]), gradients(expected, [wide])
    assert torch.equal(gradient, other.bfloat16())


def test_bad_inputs_are_refused_in_one_line():
    image, decoded, weight, bias, coordinates = make_arguments()

    def refused(message, *arguments, sigma=0.1, component="gaussian"):
        for op in (ops.refinement_inputs, ops.refinement_inputs_reference):
            with pytest.raises(ValueError, match=message) as error:
                op(*arguments, sigma, component)
            assert "\n" not in str(error.value)

    refused(r"weight and bias must be \(6,\)", image, decoded, weight[:5], bias, coordinates)
    refused(r"weight and bias must be \(6,\)", image, decoded, weight, bias[:, None], coordinates)
    refused(r"coordinates must be \(N, 5, 4\)", image, decoded, weight, bias, coordinates[0])
    refused(r"coordinates must be", image, decoded, weight, bias, coordinates[:, :1])
    refused("decoded must be", image, decoded[:, :, :3], weight, bias, coordinates)
    refused("sigma", image, decoded, weight, bias, coordinates, sigma=-1)
    refused("component", image, decoded, weight, bias, coordinates, component="normal")


def test_dispatch_hands_over_every_argument(monkeypatch):
    arguments = make_arguments()
    monkeypatch.setattr(kernels, "TRITON", {"refinement_inputs": lambda *given: given})
    monkeypatch.setattr(kernels, "backend", lambda where, op: "triton")
    given = ops.refinement_inputs(*arguments, 0.3, "logistic", 0.5, True, 1e-3)
    assert given == (*arguments, 0.3, "logistic", 0.5, True, 1e-3)


# The Triton kernels, against the reference in float64.


@pytest.fixture
def fused(triton_backend, monkeypatch):
    """The device; the interpreter gets few, large programs."""
    if triton_backend == "cpu":
        blocks = dict.fromkeys(ops.BLOCKS, (4096, 1)) | {"combine": ops.BLOCKS["combine"]}
        monkeypatch.setattr(ops, "BLOCKS", blocks)
    return triton_backend


def check_kernels(arguments, component="gaussian", epsilon=0.5, log_ratio=False, sigma=0.3):
    """Every output, and the gradients of both differentiable ones, together and alone."""
    image, decoded, weight, bias, coordinates = (value.detach() for value in arguments)
    sources = [value.requires_grad_() for value in (decoded, weight, bias)]
    wide = [value.detach().double().requires_grad_() for value in sources]
    options = sigma, component, epsilon, log_ratio
    actual = ops.refinement_inputs(image, *sources, coordinates, *options)
    expected = ops.refinement_inputs_reference(
        image.double(), *wide, coordinates.double(), *options
    )
    images = actual.packed.flatten(0, 1)
    assert images.is_contiguous(memory_format=torch.channels_last)
    dtype = torch.promote_types(torch.promote_types(image.dtype, decoded.dtype), torch.float32)
    for name, one, other in zip(ops.RefinementInputs._fields, actual, expected, strict=True):
        assert one.dtype == dtype and one.shape == other.shape
        assert_near(one, other, name)
    generator = torch.Generator().manual_seed(3)
    cotangents = [
        torch.randn(output.shape, generator=generator).to(image.device, dtype)
        for output in expected[:2]
    ]
    cotangents[0] = ops.to_channels_last(cotangents[0])  # as a convolution gives it back
    found = torch.autograd.grad(actual[:2], sources, cotangents)
    others = torch.autograd.grad(expected[:2], wide, [c.double() for c in cotangents])
    for name, one, other in zip(("decoded", "weight", "bias"), found, others, strict=True):
        assert_near(one, other, f"gradient of {name}")


KERNEL_CASES = [  # batch, slots, colours, height, width, coordinates, component, log_ratio
    (2, 1, 3, 1, 1, 2, "gaussian", False),
    (1, 1, 1, 7, 7, 0, "logistic", True),
    (2, 2, 3, 7, 7, 9, "logistic", True),
    (1, 3, 1, 5, 9, 2, "gaussian", False),
    (1, 4, 3, 35, 35, 2, "gaussian", True),
    (1, 5, 3, 64, 64, 0, "gaussian", False),
    (1, 7, 3, 16, 3, 1, "logistic", False),
    (1, 11, 1, 1, 65, 9, "gaussian", True),
]


def inputs_on(device, *sizes, dtype=torch.float64, channels_last=True):
    arguments = (value.detach() for value in make_arguments(*sizes))
    arguments = on(device, *arguments, dtype=dtype)
    if channels_last:
        arguments[1] = LAYOUTS["channels_last"](arguments[1])
    return arguments


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("case", KERNEL_CASES, ids=str)
def test_kernels_equal_the_reference(case, channels_last, fused):
    *sizes, component, log_ratio = case
    dtype = torch.float32 if channels_last else torch.float64
    arguments = inputs_on(fused, *sizes, dtype=dtype, channels_last=channels_last)
    check_kernels(arguments, component, 0.5 if sizes[1] % 2 else 0.0, log_ratio)


@pytest.mark.parametrize("size", [(1, 33), (7, 7), (8, 12)])
def test_kernels_combine_several_tiles(size, fused, monkeypatch):
    monkeypatch.setattr(ops, "BLOCKS", dict.fromkeys(ops.BLOCKS, (32, 1)))
    check_kernels(inputs_on(fused, 2, 2, 3, *size))


def test_kernels_combine_more_tiles_than_one_block_holds(fused, monkeypatch):
    monkeypatch.setattr(ops, "BLOCKS", ops.BLOCKS | {"statistics": (4, 1), "combine": (2, 1)})
    check_kernels(inputs_on(fused, 1, 1, 1, 3, 7, 0))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_kernels_compute_wide_and_give_the_gradient_of_the_input(dtype, fused):
    arguments = inputs_on(fused, 1, 2, dtype=torch.float32)
    arguments[1] = arguments[1].to(dtype)
    check_kernels(arguments)
    check_kernels([arguments[0].to(dtype), *arguments[1:]])


@pytest.mark.parametrize("layout", KERNEL_LAYOUTS)
def test_kernels_take_any_strides(layout, fused):
    arguments = inputs_on(fused, 2, 2, channels_last=False)
    arguments[1] = KERNEL_LAYOUTS[layout](arguments[1])
    arguments[4] = arguments[4].mT.contiguous().mT
    check_kernels(arguments)


@pytest.mark.parametrize("layout", ["channels_last", "planes", "expanded", "cropped"])
def test_kernels_take_cotangents_of_any_strides(layout, fused):
    arguments = inputs_on(fused, 2, 2)
    for value in arguments[1:4]:
        value.requires_grad_()
    outputs = ops.refinement_inputs(*arguments, 0.3)
    expected = ops.refinement_inputs_reference(*arguments, 0.3)
    cotangent = torch.randn_like(expected.packed)  # channels-last
    if layout == "planes":
        cotangent = cotangent.contiguous()
    elif layout == "expanded":
        cotangent = cotangent[:, :, :, :1, :1].expand_as(cotangent)
    elif layout == "cropped":
        cotangent = KERNEL_LAYOUTS["cropped"](cotangent)
    for output, other in (outputs[:1], expected[:1]), (outputs[:2], expected[:2]):
        weights = cotangent, torch.rand(2, 1, 1).to(cotangent).expand(2, 5, 4)
        weights = weights[: len(output)]
        found = torch.autograd.grad(output, arguments[1:4], weights, retain_graph=True)
        wanted = torch.autograd.grad(other, arguments[1:4], weights, retain_graph=True)
        for one, two in zip(found, wanted, strict=True):
            assert_near(one, two)
    (gradient,) = torch.autograd.grad(outputs.log_likelihood.sum(), arguments[1])
    assert_near(gradient, -expected.grad_decoded)


@pytest.mark.parametrize(
    "case, component", list(zip(extreme_inputs(), itertools.cycle(["gaussian", "logistic"])))
)
def test_kernels_survive_extremes(case, component, fused):
    check_extremes(*on(fused, *extreme_inputs()[case], dtype=torch.float32), component)


def test_kernels_normalise_what_hardly_varies(fused):
    """A likelihood of -1e3 that varies by 1e-2: E[x²] - E[x]² would be rounding error alone."""
    image, decoded, *rest = inputs_on(fused, 1, 2, 3, 8, 8, dtype=torch.float32)
    decoded[:, :, :3] = image[:, None] + 4.5
    decoded[:, :, 3] = 0
    decoded[:, :, :3] += 1e-4 * torch.rand(8, 8).to(decoded)
    options = 0.1, "gaussian", 0.0, False, 1e-12
    actual = ops.refinement_inputs(image, decoded, *rest, *options).packed
    wide = [value.double() for value in (image, decoded, *rest)]
    expected = ops.refinement_inputs_reference(*wide, *options).packed
    where = ops.CHANNELS["log_likelihood"]
    likelihood, other = actual[:, :, where].double(), expected[:, :, where]
    # log p = -3000 is known to some 1e-3, and its standard deviation is 0.04. (From E[x²] - E[x]²,
    # numbers of 1e7, nothing of it would be left.)
    torch.testing.assert_close(likelihood, other, rtol=0, atol=0.2 * rest[0][4].abs().item())


def test_gradcheck_of_the_kernels(fused):
    image, decoded, *affine, coordinates = inputs_on(fused, 1, 2, 1, 1, 2, 1)

    def of_decoded(value):
        outputs = ops.refinement_inputs(image, value, *affine, coordinates, 0.3, "logistic", 0.5)
        return outputs.packed[:, :, :5], outputs.log_likelihood  # what has a gradient

    def of_affine(*gain_and_shift):
        return ops.refinement_inputs(image, decoded, *gain_and_shift, coordinates, 0.3).packed

    # That outputs without a cotangent are none is tested below, at a tenth of the cost.
    options = dict(fast_mode=True, check_undefined_grad=False)
    torch.autograd.gradcheck(of_decoded, decoded.clone().requires_grad_(), **options)
    torch.autograd.gradcheck(of_affine, [value.requires_grad_() for value in affine], **options)


def test_kernels_are_well_behaved_operators(fused):
    image, decoded, weight, bias, coordinates = inputs_on(fused, 1, 1, 1, 2, 3, 1)
    for value in (decoded, weight, bias):
        value.requires_grad_()
    given = image, decoded, weight, bias, coordinates
    torch.library.opcheck(ops._fused, (*given, 0.3, "gaussian", 0.5, True, 1e-5))
    outputs = ops._fused(*(value.detach() for value in given), 0.3, "gaussian", 0.5, True, 1e-5)
    torch.library.opcheck(
        ops._fused_backward,
        (image, decoded.detach(), outputs[3], outputs[0], None, 0.3, "gaussian", 0.5, True),
    )


def test_kernels_in_a_compiled_graph(fused):
    arguments = inputs_on(fused, 1, 2)
    for value in arguments[1:4]:
        value.requires_grad_()

    def loss(*given):
        outputs = ops.refinement_inputs(*given, 0.3, log_ratio=True)
        return outputs.packed.square().mean() + outputs.log_likelihood.sum()

    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
    found = torch.autograd.grad(compiled(*arguments), arguments[1:4])
    expected = torch.autograd.grad(loss(*arguments), arguments[1:4])
    torch.testing.assert_close(found, expected)


def test_kernels_backward_twice_but_no_second_derivative(fused):
    arguments = inputs_on(fused, 1, 2)
    for value in arguments[1:4]:
        value.requires_grad_()
    outputs = ops.refinement_inputs(*arguments, 0.3)
    total = outputs.packed.square().sum() + outputs.log_likelihood.sum()
    first = torch.autograd.grad(total, arguments[1:4], retain_graph=True)
    second = torch.autograd.grad(total, arguments[1:4], create_graph=True)
    assert all(map(torch.equal, first, second))
    for gradient in second:
        with pytest.raises(RuntimeError, match="no second derivative"):
            (arguments[1].sum() + gradient.square().sum()).backward(retain_graph=True)


def test_kernels_leave_inputs_alone_and_repeat_themselves(fused):
    arguments = inputs_on(fused, 1, 2, dtype=torch.float32)
    before = [value.clone() for value in arguments]
    for value in arguments[1:4]:
        value.requires_grad_()
    first = ops.refinement_inputs(*arguments, 0.3)
    with torch.no_grad():
        second = ops.refinement_inputs(*arguments, 0.3)
    assert all(map(torch.equal, first, second))
    assert not first.grad_decoded.requires_grad and not second.packed.requires_grad
    first.packed.sum().backward()
    assert all(map(torch.equal, arguments, before))


def test_kernels_stop_gradients_where_the_paper_says(fused):
    arguments = inputs_on(fused, 1, 2)
    arguments[0].requires_grad_(), arguments[4].requires_grad_()
    arguments[1].requires_grad_()
    outputs = ops.refinement_inputs(*arguments, 0.3)
    for name, where in ops.CHANNELS.items():
        cotangent = torch.zeros_like(outputs.packed)
        cotangent[:, :, where] = torch.randn_like(cotangent[:, :, where])
        found = torch.autograd.grad(
            outputs.packed, (arguments[0], arguments[1], arguments[4]), cotangent,
            retain_graph=True, allow_unused=True,
        )  # fmt: skip
        reached = [gradient is not None and bool(gradient.any()) for gradient in found]
        assert reached == [False, name in ("means", "mask", "mask_logits", "mask_posterior"), False]


def test_kernels_refuse_bad_inputs(fused):
    image, decoded, weight, bias, coordinates = inputs_on(fused)
    with pytest.raises(ValueError, match=r"weight and bias must be \(6,\)"):
        ops.refinement_inputs(image, decoded, weight[:5], bias, coordinates, 0.1)
    with pytest.raises(ValueError, match=r"coordinates must be \(N, 5, 4\)"):
        ops.refinement_inputs(image, decoded, weight, bias, coordinates[0], 0.1)
    with pytest.raises(ValueError, match="posterior_epsilon must be 0 or more"):
        ops.refinement_inputs(image, decoded, weight, bias, coordinates, 0.1, "gaussian", -1.0)


@settings(
    max_examples=5, deadline=None, derandomize=True, database=None,
    suppress_health_check=list(HealthCheck),
)  # fmt: skip
@given(drawn=drawn_inputs(), coordinates=st.integers(0, 10), log_ratio=st.booleans())
def test_kernels_on_drawn_inputs(fused, drawn, coordinates, log_ratio):
    image, decoded, (component, epsilon, sigma) = drawn
    _, colours, height, width = image.shape
    rest = make_arguments(1, 1, colours, height, width, coordinates)[2:]
    check_kernels(on(fused, image, decoded, *rest), component, epsilon, log_ratio, sigma)


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="needs an NVIDIA device")
def test_kernels_are_deterministic_bit_for_bit():
    arguments = inputs_on("cuda", 8, 7, 3, 128, 128, dtype=torch.float32)
    for value in arguments[1:4]:
        value.requires_grad_()
    results = []
    for _ in range(3):
        outputs = kernels.TRITON["refinement_inputs"](*arguments, 0.1)
        results.append((*outputs, *gradients(outputs, arguments[1:4])))
    assert all(map(torch.equal, results[0], results[1]))
    assert all(map(torch.equal, results[0], results[2]))


# Mutants: a changed formula has to fail check_against_brute_force.

MUTANTS = {
    "layer norm over the batch": ("grad_means.shape[2:], eps", "grad_means.shape, eps"),
    "layer norm over slots": ("single.shape[3:]", "single.shape[1:]"),
    "layer norm for every colour": ("grad_means.shape[2:], eps", "grad_means.shape[3:], eps"),
    "one layer norm for three planes": ("single.shape[3:]", "single.shape[2:]"),
    "other eps": ("single.shape[3:], eps=eps", "single.shape[3:], eps=1e-6"),
    "bias and gain exchanged": (
        "addcmul(bias[:, None, None], normalised, weight[:, None, None])",
        "addcmul(weight[:, None, None], normalised, bias[:, None, None])",
    ),
    "gradient of minus the loss": ("responsibilities.neg() * slope", "responsibilities * slope"),
    "gradient of mask probabilities": (
        "masks - responsibilities  #",
        "-responsibilities / masks  #",
    ),
    "leave-one-out keeps the full masks": (" - logsumexp_of_others(log_masks)", ""),
    "no leave-one-out for one slot": ("if slots == 1:", "if slots == 0:"),
    "ratio upside down": (
        "log_likelihood[:, None] - leave_one_out",
        "leave_one_out - log_likelihood[:, None]",
    ),
    "posterior with the mask prior": ("posterior(log_density,", "posterior(joint,"),
    "masks and logits exchanged": (
        "masks,\n                logits,\n",
        "logits,\n                masks,\n",
    ),
    "backward without the softmax of masks": ("_through_softmax(masks, d_masks)", "d_masks"),
    "backward without the posterior": ("torch.addcmul(d_means, slope, d_log_density)", "d_means"),
    "backward of minus the likelihood": ("* -d_log_likelihood[", "* d_log_likelihood["),
    "backward without the logits": (" + d_logits", ""),
    "backward of the gain by the bias": ("(d_normalised * normalised).sum", "d_normalised.sum"),
}


@pytest.mark.parametrize("name", MUTANTS)
def test_mutant_fails(name):
    op = load_mutant(ops, *MUTANTS[name]).refinement_inputs
    with pytest.raises(AssertionError):
        check_against_brute_force(op, "gaussian", 0.5)
        check_against_brute_force(op, "logistic", log_ratio=True)
        check_against_brute_force(op, slots=1)
