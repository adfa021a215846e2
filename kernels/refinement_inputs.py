"""The image-sized inputs of IODINE's refinement network (Greff et al. 2019, app. C), packed.

    channel            formula             LN  SG  channels
    image              x                           C
    means              μ_k                         C
    mask               m_k                         1
    mask_logits        a_k                         1
    mask_posterior     P_k                         1
    grad_means         ∂L/∂μ_k             ✓   ✓   C
    grad_mask          ∂L/∂a_k             ✓   ✓   1
    log_likelihood     log p(x|z)          ✓   ✓   1
    leave_one_out      log p(x|z∖k)        ✓   ✓   1
    coordinates        fixed                       N      total 3C + 6 + N: 17 for C = 3, N = 2

L = −Σ log p(x|z); symbols and closed-form gradients as in mixture.py. SG: no gradient flows back.
LN: four layer normalisations, over (C, H, W) of a slot for grad_means, over (H, W) of a slot for
grad_mask and leave_one_out, over (H, W) of an image for log_likelihood; a gain and a bias for each
of the C + 3 channels.

Paper: ∂L/∂m_k, p(x|z), p(x|z∖k). Released code: the gradient of the mask logit, and logarithms.
Here: as released, because 1/m_k overflows and densities underflow in float32.

Backward, from the cotangents dμ dm da dP of the unstopped channels and dL of the likelihood:

    logit:  da + m_k (dm_k − Σ_j m_j dm_j) + dL (r_k − m_k)
    means:  dμ_c + s_kc (dL r_k + P_k (dP_k − Σ_j P_j dP_j))        (for any ε in P_k)

Bytes, in numbers per pixel for C = 3: two fused kernels (statistics, then normalise and pack) move
6 + 29K forward and 3 + 25K backward; eager torch with automatic differentiation 5 to 8 times that.

Axes: B batch, K slots, C colours (1 or 3), F = 3C + 6 + N channels, H W image.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

import kernels
from kernels.mixture import (
    FirstDerivative,
    check_inputs,
    component_log_density,
    logsumexp_and_softmax,
    logsumexp_of_others,
    mixture_reference,
    posterior,
    score,
)


def channel_slices(num_channels: int, num_coordinates: int) -> dict[str, slice]:
    """Where each input lies on the channel axis of `RefinementInputs.packed`."""
    colours = num_channels
    widths = {"image": colours, "means": colours, "mask": 1, "mask_logits": 1, "mask_posterior": 1}
    widths |= {"grad_means": colours, "grad_mask": 1, "log_likelihood": 1, "leave_one_out": 1}
    slices, start = {}, 0
    for name, width in (widths | {"coordinates": num_coordinates}).items():
        slices[name] = slice(start, start + width)
        start += width
    return slices


CHANNELS = channel_slices(num_channels=3, num_coordinates=2)  # the paper's 17


class RefinementInputs(NamedTuple):
    """What `refinement_inputs` returns."""

    packed: Tensor  # (B, K, F, H, W)             channels-last memory per image
    log_likelihood: Tensor  # (B, H, W)           log p(x|z), nats, differentiable
    grad_decoded: Tensor  # (B, K, C+1, H, W)     of −Σ log p(x|z), constant: for the decoder's vjp


def refinement_inputs_reference(
    image: Tensor,
    decoded: Tensor,
    weight: Tensor,
    bias: Tensor,
    coordinates: Tensor,
    sigma: float,
    component: str = "gaussian",
    posterior_epsilon: float = 0.0,
    log_ratio: bool = False,
    eps: float = 1e-5,
) -> RefinementInputs:
    """`refinement_inputs` as one would write it down, with automatic differentiation."""
    image, decoded, weight, bias, coordinates = _check_inputs(
        image, decoded, weight, bias, coordinates, sigma, component
    )
    colours, slots = image.shape[1], decoded.shape[1]
    terms = mixture_reference(image, decoded, sigma, component, posterior_epsilon)
    with torch.enable_grad():
        leaf = decoded.detach().requires_grad_()
        nll = -mixture_reference(image, leaf, sigma, component).log_likelihood.sum()
        (grad_decoded,) = torch.autograd.grad(nll, leaf)  # (B, K, C+1, H, W)
    log_likelihood = terms.log_likelihood.detach()[:, None, None]  # (B, 1, 1, H, W)
    leave_one_out = terms.leave_one_out[:, :, None]  # (B, K, 1, H, W)
    if log_ratio:
        leave_one_out = log_likelihood - leave_one_out
    stopped = [grad_decoded[:, :, :-1], grad_decoded[:, :, -1:], log_likelihood, leave_one_out]
    normalised = [F.layer_norm(value, value.shape[2:], eps=eps) for value in stopped]
    normalised[2] = normalised[2].expand_as(leave_one_out)
    affine = torch.cat(normalised, 2) * weight[:, None, None] + bias[:, None, None]
    packed = torch.cat(
        [
            image[:, None].expand(-1, slots, -1, -1, -1),
            decoded[:, :, :colours],
            terms.masks[:, :, None],
            decoded[:, :, colours:],
            terms.posterior_masks[:, :, None],
            affine,
            coordinates.expand(*decoded.shape[:2], -1, -1, -1),
        ],
        2,
    )  # (B, K, F, H, W)
    return RefinementInputs(to_channels_last(packed), terms.log_likelihood, grad_decoded)


def to_channels_last(packed: Tensor) -> Tensor:
    """The same (B, K, F, H, W), in memory as the convolution of its (B·K, F, H, W) wants it."""
    images = packed.flatten(0, 1).contiguous(memory_format=torch.channels_last)
    return images.unflatten(0, packed.shape[:2])


def _check_inputs(image, decoded, weight, bias, coordinates, sigma, component):
    """Refuse what has no meaning; give all five at the precision of the arithmetic."""
    image, decoded = check_inputs(image, decoded, sigma, component)
    normalised = image.shape[1] + 3
    if weight.shape != (normalised,) or bias.shape != (normalised,):
        raise ValueError(
            f"weight and bias must be ({normalised},) for {image.shape[1]} colours, "
            f"not {tuple(weight.shape)} and {tuple(bias.shape)}"
        )
    if coordinates.ndim != 3 or coordinates.shape[1:] != image.shape[2:]:
        raise ValueError(
            f"coordinates must be (N, {image.shape[2]}, {image.shape[3]}) for this image, "
            f"not {tuple(coordinates.shape)}"
        )
    wide = decoded.dtype
    return image, decoded, weight.to(wide), bias.to(wide), coordinates.detach().to(wide)


class _RefinementInputs(torch.autograd.Function):
    """All of it, with its backward by hand: on a CPU twice as fast as the reference under autograd.

    The work is done on contiguous planes (channels-last ones are copied once), where every torch
    operation is vectorised over pixels, and a single copy at the end turns them channels-last.
    """

    @staticmethod
    def forward(
        ctx, image, decoded, weight, bias, coordinates, sigma, component, epsilon, log_ratio, eps
    ):
        planes, slots = decoded.contiguous(), decoded.shape[1]
        means, logits = planes.split([image.shape[1], 1], 2)
        difference = image[:, None] - means  # (B, K, C, H, W)
        slope = score(difference, sigma, component)  # (B, K, C, H, W)
        log_density = component_log_density(difference, sigma, component)  # (B, K, H, W)
        log_masks, masks = logits.squeeze(2).log_softmax(1), logits.softmax(1)
        joint = log_masks + log_density  # (B, K, H, W)
        log_likelihood, responsibilities = logsumexp_and_softmax(joint)
        if slots == 1:
            leave_one_out = log_likelihood[:, None]  # (B, 1, H, W)
        else:
            leave_one_out = logsumexp_of_others(joint) - logsumexp_of_others(log_masks)
        if log_ratio:
            leave_one_out = log_likelihood[:, None] - leave_one_out
        responsibilities = responsibilities[:, :, None]  # (B, K, 1, H, W)
        grad_means = responsibilities.neg() * slope  # (B, K, C, H, W)
        grad_mask = masks - responsibilities  # (B, K, 1, H, W)
        # The likelihood's plane is the same for every slot, so to normalise per slot is per image.
        likelihood_planes = log_likelihood[:, None, None].expand_as(grad_mask)
        single = torch.cat([grad_mask, likelihood_planes, leave_one_out[:, :, None]], 2)
        by_colours = F.layer_norm(grad_means, grad_means.shape[2:], eps=eps)
        by_plane = F.layer_norm(single, single.shape[3:], eps=eps)
        normalised = torch.cat([by_colours, by_plane], 2)  # (B, K, C+3, H, W)
        posterior_masks = posterior(log_density, epsilon)[:, :, None]  # (B, K, 1, H, W)
        packed = torch.cat(
            [
                image[:, None].expand_as(means),
                means,
                masks,
                logits,
                posterior_masks,
                torch.addcmul(bias[:, None, None], normalised, weight[:, None, None]),
                coordinates.expand(*decoded.shape[:2], -1, -1, -1),
            ],
            2,
        )  # (B, K, F, H, W)
        packed = to_channels_last(packed)
        grad_decoded = torch.cat([grad_means, grad_mask], 2)  # (B, K, C+1, H, W)
        ctx.save_for_backward(
            decoded, weight, grad_decoded, slope, masks, posterior_masks, normalised
        )
        ctx.mark_non_differentiable(grad_decoded)
        return packed, log_likelihood, grad_decoded

    @staticmethod
    def backward(ctx, d_packed, d_log_likelihood, _):
        decoded, weight, *saved = ctx.saved_tensors
        with torch.no_grad():
            gradients = _backward(d_packed, d_log_likelihood, *saved)
        sources = decoded, weight, d_packed, d_log_likelihood
        gradients = [FirstDerivative.apply(gradient, *sources) for gradient in gradients]
        return None, *gradients, None, None, None, None, None, None


def _backward(d_packed, d_log_likelihood, grad_decoded, slope, masks, posterior_masks, normalised):
    """The cotangents of decoded, weight and bias; the formulas are in the file's docstring."""
    colours = slope.shape[2]
    widths = [colours, 1, 1, 1, colours + 3]  # means to leave_one_out; the rest are constants
    differentiable = d_packed[:, :, colours : colours + sum(widths)].contiguous()
    d_means, d_masks, d_logits, d_posterior, d_normalised = differentiable.split(widths, 2)
    d_decoded = grad_decoded * -d_log_likelihood[:, None, None]  # (B, K, C+1, H, W)
    d_decoded[:, :, -1:] += _through_softmax(masks, d_masks) + d_logits
    d_log_density = _through_softmax(posterior_masks, d_posterior)  # (B, K, 1, H, W)
    d_decoded[:, :, :-1] += torch.addcmul(d_means, slope, d_log_density)
    d_weight = (d_normalised * normalised).sum((3, 4)).sum((0, 1))  # (C+3,)
    d_bias = d_normalised.sum((3, 4)).sum((0, 1))  # (C+3,)
    return d_decoded, d_weight, d_bias


def _through_softmax(probabilities: Tensor, cotangent: Tensor) -> Tensor:
    """Vector-Jacobian product of a softmax over axis 1."""
    weighted = probabilities * cotangent
    return weighted - probabilities * weighted.sum(1, keepdim=True)


def refinement_inputs(
    image: Tensor,
    decoded: Tensor,
    weight: Tensor,
    bias: Tensor,
    coordinates: Tensor,
    sigma: float,
    component: str = "gaussian",
    posterior_epsilon: float = 0.0,
    log_ratio: bool = False,
    eps: float = 1e-5,
) -> RefinementInputs:
    """The refinement network's image-sized inputs, the likelihood and its gradient, in one go.

    image, decoded, sigma, component, posterior_epsilon: as for `kernels.mixture`. weight and bias
    (C+3,): gain and bias of grad_means (C), grad_mask, log_likelihood, leave_one_out. coordinates
    (N, H, W): fixed channels that come last, N >= 0. log_ratio feeds log p(x|z) − log p(x|z∖k) as
    leave_one_out, as the authors' code does. eps: of the normalisations.

    Differentiable once with respect to decoded, weight and bias. `packed.flatten(0, 1)` is
    contiguous in torch.channels_last. Raises ValueError for shapes that do not fit, sigma <= 0
    and an unknown component.
    """
    if kernels.backend(decoded, "refinement_inputs") == "triton":
        return kernels.TRITON["refinement_inputs"](
            image, decoded, weight, bias, coordinates, sigma, component, posterior_epsilon,
            log_ratio, eps,
        )  # fmt: skip
    tensors = _check_inputs(image, decoded, weight, bias, coordinates, sigma, component)
    return RefinementInputs(
        *_RefinementInputs.apply(*tensors, sigma, component, posterior_epsilon, log_ratio, eps)
    )
