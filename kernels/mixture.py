"""The spatial mixture likelihood of slot models: one mixture per pixel (Greff et al. 2019, eq. 1).

The colours x_c of a pixel, explained by K slots with mask logits a_k and means μ_kc:

    m_k  = softmax_k(a_k)                                  masks
    N_k  = Π_c N(x_c; μ_kc, σ²)                            one density per slot, colours multiplied
    log p(x|z)     = log Σ_k m_k N_k                       the mixture is over whole pixels
    r_k            = m_k N_k / Σ_j m_j N_j                 responsibilities
    P_k            = N_k / (Σ_j N_j + ε)                   posterior masks: no mask prior in them
    log p(x|z∖k)   = log Σ_{j≠k} m_j N_j / Σ_{j≠k} m_j     leave-one-out: the other masks sum to 1

The gradient has a closed form, so that none of it needs automatic differentiation:

    ∂(−log p)/∂μ_kc = −r_k s_kc,   s_kc = (x_c−μ_kc)/σ²               Gaussian, standard deviation σ
                                   s_kc = tanh((x_c−μ_kc)/2σ)/σ       logistic, scale σ
    ∂(−log p)/∂a_k  = m_k − r_k

Everything stays in log space: in float32 every N_k underflows once a colour is 1.3 away at σ = 0.1.
The gradient is that of the mask *logit*, which lies in [−1, 1]; with respect to the mask it is
−N_k/Σ_j m_j N_j, which overflows for small masks.

Bytes, in numbers per pixel: a fused kernel reads C + (C+1)K and writes 1 + 4K + (C+1)K, that is
4 + 12K for C = 3. Eager torch, a pass per operation, moves five to eight times as much.

Axes: B batch, K slots, C colours (1 or 3), H W image.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

import kernels


class Mixture(NamedTuple):
    """What `mixture` returns; logarithms are in nats."""

    log_likelihood: Tensor  # (B, H, W)           log p(x|z)
    masks: Tensor  # (B, K, H, W)                 m_k
    responsibilities: Tensor  # (B, K, H, W)      r_k
    posterior_masks: Tensor  # (B, K, H, W)       P_k
    leave_one_out: Tensor  # (B, K, H, W)         log p(x|z∖k), no gradient flows through it
    grad_decoded: Tensor  # (B, K, C+1, H, W)     of −Σ log p(x|z), no gradient flows through it


def mixture_reference(
    image: Tensor,
    decoded: Tensor,
    sigma: float,
    component: str = "gaussian",
    posterior_epsilon: float = 0.0,
) -> Mixture:
    """`mixture` in the fewest lines of torch."""
    image, decoded = check_inputs(image, decoded, sigma, component, posterior_epsilon)
    difference = image[:, None] - decoded[:, :, :-1]  # (B, K, C, H, W)
    log_masks = decoded[:, :, -1].log_softmax(1)  # (B, K, H, W)
    log_density = component_log_density(difference, sigma, component)  # (B, K, H, W)
    joint = log_masks + log_density  # (B, K, H, W)
    masks, responsibilities = log_masks.exp(), joint.softmax(1)
    with torch.no_grad():
        leave_one_out = logsumexp_of_others(joint) - logsumexp_of_others(log_masks)
        if decoded.shape[1] == 1:  # no other slot: the log-ratio of the two likelihoods is 0
            leave_one_out = joint.logsumexp(1, keepdim=True)
        grad_means = -responsibilities[:, :, None] * score(difference, sigma, component)
        grad_logits = (masks - responsibilities)[:, :, None]  # (B, K, 1, H, W)
        grad_decoded = torch.cat([grad_means, grad_logits], 2)  # (B, K, C+1, H, W)
    return Mixture(
        joint.logsumexp(1),
        masks,
        responsibilities,
        posterior(log_density, posterior_epsilon),
        leave_one_out,
        grad_decoded,
    )


def component_log_density(difference: Tensor, sigma: float, component: str) -> Tensor:
    """log N_k, nats, of x − μ (B, K, C, H, W): a product over colours, (B, K, H, W)."""
    colours = difference.shape[2]
    if component == "gaussian":
        constant = colours * (math.log(sigma) + 0.5 * math.log(2 * math.pi))
        return difference.square().sum(2) * (-0.5 / sigma**2) - constant
    standard = difference / sigma
    # The logistic density is sigmoid(z) sigmoid(−z) / σ.
    log_density = F.logsigmoid(standard) + F.logsigmoid(-standard)  # (B, K, C, H, W)
    return log_density.sum(2) - colours * math.log(sigma)


def score(difference: Tensor, sigma: float, component: str) -> Tensor:
    """s_kc, the derivative of log N_k by μ_kc, of x − μ."""
    if component == "gaussian":
        return difference / sigma**2
    return (difference / (2 * sigma)).tanh() / sigma


def posterior(log_density: Tensor, epsilon: float) -> Tensor:
    """P_k = N_k / (Σ_j N_j + ε) of log N_k (B, K, H, W), without leaving log space."""
    if epsilon == 0:
        return log_density.softmax(1)
    # ε is one more component, so that the softmax may be taken where every N_k underflows.
    floor = torch.full_like(log_density[:, :1], math.log(epsilon))
    return torch.cat([log_density, floor], 1).softmax(1)[:, :-1]


def logsumexp_and_softmax(values: Tensor) -> tuple[Tensor, Tensor]:
    """log Σ_k exp(values_k) (B, H, W) and the softmax (B, K, H, W), both along axis 1.

    The largest term has the largest share in the sum, so one gives the other. That saves the pass
    of exp in torch.logsumexp, which on a CPU is up to ten times slower where it underflows.
    """
    shares = values.softmax(1)
    return values.amax(1) - shares.amax(1).log(), shares


def logsumexp_of_others(values: Tensor) -> Tensor:
    """log Σ_{j≠k} exp(values_j) along axis 1 in O(K); −inf where there is no other.

    Sums from both ends meet around slot k. Subtracting slot k from the full sum instead would
    leave nothing but rounding error where that slot owns the pixel.
    """
    slots = values.unbind(1)
    before, after = [None, slots[0]], [None, slots[-1]]
    for k in range(1, len(slots) - 1):
        before.append(torch.logaddexp(before[-1], slots[k]))
        after.append(torch.logaddexp(after[-1], slots[-1 - k]))
    if len(slots) == 1:
        return torch.full_like(values, -math.inf)
    inner = [torch.logaddexp(b, a) for b, a in zip(before[1:-1], after[-2:0:-1], strict=True)]
    return torch.stack([after[-1], *inner, before[-1]], 1)


def check_inputs(
    image: Tensor, decoded: Tensor, sigma: float, component: str, posterior_epsilon: float = 0.0
) -> tuple[Tensor, Tensor]:
    """Refuse what has no meaning; give both at the precision of the arithmetic, image constant."""
    if image.ndim != 4 or decoded.ndim != 5:
        raise ValueError(
            f"image must be (B, C, H, W) and decoded (B, K, C+1, H, W), "
            f"not {tuple(image.shape)} and {tuple(decoded.shape)}"
        )
    batch, colours, height, width = image.shape
    if colours not in (1, 3):
        raise ValueError(f"image must have 1 or 3 colours, not {colours}")
    slots = decoded.shape[1]
    if decoded.shape != (batch, slots, colours + 1, height, width) or slots == 0:
        raise ValueError(
            f"decoded must be ({batch}, K, {colours + 1}, {height}, {width}) with K > 0 "
            f"for this image, not {tuple(decoded.shape)}"
        )
    if not (image.is_floating_point() and decoded.is_floating_point()):
        raise ValueError(
            f"image and decoded must be floating point, not {image.dtype} and {decoded.dtype}"
        )
    if not 0 < sigma < math.inf:
        raise ValueError(f"sigma must be positive and finite, not {sigma}")
    if component not in ("gaussian", "logistic"):
        raise ValueError(f"component must be gaussian or logistic, not {component!r}")
    if not 0 <= posterior_epsilon < math.inf:
        raise ValueError(f"posterior_epsilon must be 0 or more, not {posterior_epsilon}")
    # Half precision would round x − μ to 1 % of σ and more: never compute in it.
    wide = torch.promote_types(torch.promote_types(image.dtype, decoded.dtype), torch.float32)
    return image.detach().to(wide), decoded.to(wide)


class FirstDerivative(torch.autograd.Function):
    """The identity on a gradient made by hand; to differentiate it again is an error.

    `once_differentiable` does not see a second derivative through the sources alone: it would
    take the gradient of `likelihood.sum()` for a constant, without a word.
    """

    @staticmethod
    def forward(ctx, gradient, *sources):
        return gradient.view_as(gradient)

    @staticmethod
    def backward(ctx, _):
        raise RuntimeError("kernels: there is no second derivative; use the reference for one")


class _LogLikelihood(torch.autograd.Function):
    """log p(x|z) that keeps its gradient, so that backward is one multiplication."""

    @staticmethod
    def forward(ctx, image, decoded, sigma, component):
        planes = decoded.contiguous()  # sums over colours are slow where these lie innermost
        difference = image[:, None] - planes[:, :, :-1]  # (B, K, C, H, W)
        joint = planes[:, :, -1].log_softmax(1)  # (B, K, H, W)
        joint = joint + component_log_density(difference, sigma, component)
        log_likelihood, responsibilities = logsumexp_and_softmax(joint)
        if ctx.needs_input_grad[1]:
            slope = score(difference, sigma, component)  # (B, K, C, H, W)
            by_means = responsibilities[:, :, None] * slope
            by_logits = responsibilities - planes[:, :, -1].softmax(1)  # (B, K, H, W)
            gradient = torch.cat([by_means, by_logits[:, :, None]], 2)  # (B, K, C+1, H, W)
            ctx.save_for_backward(gradient, decoded)
        return log_likelihood

    @staticmethod
    def backward(ctx, cotangent):
        gradient, decoded = ctx.saved_tensors
        with torch.no_grad():
            d_decoded = gradient * cotangent[:, None, None]  # (B, K, C+1, H, W)
        return None, FirstDerivative.apply(d_decoded, decoded, cotangent), None, None


def mixture(
    image: Tensor,
    decoded: Tensor,
    sigma: float,
    component: str = "gaussian",
    posterior_epsilon: float = 0.0,
) -> Mixture:
    """The mixture likelihood of every pixel and all that inference wants to know of it.

    image (B, C, H, W), C 1 or 3, constant; decoded (B, K, C+1, H, W), means first and the mask
    logit last, any strides. sigma is the standard deviation of "gaussian", the scale of
    "logistic"; posterior_epsilon is ε. bfloat16 and float16 are computed and returned in float32.

    With one slot, leave_one_out is log_likelihood. Raises ValueError for shapes that do not fit,
    sigma <= 0 and an unknown component.
    """
    arguments = (image, decoded, sigma, component, posterior_epsilon)
    if kernels.backend(decoded, "mixture") == "triton":
        return kernels.TRITON["mixture"](*arguments)
    return mixture_reference(*arguments)


def mixture_log_likelihood(
    image: Tensor, decoded: Tensor, sigma: float, component: str = "gaussian"
) -> Tensor:
    """log p(x|z) alone, nats, (B, H, W), differentiable once with respect to decoded.

    Arguments and errors as for `mixture`.
    """
    if kernels.backend(decoded, "mixture_log_likelihood") == "triton":
        return kernels.TRITON["mixture_log_likelihood"](image, decoded, sigma, component)
    return _LogLikelihood.apply(*check_inputs(image, decoded, sigma, component), sigma, component)
