"""kernels/broadcast_conv.py, torch and Triton, against nn.Conv2d over the broadcast image."""

import importlib
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from kernel_checks import DEVICE, backend, guarded_memory, triton_only
from torch import Tensor, nn

ops = importlib.import_module("kernels.broadcast_conv")
bias_elu = importlib.import_module("kernels.bias_elu")
# The interpreter computes exp of positive numbers too, and warns of what is then not taken.
pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")
__all__ = ["backend", "triton_only"]  # fixtures
# Relative to the largest number. Half precision rounds z's part, the other part and their sum.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 3e-6, torch.float16: 5e-3, torch.bfloat16: 4e-2}
LAYOUTS = {"channels_last": torch.channels_last, "planes": torch.contiguous_format}
ACTIVATIONS = {"elu": F.elu, "relu": F.relu, "none": lambda x: x}


@pytest.fixture(autouse=True)
def few_programs(monkeypatch):
    """What the interpreter takes is their number, whatever they have to do."""
    monkeypatch.setattr(ops, "NUMBERS", 2**16)


def make(*shape: int, dtype=torch.float64, scale=1.0, seed=0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(shape, generator=generator, dtype=torch.float64) * scale
    return values.to(DEVICE, dtype)


def make_inputs(
    kernel=3, size=(5, 4), channels=3, images=2, latent=4, dtype=torch.float64, scale=1.0
) -> list[Tensor]:
    """z, weight, bias and two coordinates; the output has about the size of `scale`."""
    shapes = [(images, latent), (channels, latent + 2, kernel, kernel), (channels,), (2, *size)]
    factors = [scale, 1 / kernel, scale, scale]
    return [
        make(*shape, dtype=dtype, scale=factor, seed=seed)
        for seed, (shape, factor) in enumerate(zip(shapes, factors, strict=True))
    ]


def brute_force(z, weight, bias, coordinates, activation: str) -> Tensor:
    """z at every pixel, and a convolution over all of it, in float64."""
    (outputs, inputs, kernel, _), (height, width) = weight.shape, coordinates.shape[1:]
    image = torch.empty(len(z), inputs, height, width, dtype=torch.float64, device=z.device)
    for i in range(height):
        for j in range(width):
            image[:, : z.shape[1], i, j] = z.double()
    image[:, z.shape[1] :] = coordinates.double()
    conv = nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2)
    parameters = {"weight": weight.double(), "bias": bias.double()}
    return ACTIVATIONS[activation](torch.func.functional_call(conv, parameters, image))


def check(inputs: list[Tensor], activation="elu", layout="channels_last", cotangent=None) -> None:
    """Result and gradients against brute force; type and layout of the result."""
    inputs = [tensor.detach().requires_grad_() for tensor in inputs]
    dtype = inputs[0].dtype
    out = ops.broadcast_conv(*inputs, activation, LAYOUTS[layout])
    expected = brute_force(*inputs, activation)
    assert out.dtype == dtype and out.shape == expected.shape
    assert out.is_contiguous(memory_format=LAYOUTS[layout])
    if cotangent is None:
        cotangent = make(*out.shape, dtype=dtype, seed=9)
    # relu has no slope at 0, where rounding may take the other side: no weight near it.
    if activation == "relu":
        cotangent = cotangent.where((expected > 0.1) | (expected == 0), 0)
    gradients = torch.autograd.grad(out, inputs, cotangent)
    expected_gradients = torch.autograd.grad(expected, inputs, cotangent.double())
    for one, other in zip([out, *gradients], [expected, *expected_gradients], strict=True):
        atol = TOLERANCE[dtype] * max(1.0, other.abs().max().item() if other.numel() else 0.0)
        torch.testing.assert_close(one.double(), other.double(), rtol=0, atol=atol)


# Images as small as may be, smaller than the kernel, not square; rows and columns of all cases.
SIZES = [
    (1, 1, 1), (1, 1, 7), (1, 5, 3), (3, 2, 2), (3, 2, 7), (3, 3, 3), (3, 7, 7), (3, 9, 4),
    (5, 4, 4), (5, 4, 11), (5, 7, 6), (7, 6, 9),
]  # fmt: skip


@pytest.mark.parametrize(("kernel", "height", "width"), SIZES)
def test_every_size(backend, kernel, height, width):
    layout = "planes" if height == 7 else "channels_last"
    check(make_inputs(kernel, (height, width), images=1 if kernel > 3 else 2), layout=layout)


@pytest.mark.parametrize(
    ("kernel", "activation", "layout"),
    [(1, "none", "planes"), (3, "relu", "channels_last"), (5, "elu", "channels_last")],
)
def test_the_tetrominoes_size(backend, kernel, activation, layout):
    check(make_inputs(kernel, (35, 35), images=1), activation, layout)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("channels", [1, 3, 32, 33, 64])
def test_every_number_of_channels(backend, channels, layout):
    check(make_inputs(channels=channels, images=1), layout=layout)


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_every_type(backend, dtype):
    check(make_inputs(dtype=dtype))


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_every_activation(backend, activation):
    check(make_inputs(), activation)


def test_reference_is_the_convolution():
    inputs = make_inputs(5, (6, 9))
    for activation in ACTIVATIONS:
        torch.testing.assert_close(
            ops.broadcast_conv_reference(*inputs, activation), brute_force(*inputs, activation)
        )


@pytest.mark.parametrize(
    ("kernel", "programs", "layout"),
    [(3, 10**9, "channels_last"), (3, 1, "planes"), (3, 8, "channels_last"), (1, 8, "planes"),
     (5, 8, "channels_last")],
)  # fmt: skip
def test_many_tiles(triton_only, kernel, programs, layout, monkeypatch):
    """Of 8 pixels; a program takes one of one image, or that of all images, or of some."""
    monkeypatch.setattr(ops, "NUMBERS", 32)
    monkeypatch.setattr(bias_elu, "PROGRAMS", programs)
    check(make_inputs(kernel, (5, 7), images=3), layout=layout)


STRIDES = {
    "transposed": lambda t: t.mT.contiguous().mT,
    "every second": lambda t: t.repeat_interleave(2, -1)[..., ::2],
    "expanded": lambda t: t[:1].expand(t.shape),
    "expanded from one number": lambda t: t.flatten()[0].expand(t.shape),
    "channels last": lambda t: t.movedim(1, -1).contiguous().movedim(-1, 1),
}


@pytest.mark.parametrize("strides", STRIDES)
def test_any_strides(backend, strides):
    inputs = [STRIDES[strides](tensor) if tensor.ndim > 1 else tensor for tensor in make_inputs()]
    check(inputs, cotangent=STRIDES[strides](make(2, 3, 5, 4, seed=9)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("sign", [1, -1])
def test_extreme_values(backend, dtype, sign):
    z, weight, bias, coordinates = make_inputs(dtype=dtype)
    bias = torch.full_like(bias, sign * 1e4)
    check([z, weight, bias, coordinates])
    out = ops.broadcast_conv(z, weight, bias, coordinates)
    assert (out == -1).all() if sign < 0 else (out > 9000).all()


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_nan_stays_nan(backend, activation):
    inputs = make_inputs()
    inputs[0][1] = math.nan
    out = ops.broadcast_conv(*inputs, activation)
    assert out[1].isnan().all() and not out[0].isnan().any()


def test_image_alone_equals_image_in_a_batch(backend):
    z, *others = make_inputs(images=4, dtype=torch.float32)
    alone, batch = ops.broadcast_conv(z[2:3], *others), ops.broadcast_conv(z, *others)
    torch.testing.assert_close(alone, batch[2:3], rtol=0, atol=1e-6)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_outputs_are_written_whole_and_nothing_beside_them(triton_only, layout, monkeypatch):
    monkeypatch.setattr(ops, "NUMBERS", 64)
    monkeypatch.setattr(bias_elu, "PROGRAMS", 8)  # the last program has an image too many
    inputs = [tensor.requires_grad_() for tensor in make_inputs(3, (5, 7), images=3)]
    parts = ops.classes_and_response(*inputs)
    with guarded_memory(monkeypatch) as buffers:
        out = ops._broadcast_conv(*parts, "elu", layout == "channels_last")
        gradients = torch.autograd.grad(out.sum(), parts)
    assert len(buffers) == 4  # the result, the gradient of classes, parts of both gradients
    for output in (out, *gradients):
        assert not output.isnan().any()


def test_only_the_output_is_kept(backend):
    """A decoder of many layers lives from that: nothing else of its size waits for backward."""
    inputs = [tensor.requires_grad_() for tensor in make_inputs(3, (20, 20))]
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        out = ops.broadcast_conv(*inputs)
    large = {tensor.data_ptr() for tensor in kept if tensor.numel() >= out.numel()}
    assert large == {out.data_ptr()}


def test_gradcheck(backend):
    inputs = [tensor.requires_grad_() for tensor in make_inputs()]
    torch.autograd.gradcheck(ops.broadcast_conv, inputs, fast_mode=True)


def test_backward_twice(backend):
    inputs = [tensor.requires_grad_() for tensor in make_inputs()]
    out = ops.broadcast_conv(*inputs)
    cotangent = make(*out.shape, seed=9)
    first = torch.autograd.grad(out, inputs, cotangent, retain_graph=True)
    second = torch.autograd.grad(out, inputs, cotangent)
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))


@pytest.mark.parametrize("by", ["z", "cotangent"])
def test_second_derivative_raises(triton_only, by):
    z, *others = make_inputs()
    z.requires_grad_()
    out = ops.broadcast_conv(z, *others)
    cotangent = torch.ones_like(out, requires_grad=by == "cotangent")
    (gradient,) = torch.autograd.grad(out, z, cotangent, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        (z.sum() + gradient.square().sum()).backward()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_operators_are_well_defined(triton_only, layout):
    last = layout == "channels_last"
    parts = make(1, 1, 1, 2).requires_grad_(), make(2, 3, 4, seed=1).requires_grad_()
    torch.library.opcheck(ops._broadcast_conv, (*parts, "elu", last))
    out = ops._broadcast_conv(*parts, "elu", last).detach()
    torch.library.opcheck(ops._broadcast_conv_backward, (out, out, 1, "elu", last))


def test_torch_compile_sees_through(backend):
    inputs = [tensor.requires_grad_() for tensor in make_inputs()]

    def function(*inputs):
        return ops.broadcast_conv(*inputs).square()

    compiled = torch.compile(function, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(*inputs), function(*inputs))
    gradients = torch.autograd.grad(compiled(*inputs).sum(), inputs)
    torch.testing.assert_close(gradients, torch.autograd.grad(function(*inputs).sum(), inputs))


def test_under_autocast_the_output_is_bfloat16(backend):
    inputs = [tensor.requires_grad_() for tensor in make_inputs(dtype=torch.float32)]
    with torch.autocast(DEVICE, torch.bfloat16):
        out = ops.broadcast_conv(*inputs)
    assert out.dtype == torch.bfloat16
    expected = brute_force(*inputs, "elu")
    torch.testing.assert_close(out.double(), expected, rtol=0, atol=4e-2 * expected.max().item())
    gradients = torch.autograd.grad(out.sum(), inputs)
    assert all(gradient.dtype == torch.float32 for gradient in gradients)


@settings(
    max_examples=7,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    half=st.integers(0, 2),
    more=st.tuples(st.integers(0, 4), st.integers(0, 4)),
    channels=st.integers(1, 9),
    images=st.integers(1, 2),
    activation=st.sampled_from(list(ACTIVATIONS)),
    layout=st.sampled_from(list(LAYOUTS)),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16]),
    scale=st.sampled_from([0.1, 1.0, 10.0]),
    strides=st.sampled_from(list(STRIDES)),
)
def test_drawn_shapes_strides_and_values(
    backend, half, more, channels, images, activation, layout, dtype, scale, strides
):
    size = [max(1, 2 * half) + extra for extra in more]
    z, *others = make_inputs(2 * half + 1, size, channels, images, dtype=dtype, scale=scale)
    cotangent = STRIDES[strides](make(images, channels, *size, dtype=dtype, seed=9))
    check([STRIDES[strides](z), *others], activation, layout, cotangent)


BAD_INPUTS = {  # message: shapes of z, weight, bias and coordinates
    "z must be": ((2, 3, 1), (4, 5, 3, 3), (4,), (2, 5, 5)),
    "and coordinates": ((2, 3), (4, 5, 3, 3), (4,), (1, 2, 5, 5)),
    r"weight must be \(O, 5, k, k\)": ((2, 3), (4, 6, 3, 3), (4,), (2, 5, 5)),
    "with an odd k": ((2, 3), (4, 5, 2, 2), (4,), (2, 5, 5)),
    r"not \(4, 5, 3, 1\)": ((2, 3), (4, 5, 3, 1), (4,), (2, 5, 5)),
    r"bias must be \(4,\)": ((2, 3), (4, 5, 3, 3), (3,), (2, 5, 5)),
    "kernel 5 is too large for images of 3x9 pixels": ((2, 3), (4, 5, 5, 5), (4,), (2, 3, 9)),
    "kernel 1 is too large for images of 0x9 pixels": ((2, 3), (4, 5, 1, 1), (4,), (2, 0, 9)),
}


@pytest.mark.parametrize("message", BAD_INPUTS)
def test_bad_shapes_are_refused_in_one_line(message):
    inputs = [torch.zeros(shape) for shape in BAD_INPUTS[message]]
    with pytest.raises(ValueError, match=message) as error:
        ops.broadcast_conv(*inputs)
    assert "\n" not in str(error.value)


def test_unknown_activations_and_layouts_are_refused():
    inputs = make_inputs()
    with pytest.raises(ValueError, match="elu, relu or none, not 'tanh'"):
        ops.broadcast_conv(*inputs, "tanh")
    with pytest.raises(ValueError, match="channels_last or contiguous"):
        ops.broadcast_conv(*inputs, "elu", torch.preserve_format)


@pytest.mark.parametrize("kernel", [1, 3])
def test_no_images(backend, kernel):
    check(make_inputs(kernel, images=0))


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="needs an NVIDIA device")
def test_same_bits_every_time(triton_only):
    sizes = dict(channels=64, images=56, latent=64, dtype=torch.float32)
    inputs = [tensor.requires_grad_() for tensor in make_inputs(3, (128, 128), **sizes)]
    parts = [tensor.detach().requires_grad_() for tensor in ops.classes_and_response(*inputs)]
    outs = [ops._broadcast_conv(*parts, "elu", True) for _ in range(3)]
    cotangent = torch.randn_like(outs[0])
    gradients = [torch.autograd.grad(out, parts, cotangent) for out in outs]
    assert all(torch.equal(out, outs[0]) for out in outs)
    assert all(torch.equal(g, f) for gs in gradients for g, f in zip(gs, gradients[0], strict=True))
