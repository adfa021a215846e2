"""The first layer of a spatial broadcast decoder (Watters et al. 2019) without the broadcast.

The layer is a k x k convolution, zero-padded to keep the size (less padding: its inner taps become
one, and k smaller), over [z at every pixel; maps that are the same for all, as coordinates]. A
convolution is linear, so its output is the part of z plus the response to the maps. As z is the
same at every pixel, its part depends only on which taps fall inside the image. Rows have k border
cases: the k // 2 rows at either edge and one for all rows between them; so have columns. With S_r
the taps that are inside in case r, exactly:

    out[n, :, i, j] = cases[n, r(i), s(j)] + response[:, i, j]
    cases[n, r, s] = Σ_{a ∈ S_r} Σ_{b ∈ S_s} W[:, :, a, b] z_n     one sum pooling, one product

Backward, with g = ∂L/∂out, autograd sums g over the pixels of each case and over the images:

    d_cases[n, r, s] = Σ g[n, :, i, j] over the pixels of the case      d_response = Σ_n g[n]

and from these two small tensors follow the gradients of z and W. A convolution takes k² D products
for each number of out, a quarter or more of a decoder's work. Here the cases are stretched over the
image and the response is added, which writes and reads each number of out a few times. This is
plain torch: a kernel could fuse no more than that.

Axes: N images, D latent, O channels, H W image.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def broadcast_conv(z: Tensor, weight: Tensor, response: Tensor,
                   padding: int | None = None) -> Tensor:
    """F.conv2d(z at every pixel, weight, padding=padding) + response, without that image.

    z (N, D), weight (O, D, k, k) with odd k, response (O, H, W): all that does not depend on z, the
    bias included; H and W at least k - 1; padding from 0 to k // 2, which it is by default: then
    z is at H x W pixels. Returns (N, O, H, W), channels-last where response is. Up to rounding, of
    which it has less, equal to the convolution. Differentiable in all three. Raises ValueError for
    shapes that do not fit.
    """
    _check(z, weight, response, padding)
    if padding is not None:
        sizes = padding, weight.shape[-1] - 2 * padding, padding
        for dim in (2, 3):  # taps that never meet the padding act as one, their sum
            first, inner, last = weight.split(sizes, dim)
            weight = torch.cat([first, inner.sum(dim, keepdim=True), last], dim)
    size, (height, width) = weight.shape[-1], response.shape[1:]
    cases = z @ border_cases(weight).flatten(1)  # (N, k·k·O)
    cases = cases.unflatten(1, (size, size, -1))  # (N, k, k, O)
    response = response.to(cases.dtype)
    if is_channels_last(response):
        return add_columns(stretch(cases, 1, height), response.permute(1, 2, 0))
    cases = cases.permute(0, 3, 1, 2).contiguous()  # (N, O, k, k)
    if size == 1:
        return cases + response
    return stretch(stretch(cases, 2, height), 3, width).add_(response)


def border_cases(weight: Tensor) -> Tensor:
    """The sum of the taps that are inside the image, for every case of rows and columns."""
    size = weight.shape[-1]
    # The taps that are inside in case r lie k // 2 or less from tap k - 1 - r: hence the flip.
    sums = F.avg_pool2d(weight, size, 1, size // 2, divisor_override=1).flip(2, 3)
    return sums.permute(1, 2, 3, 0)  # (D, k, k, O)


def stretch(cases: Tensor, dim: int, size: int) -> Tensor:
    """From k cases to `size` rows or columns: those at the edges, all others the middle one."""
    half = cases.shape[dim] // 2
    if half == 0:
        return cases  # one case everywhere: the sum with the response broadcasts it
    first, middle, last = cases.split([half, 1, half], dim)
    shape = list(cases.shape)
    shape[dim] = size - 2 * half
    return torch.cat([first, middle.expand(shape), last], dim)


def add_columns(cases: Tensor, response: Tensor) -> Tensor:
    """(N, H, k, O) stretched to W columns, plus (H, W, O), as (N, O, H, W) in channels-last memory.

    The result is no view, and neither is what it is put together from: an activation may work on it
    in place, of which autograd would make a copy for a view.
    """
    half, pieces = cases.shape[2] // 2, []
    parts = response.split([half, response.shape[1] - 2 * half, half], 1)
    for case, part in zip(cases.split([half, 1, half], 2), parts, strict=True):
        shape = len(cases), *part.shape  # (N, H, columns, O)
        pieces.append(case.expand(shape).permute(0, 3, 1, 2)
                      + part.expand(shape).permute(0, 3, 1, 2))  # fmt: skip
    return torch.cat(pieces, 3) if half else pieces[1]


def is_channels_last(response: Tensor) -> bool:
    """Of (O, H, W), which torch does not call so for want of a batch axis."""
    last = response[None].is_contiguous(memory_format=torch.channels_last)
    return last and not response.is_contiguous()


def _check(z: Tensor, weight: Tensor, response: Tensor, padding: int | None) -> None:
    """Refuse shapes that do not fit."""
    if z.ndim != 2 or response.ndim != 3:
        raise ValueError(
            f"z must be (N, D) and response (O, H, W), "
            f"not {tuple(z.shape)} and {tuple(response.shape)}"
        )
    channels, size = len(response), weight.shape[-1]
    if weight.shape != (channels, z.shape[1], size, size) or size % 2 == 0:
        raise ValueError(
            f"weight must be ({channels}, {z.shape[1]}, k, k) with an odd k for this z and "
            f"response, not {tuple(weight.shape)}"
        )
    if padding is not None and not 0 <= padding <= size // 2:
        raise ValueError(f"padding {padding} is not from 0 to {size // 2}, half of the kernel")
    height, width = response.shape[1:]
    border = size - 1 if padding is None else 2 * padding
    if min(height, width) < max(1, border):  # more border cases than k²: both edges meet
        raise ValueError(f"kernel {size} is too large for images of {height}x{width} pixels")
