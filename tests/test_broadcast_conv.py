"""kernels/broadcast_conv.py against a convolution over z at every pixel."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kernels.broadcast_conv import broadcast_conv

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# Relative to the largest number. Half precision rounds z's part, the response and their sum.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 3e-6, torch.float16: 5e-3, torch.bfloat16: 4e-2}
LAYOUTS = {
    "planes": lambda t: t,
    "channels last": lambda t: t.movedim(-3, -1).contiguous().movedim(-1, -3),
    "transposed": lambda t: t.mT.contiguous().mT,
    "every second": lambda t: t.repeat_interleave(2, -1)[..., ::2],
    "expanded": lambda t: t[..., :1, :1].expand(t.shape),
}


def make(*shape: int, dtype=torch.float64, scale=1.0, seed=0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(shape, generator=generator, dtype=torch.float64) * scale
    return values.to(DEVICE, dtype)


def make_inputs(
    kernel=3, size=(5, 4), channels=3, images=2, latent=4, dtype=torch.float64, scale=1.0
) -> list[Tensor]:
    """z, weight and response; the output has about the size of `scale`."""
    z = make(images, latent, dtype=dtype, scale=scale)
    weight = make(channels, latent, kernel, kernel, dtype=dtype, scale=1 / kernel, seed=1)
    return [z, weight, make(channels, *size, dtype=dtype, scale=scale, seed=2)]


def brute_force(z: Tensor, weight: Tensor, response: Tensor) -> Tensor:
    """z at every pixel, and a convolution over all of it, in float64."""
    image = z.double()[:, :, None, None].repeat(1, 1, *response.shape[1:])  # (N, D, H, W)
    return F.conv2d(image, weight.double(), padding=weight.shape[-1] // 2) + response.double()


def check(inputs: list[Tensor], cotangent: Tensor | None = None) -> None:
    """Result and gradients against brute force, relative to the largest number."""
    inputs = [tensor.detach().requires_grad_() for tensor in inputs]
    dtype = inputs[0].dtype
    out, expected = broadcast_conv(*inputs), brute_force(*inputs)
    assert out.dtype == dtype and not out._is_view()  # an activation may work in place
    if cotangent is None:
        cotangent = make(*expected.shape, dtype=dtype, seed=9)
    gradients = torch.autograd.grad(out, inputs, cotangent)
    expected_gradients = torch.autograd.grad(expected, inputs, cotangent.double())
    for one, other in zip([out, *gradients], [expected, *expected_gradients], strict=True):
        atol = TOLERANCE[dtype] * max(1.0, other.abs().max().item() if other.numel() else 0.0)
        torch.testing.assert_close(one.double(), other.double(), rtol=0, atol=atol)


@pytest.mark.parametrize("layout", ["planes", "channels last"])
@pytest.mark.parametrize(
    ("kernel", "height", "width"),
    [(1, 1, 1), (1, 1, 7), (1, 5, 3), (3, 2, 2), (3, 2, 7), (3, 3, 3), (3, 7, 7), (3, 9, 4),
     (5, 4, 4), (5, 4, 11), (5, 7, 6), (5, 35, 35), (7, 6, 9)],
)  # fmt: skip
def test_every_size(kernel, height, width, layout):
    """Images as small as may be, no larger than the kernel, not square."""
    z, weight, response = make_inputs(kernel, (height, width))
    check([z, weight, LAYOUTS[layout](response)])


@pytest.mark.parametrize(("kernel", "padding"), [(3, 0), (5, 0), (5, 1), (9, 1)])
def test_less_padding_than_keeps_the_size(kernel, padding):
    z, weight, response = make_inputs(kernel, (7, 6))
    margin = kernel - 1 - 2 * padding
    image = z[:, :, None, None].expand(-1, -1, 7 + margin, 6 + margin)
    expected = F.conv2d(image, weight, padding=padding) + response
    torch.testing.assert_close(broadcast_conv(z, weight, response, padding), expected)
    for wrong in (-1, kernel // 2 + 1):
        with pytest.raises(ValueError, match="half of the kernel"):
            broadcast_conv(z, weight, response, wrong)


@settings(max_examples=60, deadline=None)
@given(
    half=st.integers(0, 2),
    more=st.tuples(st.integers(0, 4), st.integers(0, 4)),
    channels=st.integers(1, 9),
    images=st.integers(0, 3),
    dtype=st.sampled_from(list(TOLERANCE)),
    scale=st.sampled_from([0.1, 1.0, 10.0]),
    response_layout=st.sampled_from(list(LAYOUTS)),
    cotangent_layout=st.sampled_from(list(LAYOUTS)),
)
def test_drawn_shapes_types_and_strides(
    half, more, channels, images, dtype, scale, response_layout, cotangent_layout
):
    size = [max(1, 2 * half) + extra for extra in more]
    options = dict(dtype=dtype, scale=scale)
    z, weight, response = make_inputs(2 * half + 1, size, channels, images, **options)
    cotangent = make(images, channels, *size, dtype=dtype, seed=9)
    check([z.T.contiguous().T, weight.mT, LAYOUTS[response_layout](response)],
          LAYOUTS[cotangent_layout](cotangent))  # fmt: skip


@pytest.mark.parametrize("kernel", [1, 3])
def test_the_result_has_the_layout_of_the_response(kernel):
    z, weight, response = make_inputs(kernel)
    out = broadcast_conv(z, weight, LAYOUTS["channels last"](response))
    assert out.is_contiguous(memory_format=torch.channels_last) and not out.is_contiguous()
    assert broadcast_conv(z, weight, response).is_contiguous()


def test_nan_and_infinity_stay_in_their_image():
    z, weight, response = make_inputs()
    z[1] = math.nan
    out = broadcast_conv(z, weight, response)
    assert out[1].isnan().all() and not out[0].isnan().any()
    response[0, 2, 3] = -math.inf
    assert (broadcast_conv(z, weight, response)[0] == -math.inf).nonzero().tolist() == [[0, 2, 3]]


@pytest.mark.parametrize("layout", ["planes", "channels last"])
def test_only_the_activated_output_is_kept(layout):
    """A deep decoder depends on it: nothing else of that size waits for backward."""
    z, weight, response = make_inputs(3, (20, 20))
    inputs = [t.requires_grad_() for t in (z, weight, LAYOUTS[layout](response))]
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        out = F.elu(broadcast_conv(*inputs), inplace=True)
    large = {tensor.data_ptr() for tensor in kept if tensor.numel() >= out.numel()}
    assert large == {out.data_ptr()}


def test_second_derivatives():
    inputs = [tensor.requires_grad_() for tensor in make_inputs()]
    torch.autograd.gradgradcheck(broadcast_conv, inputs, fast_mode=True)


def test_torch_compile_sees_through():
    inputs = [tensor.requires_grad_() for tensor in make_inputs()]
    compiled = torch.compile(broadcast_conv, backend="aot_eager", fullgraph=True)
    outs = compiled(*inputs), broadcast_conv(*inputs)
    torch.testing.assert_close(*outs)
    torch.testing.assert_close(*(torch.autograd.grad(out.square().sum(), inputs) for out in outs))


def test_under_autocast_the_output_is_bfloat16():
    inputs = [tensor.requires_grad_() for tensor in make_inputs(dtype=torch.float32)]
    with torch.autocast(DEVICE, torch.bfloat16):
        out = broadcast_conv(*inputs)
    expected = brute_force(*inputs)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.double(), expected, rtol=0, atol=4e-2 * expected.max().item())
    assert all(g.dtype == torch.float32 for g in torch.autograd.grad(out.sum(), inputs))


BAD_INPUTS = {  # message: shapes of z, weight and response
    "z must be": ((2, 3, 1), (4, 3, 3, 3), (4, 5, 5)),
    "and response": ((2, 3), (4, 3, 3, 3), (1, 4, 5, 5)),
    r"weight must be \(4, 3, k, k\)": ((2, 3), (4, 5, 3, 3), (4, 5, 5)),
    r"not \(6, 3, 3, 3\)": ((2, 3), (6, 3, 3, 3), (4, 5, 5)),
    "with an odd k": ((2, 3), (4, 3, 2, 2), (4, 5, 5)),
    r"not \(4, 3, 3, 1\)": ((2, 3), (4, 3, 3, 1), (4, 5, 5)),
    "kernel 5 is too large for images of 3x9 pixels": ((2, 3), (4, 3, 5, 5), (4, 3, 9)),
    "kernel 1 is too large for images of 0x9 pixels": ((2, 3), (4, 3, 1, 1), (4, 0, 9)),
}


@pytest.mark.parametrize("message", BAD_INPUTS)
def test_bad_shapes_are_refused_in_one_line(message):
    with pytest.raises(ValueError, match=message) as error:
        broadcast_conv(*(torch.zeros(shape) for shape in BAD_INPUTS[message]))
    assert "\n" not in str(error.value)
