"""kernels/refinement_inputs.py against the table of app. C, written out channel by channel."""

import importlib

import pytest
import torch
import torch.nn.functional as F
from test_mixture import (
    LAYOUTS,
    SIZES,
    SLOTS,
    assert_same,
    brute_densities,
    brute_force,
    brute_likelihood,
    brute_masks,
    extreme_inputs,
    load_mutant,
    make_inputs,
)
from torch import Tensor

import kernels

ops = importlib.import_module("kernels.refinement_inputs")
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


@pytest.mark.parametrize("component", ["gaussian", "logistic"])
@pytest.mark.parametrize("case", extreme_inputs())
def test_float32_survives_extremes(case, component):
    image, decoded = extreme_inputs()[case]
    decoded = decoded.clone().requires_grad_()
    wide = decoded.detach().double().requires_grad_()
    rest = torch.ones(6), torch.zeros(6), torch.zeros(2, 7, 7)
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
