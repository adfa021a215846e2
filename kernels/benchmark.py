"""What the operations, and the training steps around them, cost on this machine.

    python -m kernels.benchmark                         # every operation at five sizes
    python -m kernels.benchmark --sizes clevr6 --torch-compile
    python -m kernels.benchmark --models                # the models, all four parts
    python -m kernels.benchmark --models step           # what each change to the step brings
    python -m kernels.benchmark --models clevr presets  # the paper's largest model; every preset
    python -m kernels.benchmark --models compare        # IODINE beside EfficientMORL

Nothing wrong is timed: everything is first compared, at the very shape, with the reference in
float64 (error: the largest deviation over the largest value, of every output and gradient; of a
training step, run on two images, of loss and gradient, in `compare` of the reconstruction too).
What is wrong is a red row without a number, and makes the exit status 1.

Times are medians with the 20th and 80th percentile, in milliseconds. Candidates take turns, call by
call: a machine that slows down slows all of them, and ratios stay fair. On CUDA a time lies between
two events around the call, launches included, after a pass over a buffer larger than the cache.

Operations. "eager autograd" is how ports of the models write it: torch.distributions.Normal,
autograd.grad for the gradients, a loop over slots for leave-one-out, layer_norm and cat;
"reference" is the shortest torch, which for mixture_log_likelihood computes all of `mixture`;
"torch" and "triton" are the public operation (the torch path of `mixture` is its reference: these
two show the noise; of the last three operations eager and reference are the same). forward is
without gradients, as in evaluation. Columns eager, ref., comp. and torch hold their time over this
row's: above 1 this row is faster. graph: milliseconds within a CUDA graph, for calls so short that
launching them is most of the time. GB/s counts inputs, cotangents, outputs and gradients once
each, what a perfect kernel would move; "copy" is its share of what copying a large tensor reached
in this process. MB: the peak of what the call allocates.

Training steps. `step` starts from IODINE as ports write it and makes one change per row, on a CPU
each in a process of its own; "above x" is the gain over the row above (of bfloat16's first row:
over float32's). "MB first" and "MB peak" are the resident memory of that process, before its first
step and at most (CUDA: what one step allocates). `presets` sets a preset's step against the drawing
of its scenes and noise, whose share of their sum should stay below 10 %; "ops" is the share of the
step that the mixture and the refinement inputs take, by torch's profiler.

`compare` is the timing figure of EfficientMORL's paper (Emami et al. 2021): both models with the
sizes of CLEVR6 in their own papers (K 7, latent 64) on the same images. IODINE decodes T = 5 times,
EfficientMORL, whose unpadded decoder starts from a grid of 10 pixels more a side, once and once
more after each of I = 0 .. 3 refinement steps. "fwd" is the posterior and the reconstruction, as in
evaluation, "both" the loss and its gradient, as in training. MB: by how much the memory of the
process grew beyond what it held before the first pass (CUDA: what "both" allocates). Columns with
an x: IODINE's number over this row's; above 1 this row is better.

Axes: B batch, K slots, T decodes of IODINE, I refinement steps of EfficientMORL, D latent, C H W
image, F input channels of refinement.
"""

import csv
import importlib.metadata
import math
import multiprocessing
import os
import re
import shlex
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import nullcontext, suppress
from dataclasses import dataclass, field
from functools import partial
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal, NamedTuple, get_args
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F
import tyro
from matplotlib import colormaps
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import LogLocator, NullFormatter
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

import air
import data
import efficient_morl
import iodine
import kernels
import mvae
from data import figures, runs
from data.options import UserError, require
from kernels.bias_elu import bias_elu_reference
from kernels.broadcast_conv import broadcast_conv_reference
from kernels.masks import masks_reference
from kernels.mixture import Mixture, mixture_reference
from kernels.refinement_inputs import RefinementInputs, refinement_inputs_reference

SIZES = {  # name: B on CUDA, B on a CPU, K, H = W; D, O and kernel of the decoder's first layer
    "tetrominoes": (32, 32, 4, 35, 32, 32, 5),
    "tetrominoes_256": (256, 64, 4, 35, 32, 32, 5),
    "dsprites": (32, 8, 6, 64, 16, 32, 5),
    "clevr6": (32, 2, 7, 128, 64, 64, 3),
    "slots_11": (32, 1, 11, 128, 64, 64, 3),
}
SIGMA = 0.1
LAUNCH_BOUND = 1.0  # milliseconds: faster calls on CUDA are timed once more, in a CUDA graph
TOLERANCE = {"float32": 1e-4, "bfloat16": 1e-2}  # bfloat16: gradients are rounded to it
STEP_TOLERANCE = {"float32": 1e-3, "bfloat16": 0.3}  # bfloat16: only nonsense is refused
MODELS = {  # what the loss takes after the image: (model, scenes, index of the scenes) -> tensors
    iodine: lambda model, *at: [model.noise(*at)],
    efficient_morl: lambda model, *at: [model.noise(*at, model.num_steps(0))],
    air: lambda model, *at: [*model.noise(*at), model.log_prior(0)],
    mvae: lambda model, *at: [model.noise(*at)],
}
PIXELS = 64, 96, 128  # a side, of the images in `compare`
PASSES = "forward", "backward"  # methods of TrainingStep
COMPARED = {  # column: its panel in the chart
    "forward_ms": "forward, milliseconds", "backward_ms": "forward and backward, milliseconds",
    "peak_mb": "peak memory, MB",
}  # fmt: skip
Part = Literal["step", "clevr", "compare", "presets"]


@dataclass
class Options:
    """Times the operations or, with --models, training steps and IODINE beside EfficientMORL."""

    models: tuple[Part, ...] | None = None  # parts; no name: all of them
    sizes: tuple[str, ...] = tuple(SIZES)  # of the operations
    dtypes: tuple[Literal["float32", "bfloat16"], ...] = ()  # of decoded; none: on CUDA both
    batch: int = 0  # B; 0: every size and preset has its own (on a CPU: small ones)
    repeats: int = 0  # timed calls; 0: 30 of an operation, 5 of a step, 3 of `compare` on a CPU
    torch_compile: bool = field(default_factory=torch.cuda.is_available)  # time it as well
    threads: int = 0  # of the CPU; 0: torch decides
    device: str = "auto"  # auto (CUDA where there is one), cpu, cuda, cuda:1, ...
    out: str = ""  # folder to write; empty: kernels/results/<device>


class Session(NamedTuple):
    options: Options
    device: torch.device
    info: dict[str, Any]  # device, versions, commit, date, command: in every file


# -- measuring -------------------------------------------------------------------------------------


def interleave(calls: dict, repeats: int, device: torch.device) -> dict[Any, dict[str, float]]:
    """Milliseconds of every call: median, p20, p80. The calls take turns; a warm-up comes first."""
    on_gpu, times = device.type == "cuda", {name: [] for name in calls}
    flush = torch.empty(1 << 28 if on_gpu else 0, dtype=torch.int8, device=device)
    for repeat in range(-1 - repeats // 10, repeats):
        for name, call in calls.items():
            if on_gpu:
                start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                flush.zero_()
                start.record()
                call()
                end.record()
                end.synchronize()
                elapsed = start.elapsed_time(end)
            else:
                begin = time.perf_counter()
                call()
                elapsed = 1e3 * (time.perf_counter() - begin)
            if repeat >= 0:
                times[name].append(elapsed)
    quantiles = dict(ms=0.5, p20=0.2, p80=0.8)
    return {name: {key: float(np.quantile(t, q)) for key, q in quantiles.items()}
            for name, t in times.items()}


def check(values: Callable[[], list[Tensor]], truth: list[Tensor], tolerance: float) -> dict:
    """`error`, and where that is too large (or there are no values) `wrong`, which says why."""
    try:
        pairs = zip(values(), truth, strict=True)
        errors = [(v.double() - t).abs().max() / t.abs().max() for v, t in pairs]
    except Exception as error:  # one that breaks must not keep the others from us
        return dict(wrong=f"{type(error).__name__}: {error}".splitlines()[0])
    error = torch.stack(errors).nan_to_num(math.inf).max().item()
    wrong = dict(wrong=f"error {error:.0e}, at most {tolerance:.0e} allowed")
    return dict(error=error, **(wrong if error > tolerance else {}))


def time_right(rows: dict, calls: dict, repeats: int, device: torch.device) -> dict:
    """Adds their times to the rows that are not wrong, and returns these."""
    right = {name: row for name, row in rows.items() if "wrong" not in row}
    for name, t in interleave({name: calls[name] for name in right}, repeats, device).items():
        right[name] |= t
    return right


def copy_bandwidth(device: torch.device) -> float:
    """GB/s of copying a large tensor, bytes read and bytes written."""
    source = torch.ones(1 << (28 if device.type == "cuda" else 24), device=device)
    target = torch.empty_like(source)
    times = interleave({"copy": lambda: target.copy_(source)}, 10, device)["copy"]
    return num_bytes([source, target]) / times["ms"] / 1e6


def peak_allocated(call: Callable[[], Any], device: torch.device) -> float:
    """MB that the call allocates at most, above what there was."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        return (torch.cuda.max_memory_allocated(device) - before) / 1e6
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # else the profiler writes to stderr
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as record:
        call()
    events = record.profiler.kineto_results.events()
    memory = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
    return float(np.cumsum([size for _, size in memory] or [0]).max()) / 1e6


def memory_so_far(device: torch.device) -> float:
    """MB that this process has held at most (getrusage would count its parent's); else NaN."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e6
    if sys.platform != "linux":
        return math.nan
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("VmHWM")).split()[1]) * 1.024e-3


def num_bytes(tensors: Sequence[Tensor]) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


# -- the operations --------------------------------------------------------------------------------


def eager_terms(image: Tensor, decoded: Tensor, sigma: float) -> tuple[Tensor, Tensor, Tensor]:
    """Mask logits, log N_k and log m_k N_k, each (B, K, H, W)."""
    wide = decoded.to(torch.promote_types(decoded.dtype, torch.float32))
    means, logits = wide[:, :, :-1], wide[:, :, -1]
    log_density = torch.distributions.Normal(means, sigma).log_prob(image[:, None]).sum(2)
    return logits, log_density, logits.log_softmax(1) + log_density


def eager_log_likelihood(image: Tensor, decoded: Tensor, sigma: float, *_: Any) -> Tensor:
    return eager_terms(image, decoded, sigma)[2].logsumexp(1)  # (B, H, W)


def eager_mixture(image: Tensor, decoded: Tensor, sigma: float, *_: Any) -> Mixture:
    with torch.enable_grad():
        leaf = decoded if decoded.requires_grad else decoded.detach().requires_grad_()
        logits, log_density, joint = eager_terms(image, leaf, sigma)
        log_likelihood = joint.logsumexp(1)  # (B, H, W)
        (gradient,) = torch.autograd.grad(-log_likelihood.sum(), leaf, retain_graph=True)
    with torch.no_grad():
        slots = range(decoded.shape[1])
        others = [[j for j in slots if j != k] for k in slots]
        terms = [logits[:, o].log_softmax(1) + log_density[:, o] for o in others]
        leave_one_out = torch.stack([t.logsumexp(1) for t in terms], 1)  # (B, K, H, W)
    return Mixture(log_likelihood, logits.softmax(1), joint.softmax(1), log_density.softmax(1),
                   leave_one_out, gradient)


def eager_refinement_inputs(
    image: Tensor, decoded: Tensor, weight: Tensor, bias: Tensor, coordinates: Tensor,
    sigma: float, *_: Any,
) -> RefinementInputs:
    mixture = eager_mixture(image, decoded, sigma)
    gradient, shape = mixture.grad_decoded.to(weight.dtype), (*decoded.shape[:2], -1, -1, -1)
    likelihood = mixture.log_likelihood.detach()[:, None, None].expand(*shape)  # (B, K, 1, H, W)
    leave_one_out = mixture.leave_one_out[:, :, None]  # (B, K, 1, H, W)
    stopped = gradient[:, :, :-1], gradient[:, :, -1:], likelihood, leave_one_out
    normalised = torch.cat([F.layer_norm(value, value.shape[2:]) for value in stopped], 2)
    packed = torch.cat(
        [image[:, None].expand(*shape), decoded[:, :, :-1], mixture.masks[:, :, None],
         decoded[:, :, -1:], mixture.posterior_masks[:, :, None],
         normalised * weight[:, None, None] + bias[:, None, None], coordinates.expand(*shape)], 2,
    )  # (B, K, F, H, W)
    return RefinementInputs(packed, mixture.log_likelihood, gradient)


def log_likelihood_reference(*arguments: Any) -> Tensor:
    return mixture_reference(*arguments).log_likelihood


class Op(NamedTuple):
    eager: Callable  # as ports write it
    reference: Callable
    public: Callable
    leaves: slice  # which inputs have a gradient


OPS = {
    "mixture_log_likelihood": Op(eager_log_likelihood, log_likelihood_reference,
                                 kernels.mixture_log_likelihood, slice(1, 2)),
    "mixture": Op(eager_mixture, mixture_reference, kernels.mixture, slice(1, 2)),
    "refinement_inputs": Op(eager_refinement_inputs, refinement_inputs_reference,
                            kernels.refinement_inputs, slice(1, 4)),
    "masks": Op(masks_reference, masks_reference, kernels.masks, slice(0, 1)),
    "broadcast_conv": Op(broadcast_conv_reference, broadcast_conv_reference,
                         kernels.broadcast_conv, slice(0, 3)),
    "bias_elu": Op(bias_elu_reference, bias_elu_reference, kernels.bias_elu, slice(0, 2)),
}  # fmt: skip


def with_backend(backend: str, function: Callable, *arguments: Any) -> Any:
    with kernels.use(backend):
        return function(*arguments)


def backends(device: torch.device, op: str | None = None) -> list[str]:
    """"torch", and "triton" where it can run."""
    return ["torch", "triton"][: 1 + (with_backend("auto", kernels.backend, device, op) != "torch")]


def make_inputs(op: str, size: str, batch: int, dtype: str) -> list[Any]:
    """What the op takes; images of slots in channels-last memory, as decoders give them."""
    _, _, slots, side, latent, outputs, kernel = SIZES[size]
    draw = torch.Generator().manual_seed(0)
    if op in ("broadcast_conv", "bias_elu"):
        shapes = [(batch * slots, latent), (outputs, latent + 2, kernel, kernel), (outputs,)]
        if op == "bias_elu":
            shapes = [(batch * slots, outputs, side, side), (outputs,)]
        made = [torch.randn(shape, generator=draw).to(getattr(torch, dtype)) for shape in shapes]
        if op == "bias_elu":
            return [made[0].contiguous(memory_format=torch.channels_last), made[1]]
        return [made[0], made[1] / math.sqrt(made[1][0].numel()), made[2],
                iodine.linear_coordinates(side, side).to(made[0])]
    image = torch.rand(batch, 3, side, side, generator=draw)
    decoded = torch.randn(batch * slots, 4, side, side, generator=draw)  # (B*K, C+1, H, W)
    decoded[:, :3].mul_(0.25).add_(0.5)
    decoded = decoded.to(getattr(torch, dtype)).contiguous(memory_format=torch.channels_last)
    inputs = [image, decoded.unflatten(0, (batch, slots))]
    if op == "masks":
        return [inputs[1][:, :, -1]]
    if op == "refinement_inputs":
        inputs += [1 + 0.1 * torch.randn(6, generator=draw), 0.1 * torch.randn(6, generator=draw)]
        inputs += [iodine.linear_coordinates(side, side)]
    return [*inputs, SIGMA]


def double(inputs: list[Any]) -> list[Any]:
    return [value.double() if isinstance(value, Tensor) else value for value in inputs]


def make_call(op: Op, function: Callable, inputs: list[Any], backward: bool) -> Callable:
    """A call that gives the outputs and, with `backward`, their cotangents and the gradients."""
    arguments, cotangents = list(inputs), []
    leaves = [tensor.clone().requires_grad_(backward) for tensor in inputs[op.leaves]]
    arguments[op.leaves] = leaves

    def call() -> list[Tensor]:
        with torch.set_grad_enabled(backward):
            outputs = function(*arguments)
        outputs = [outputs] if isinstance(outputs, Tensor) else list(outputs)
        gradients: Sequence[Tensor] = []
        if backward:
            ends = [output for output in outputs if output.requires_grad]
            if not cotangents:  # always the same numbers, each in the memory layout of its output
                draw = torch.Generator().manual_seed(1)
                for end in ends:
                    random = torch.randn(end.shape, generator=draw)
                    cotangents.append(torch.empty_like(end).copy_(random))
            gradients = torch.autograd.grad(ends, leaves, cotangents)
        return [output.detach() for output in outputs] + cotangents + list(gradients)

    return call


def time_op(
    name: str, inputs: list[Any], dtype: str, backward: bool, session: Session
) -> dict[str, dict[str, Any]]:
    """The row of every implementation."""
    op, (options, device, _) = OPS[name], session
    functions = {"eager autograd": op.eager, "reference": op.reference}
    if options.torch_compile:
        torch.compiler.reset()  # else it gives up after a few shapes
        functions["torch.compile"] = torch.compile(op.reference, dynamic=False)
    functions |= {name: partial(with_backend, name, op.public) for name in backends(device, name)}
    calls = {name: make_call(op, f, inputs, backward) for name, f in functions.items()}
    truth = make_call(op, op.reference, double(inputs), backward)()
    rows = {name: check(call, truth, TOLERANCE[dtype]) for name, call in calls.items()}
    timed = time_right(rows, calls, options.repeats or 30, device)
    for name, row in timed.items():
        row |= {f"vs {other}": timed[other]["ms"] / row["ms"] for other in timed}
        tensors = [value for value in inputs if isinstance(value, Tensor)]
        traffic = num_bytes(tensors) * (2 if backward else 1) + num_bytes(calls[name]())
        row["gb_per_s"] = traffic / row["ms"] / 1e6
        row["peak_mb"] = peak_allocated(calls[name], device)
        if device.type == "cuda" and row["ms"] < LAUNCH_BOUND:
            copies = range(max(2, min(32, math.ceil(2e8 / traffic))))  # more than the cache holds
            several = [make_call(op, functions[name], inputs, backward) for _ in copies]
            row["graph_ms"] = graph_milliseconds(several, options.repeats or 30)
    return rows


def graph_milliseconds(calls: list[Callable], repeats: int) -> float:
    """Of one call, without its launches: all of them, on buffers of their own, in a CUDA graph."""
    side, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # lazy initialisations must not be captured
        for call in [*calls, *calls]:
            call()
    torch.cuda.current_stream().wait_stream(side)
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    replayed = interleave({"graph": graph.replay}, repeats, torch.device("cuda"))["graph"]["ms"]
    return replayed / len(calls)


def benchmark_ops(session: Session) -> bool:
    """Prints and writes ops.*; True where everything was right."""
    options, device, info = session
    on_gpu, bandwidth = device.type == "cuda", copy_bandwidth(device)
    report = Report("ops", OP_COLUMNS, {**info, "copy_gb_per_s": round(bandwidth, 1)})
    dtypes = options.dtypes or ("float32", "bfloat16")[: 1 + on_gpu]
    for op, size, dtype, backward in product(OPS, options.sizes, dtypes, (False, True)):
        *batches, slots, side, _, _, _ = SIZES[size]
        batch = options.batch or batches[not on_gpu]
        direction = "forward+backward" if backward else "forward"
        print(f"{op}, {size}: B {batch}, K {slots}, {side} x {side}, {dtype}, {direction}")
        group = dict(op=op, size=size, batch=batch, slots=slots, side=side, dtype=dtype)
        inputs = [value.to(device) if isinstance(value, Tensor) else value
                  for value in make_inputs(op, size, batch, dtype)]
        for name, row in time_op(op, inputs, dtype, backward, session).items():
            if "ms" in row:
                row["copy_share"] = row["gb_per_s"] / bandwidth
            report.add(dict(**group, direction=direction, implementation=name, **row))
            if name != "eager autograd" and "vs eager autograd" in row:
                report.bar(op, f"{size} {dtype}\n{direction}", name, row["vs eager autograd"])
    return report.write(options.out, "Speed of the operations; as ports write them = 1",
                        "times as fast (logarithmic)", start=1)


# -- training steps --------------------------------------------------------------------------------

CHANGES = ("as ports write it", "+ freed memory is kept", "+ closed-form inputs",
           "+ broadcast convolution", "+ channels-last", "+ in-place ELU = iodine.py",
           "+ Triton kernels")  # fmt: skip
OURS = CHANGES.index("+ in-place ELU = iodine.py")


class Variant(NamedTuple):
    """A row of the step tables."""

    changes: int  # of CHANGES, and all before it
    precision: str = "float32"


class PortStyle(iodine.IODINE):
    """iodine.IODINE up to a row of CHANGES: the same parameters, the same function of them."""

    def __init__(self, config: iodine.Config, image: Tensor, changes: int):
        super().__init__(config, *image.shape[1:])
        self.closed_form, first = changes >= 2, self.decoder.first
        for module in self.modules():
            if isinstance(module, iodine.Conv) and module is not first:
                module.forward = partial(convolve, module, planes=changes < 4)
        if changes < 3:
            first.forward = lambda z: convolve_image(first, z)

    def infer(self, image: Tensor, noise: Tensor) -> Iterator[iodine.Step]:
        eager = dict(refinement_inputs=eager_refinement_inputs,
                     mixture_log_likelihood=eager_log_likelihood)
        with nullcontext() if self.closed_form else mock.patch.multiple(kernels, **eager):
            yield from super().infer(image, noise)


def convolve(layer: iodine.Conv, x: Tensor, planes: bool) -> Tensor:
    """The layer with an ELU that is not in place; planes: without a thought of memory layout."""
    x = x.contiguous(memory_format=torch.contiguous_format if planes else layer.layout(x))
    x = nn.Conv2d.forward(layer, x)
    return F.elu(x) if layer.activation == "elu" else x


def convolve_image(layer: iodine.BroadcastConv, z: Tensor) -> Tensor:
    """What BroadcastConv computes, as nn.Conv2d over an image of z and coordinates."""
    coordinates = layer.coordinates.expand(len(z), -1, -1, -1)  # (N, 2, H, W)
    image = z[:, :, None, None].expand(-1, -1, *coordinates.shape[2:])  # (N, D, H, W)
    return convolve(layer, torch.cat([image, coordinates], 1), planes=True)  # (N, O, H, W)


class TrainingStep:
    """A training step as the models' `train` takes it, of always the same scenes and noise."""

    def __init__(self, model: nn.Module, inputs: Sequence[Tensor], precision: str, backend: str):
        self.model, self.inputs, self.backend = model, inputs, backend
        self.parameters = list(model.parameters())
        self.optimizer = torch.optim.Adam(self.parameters, lr=1e-5, fused=True)
        self.amp = partial(torch.autocast, inputs[0].device.type, torch.bfloat16,
                           enabled=precision == "bfloat16")

    def backward(self, *inputs: Tensor) -> Tensor:
        """The loss; its gradient is then in the parameters."""
        self.optimizer.zero_grad()
        with kernels.use(self.backend):
            with self.amp():
                loss = self.model.loss(*(inputs or self.inputs))["loss"]
            loss.backward()
        return loss.detach()

    @torch.no_grad()
    def forward(self, *inputs: Tensor) -> Tensor:
        """The reconstruction (B, C, H, W) after the last step of inference, as in evaluation."""
        with kernels.use(self.backend), self.amp():
            *_, last = self.model.infer(*(inputs or self.inputs))
            return iodine.reconstruct(last.decoded)[0]

    def loss_gradient(self) -> list[Tensor]:
        """Loss (1,) and gradient of all parameters (P,) of the first two images."""
        loss = self.backward(*(tensor[:2] for tensor in self.inputs))
        gradients = [p.grad.flatten() for p in self.parameters if p.grad is not None]
        return [loss[None], torch.cat(gradients)]

    def values(self) -> list[Tensor]:
        """The same, and their reconstruction (2, C, H, W)."""
        return [*self.loss_gradient(), self.forward(*(tensor[:2] for tensor in self.inputs))]

    def __call__(self) -> None:
        self.backward()
        nn.utils.clip_grad_norm_(self.parameters, self.model.config.clip)
        self.optimizer.step()


def make_step(config: iodine.Config, inputs: Sequence[Tensor], variant: Variant) -> TrainingStep:
    torch.manual_seed(config.seed)
    image, (changes, precision) = inputs[0], variant
    ported = changes < OURS
    model = PortStyle(config, image, changes) if ported else iodine.IODINE(config, *image.shape[1:])
    return TrainingStep(model.to(image), inputs, precision, ("torch", "triton")[changes > OURS])


class StepProcess:
    """A TrainingStep on the CPU in a process of its own, with an allocator and a memory peak."""

    def __init__(self, *arguments: Any):
        self.process = ProcessPoolExecutor(
            1, multiprocessing.get_context("spawn"), prepare_process, arguments
        )
        self.first_mb = self.process.submit(memory_so_far, torch.device("cpu"))

    def __call__(self, method: str = "__call__") -> None:
        self.process.submit(take_step, method).result()

    def forward(self) -> None:
        self("forward")

    def backward(self) -> None:
        self("backward")

    def memory(self) -> dict[str, float]:
        peak = self.process.submit(memory_so_far, torch.device("cpu")).result()
        return dict(first_mb=self.first_mb.result(), peak_mb=peak)


def prepare_process(make: Callable[[], TrainingStep], config: Any, threads: int) -> None:
    """In the process: what `take_step` will run; no config: with the allocator as it comes."""
    global _step
    if threads:
        torch.set_num_threads(threads)
    if config is not None:
        runs.set_up(config)  # from here on the C library keeps the memory that is freed
    _step = make()


def take_step(method: str) -> None:
    getattr(_step, method)()


def workload(part: str, batch: int) -> tuple[iodine.Config, list[Tensor]]:
    """Config, and images (B, C, H, W) and noise (B, T, K, D), of a part."""
    clevr = dict(  # appendix C.1
        num_slots=7, latent_size=64, decoder_channels=(64,) * 4, decoder_kernel=3,
        refinement_channels=(64,) * 4, refinement_kernel=3, refinement_stride=2,
        mlp_sizes=(256,), lstm_size=256,
    )  # fmt: skip
    config = iodine.make_config("tetrominoes", **(clevr if part == "clevr" else {}))
    draw = torch.Generator().manual_seed(0)
    shape = batch, config.num_steps, config.num_slots, config.latent_size
    image = data.make("tetrominoes").batch(0, batch).image
    if part == "clevr":
        image = torch.rand(batch, 3, 128, 128, generator=draw)
    return config, [image, torch.randn(shape, generator=draw)]


def benchmark_steps(part: str, session: Session) -> bool:
    """Prints and writes step.* or clevr.*; True where everything was right."""
    options, device, info = session
    small = 32 if device.type == "cuda" else 8 if part == "step" else 1
    config, inputs = workload(part, options.batch or small)
    config.device, inputs = str(device), [tensor.to(device) for tensor in inputs]
    ours = list(range(OURS, OURS + len(backends(device))))
    useless = 1 if device.type == "cuda" else None if iodine.AVX512 else 4
    made = [*(n for n in range(OURS) if n != useless), *ours] if part == "step" else [0, *ours]
    dtypes = options.dtypes or ("float32", "bfloat16")[: 1 + fast_bfloat16(device)]
    variants = [Variant(n, d) for d in dtypes for n in (made if d == "float32" else [0, *ours])]
    height, width = inputs[0].shape[2:]
    setting = (f"{height} x {width}, batch {len(inputs[0])}, T {config.num_steps}, "
               f"K {config.num_slots}, latent {config.latent_size}")
    report = Report(part, STEP_COLUMNS, info)
    print(setting)
    truth = make_step(config, [tensor.double() for tensor in inputs], Variant(OURS)).loss_gradient()
    steps = {v: make_step(config, inputs, v) for v in variants}
    rows = {v: check(step.loss_gradient, truth, STEP_TOLERANCE[v.precision])
            for v, step in steps.items()}
    on_cpu = device.type == "cpu"
    if on_cpu:  # all in the same memory: what one frees, another would find
        steps = {v: StepProcess(partial(make_step, config, inputs, v),
                                config if v.changes else None, options.threads)
                 for v, row in rows.items() if "wrong" not in row}
    timed = time_right(rows, steps, options.repeats or 5, device)
    eager = above = rows[variants[0]].get("ms")
    for v, row in rows.items():
        name = CHANGES[v.changes]
        if v in timed:
            bases = {"vs eager": eager, "vs above": above if v.changes else eager}
            row |= {key: ms / row["ms"] for key, ms in bases.items() if ms}
            report.bar("", f"{name}\n{v.precision}", "step", row["ms"], row["p20"], row["p80"])
            row |= steps[v].memory() if on_cpu else dict(peak_mb=peak_allocated(steps[v], device))
        above = row.get("ms")
        report.add(dict(variant=name, precision=v.precision, setting=setting, **row))
    return report.write(options.out, f"One training step of IODINE, {setting}", MILLISECONDS)


def fast_bfloat16(device: torch.device) -> bool:
    """Whether the device has bfloat16; a CPU without it needs ten times as long as in float32."""
    if device.type == "cuda":
        return True
    with suppress(AttributeError, RuntimeError):
        if torch.ops.mkldnn._is_mkldnn_bf16_supported():
            return True
    print("this CPU only emulates bfloat16, slowly: --dtypes float32 bfloat16 times it anyway")
    return False


def benchmark_presets(session: Session) -> bool:
    """Prints and writes presets.*: training steps, and the drawing of their scenes and noise."""
    options, device, info = session
    report = Report("presets", PRESET_COLUMNS, info)
    for module, noise in MODELS.items():
        name = module.__name__
        settings = backends(device) if hasattr(module, "kernels") else backends(device)[:1]
        for backend, preset in product(settings, module.PRESETS):
            config = module.make_config(preset)
            small = 8 if device.type == "cpu" and preset != "quick" else config.batch_size
            config.batch_size = options.batch or small
            scenes = data.make(config.dataset, device=device)
            model = module.build(config, scenes)
            index = torch.arange(config.batch_size, device=device)

            def draw(scenes=scenes, model=model, index=index, noise=noise) -> list[Tensor]:
                index += len(index)  # new scenes every time
                return [scenes.scenes(index).image, *noise(model, scenes, index)]

            step = TrainingStep(model, draw(), config.precision, backend)
            times = interleave(dict(step=step, data=draw), options.repeats or 5, device)
            row = times["step"] | {f"data_{k}": value for k, value in times["data"].items()}
            share = row["data_ms"] / (row["data_ms"] + row["ms"])
            report.add(dict(model=name, preset=preset, kernels=backend, batch=config.batch_size,
                            **row, data_share=share, ops_share=ops_share(step, device)))
            for series, t in (f"step, {backend} kernels", times["step"]), ("data", times["data"]):
                report.bar("", f"{name} {preset}\nbatch {config.batch_size}", series, *t.values())
    return report.write(options.out, "A training step of every preset", MILLISECONDS)


def ops_share(step: Callable, device: torch.device) -> float:
    """The share of a training step that the mixture and the refinement inputs take (profiled)."""
    activity = ProfilerActivity.CUDA if device.type == "cuda" else ProfilerActivity.CPU
    with profile(activities={ProfilerActivity.CPU, activity}) as record:
        step()
    kind = "device" if device.type == "cuda" else "cpu"
    events, ours = record.key_averages(), 0.0
    for event in events:
        if re.fullmatch(r"_(RefinementInputs|LogLikelihood)(Backward)?|"
                        r"slot_kernels::(refinement_inputs|mixture)\w*", event.key):
            ours += getattr(event, f"{kind}_time_total")
    return ours / sum(getattr(event, f"self_{kind}_time_total") for event in events)


# -- one model beside another ----------------------------------------------------------------------


class Rival(NamedTuple):
    """A row of `compare`."""

    model: str
    steps: str  # of inference: T decodes, or I refinements
    build: Callable  # of the model's file
    config: Any
    noise: Tensor  # (B, ..., K, D), whose length gives the steps


def rivals(batch: int) -> list[Rival]:
    """CLEVR6's sizes in each paper; the first is what the others are held against."""
    config, (_, noise) = workload("clevr", batch)
    made = [Rival("IODINE", f"T = {config.num_steps}", iodine.build, config, noise)]
    config = efficient_morl.Config(**efficient_morl.CLEVR6)
    for steps in range(4):
        shape = batch, 2 * config.num_layers + steps, config.num_slots, config.latent_size
        noise = torch.randn(shape, generator=torch.Generator().manual_seed(0))
        made.append(Rival("EfficientMORL", f"I = {steps}", efficient_morl.build, config, noise))
    return made


def make_rival(rival: Rival, image: Tensor, backend: str = "auto") -> TrainingStep:
    """For images (B, C, H, W), in their number format and on their device."""
    _, channels, height, width = image.shape
    scenes = SimpleNamespace(num_channels=channels, height=height, width=width, device=image.device)
    model = rival.build(rival.config, scenes).to(image.dtype)
    return TrainingStep(model, [image, rival.noise.to(image)], "float32", backend)


def benchmark_compare(session: Session) -> bool:
    """Prints and writes compare.*; True where everything was right."""
    options, device, info = session
    on_cpu = device.type == "cpu"
    compared = rivals(options.batch or (1 if on_cpu else 4))  # 4: the paper's
    batch, _, slots, latent = compared[0].noise.shape
    setting = f"batch {batch}, K {slots}, latent {latent}"
    report = Report("compare", COMPARE_COLUMNS, info)
    print(setting)
    for side in PIXELS:
        draw = torch.Generator().manual_seed(0)
        image = torch.rand(batch, 3, side, side, generator=draw).to(device)
        rows, steps = [], {}
        for i, rival in enumerate(compared):
            rival.config.device = str(device)
            truth, step = make_rival(rival, image.double(), "torch"), make_rival(rival, image)
            rows.append(check(step.values, truth.values(), STEP_TOLERANCE["float32"]))
            if "wrong" not in rows[i]:
                make = partial(make_rival, rival, image)
                steps[i] = StepProcess(make, rival.config, options.threads) if on_cpu else step
        calls = {(i, p): getattr(steps[i], p) for i, p in product(steps, PASSES)}
        times = interleave(calls, options.repeats or (3 if on_cpu else 5), device)
        for i, (rival, row) in enumerate(zip(compared, rows, strict=True)):
            if i in steps:
                for p in PASSES:
                    row |= {f"{p}_{key}": value for key, value in times[i, p].items()}
                if on_cpu:
                    memory = steps[i].memory()
                    row["peak_mb"] = memory["peak_mb"] - memory["first_mb"]
                else:
                    row["peak_mb"] = peak_allocated(steps[i].backward, device)
                row |= {f"vs IODINE {key}": rows[0][key] / row[key]
                        for key in COMPARED if key in rows[0]}
                for key, panel in COMPARED.items():
                    ends = (row[key.replace("_ms", end)] for end in ("_p20", "_p80"))  # MB: itself
                    report.bar(panel, side, f"{rival.model}, {rival.steps}", row[key], *ends)
            report.add(dict(model=rival.model, steps=rival.steps, pixels=side, batch=batch, **row))
    title = f"One pass of IODINE and of EfficientMORL, {setting}"
    return report.write(options.out, f"{title} (vertical: 20th to 80th percentile)",
                        "pixels a side", lines=True)


# -- tables and charts -----------------------------------------------------------------------------


class Column(NamedTuple):
    key: str
    title: str  # without one: text, to the left
    width: int
    form: str = ".4g"

    def show(self, row: dict[str, Any]) -> str:
        value = row.get(self.key, "")
        text = format(value, self.form) if isinstance(value, float) else str(value)
        return text.rjust(self.width) if self.title else text.ljust(self.width + 1)


TIMES = [Column("ms", "ms", 7), Column("p20", "p20", 8), Column("p80", "p80", 8)]
OP_COLUMNS = [
    Column("implementation", "", 14), *TIMES, Column("graph_ms", "graph", 8),
    Column("vs eager autograd", "eager", 6, ".3g"), Column("vs reference", "ref.", 6, ".3g"),
    Column("vs torch.compile", "comp.", 6, ".3g"), Column("vs torch", "torch", 6, ".3g"),
    Column("gb_per_s", "GB/s", 7, ".1f"),
    Column("copy_share", "copy", 6, ".0%"), Column("peak_mb", "MB", 8, ".1f"),
    Column("error", "error", 7, ".0e"),
]  # fmt: skip
STEP_COLUMNS = [
    Column("variant", "", 26), Column("precision", "", 9), *TIMES,
    Column("vs eager", "eager x", 8, ".2f"), Column("vs above", "above x", 8, ".2f"),
    Column("first_mb", "MB first", 9, ".0f"), Column("peak_mb", "MB peak", 8, ".0f"),
    Column("error", "error", 7, ".0e"),
]  # fmt: skip
COMPARE_COLUMNS = [
    Column("model", "", 13), Column("steps", "", 5), Column("pixels", "", 3),
    Column("forward_ms", "fwd ms", 7), Column("forward_p20", "p20", 7),
    Column("forward_p80", "p80", 7), Column("backward_ms", "both ms", 8),
    Column("backward_p20", "p20", 7), Column("backward_p80", "p80", 7),
    Column("vs IODINE forward_ms", "fwd x", 6, ".2f"),
    Column("vs IODINE backward_ms", "both x", 7, ".2f"), Column("peak_mb", "MB", 6, ".0f"),
    Column("vs IODINE peak_mb", "MB x", 6, ".2f"), Column("error", "error", 6, ".0e"),
]  # fmt: skip
PRESET_COLUMNS = [
    Column("model", "", 14), Column("preset", "", 25), Column("kernels", "", 7), *TIMES,
    Column("batch", "batch", 7), Column("data_ms", "data ms", 9),
    Column("data_share", "share", 7, ".1%"), Column("ops_share", "ops", 7, ".1%"),
]  # fmt: skip
MILLISECONDS = "milliseconds (thin line: 20th to 80th percentile)"


class Report:
    """A table, printed as its rows come, then written as CSV, JSON and PNG."""

    def __init__(self, name: str, columns: list[Column], info: dict[str, Any]):
        self.name, self.columns, self.info, self.rows = name, columns, info, []
        self.panels: dict[str, dict] = {}  # {panel: {group: {series: (value, (low, high) or ())}}}
        versions = ", ".join(f"{name} {version}" for name, version in info["versions"].items())
        self.note = f"{info['device']}, {versions}, {info['date']}\n{info['command']}"
        print("\n" + "".join(c.show({c.key: c.title}) for c in columns).rstrip(), flush=True)

    def add(self, row: dict[str, Any]) -> None:
        self.rows.append(row)
        line = "".join(c.show(row) for c in self.columns).rstrip()
        if "wrong" in row:
            line = "".join(c.show(row) for c in self.columns if not c.title)
            line = f"\033[31m{line} WRONG, not timed: {row['wrong']}\033[0m"
        print(line if sys.stdout.isatty() else re.sub(r"\033\[\d*m", "", line), flush=True)

    def bar(self, panel: str, group: str, series: str, value: float, *ends: float) -> None:
        self.panels.setdefault(panel, {}).setdefault(group, {})[series] = value, ends

    def series(self) -> list[str]:
        groups = (bars for panel in self.panels.values() for bars in panel.values())
        return list(dict.fromkeys(series for bars in groups for series in bars))

    def write(
        self, out: str, title: str, axis: str, start: float = 0, lines: bool = False
    ) -> bool:
        """The three files; True where no row is wrong."""
        path = Path(out) / self.name
        path.parent.mkdir(parents=True, exist_ok=True)
        runs.write(path.with_suffix(".json"), dict(**self.info, rows=self.rows))
        with open(path.with_suffix(".csv"), "w", newline="") as file:
            file.writelines(f"# {key}: {value}\n" for key, value in self.info.items())
            table = csv.DictWriter(file, dict.fromkeys(key for row in self.rows for key in row))
            table.writeheader()
            table.writerows(self.rows)
        if self.panels:
            figure = self.draw_lines(axis) if lines else self.draw_bars(axis, start)
            figure.suptitle(title, fontsize=11)
            figure.supxlabel(self.note, fontsize=6.5, color=figures.FAINT)
            figure.savefig(path.with_suffix(".png"), metadata={"Description": self.note})
        print(f"wrote {path}.csv, .json and .png")
        return not any("wrong" in row for row in self.rows)

    def draw_lines(self, axis: str) -> Figure:
        """Panels side by side: over the groups, which are numbers, a line per series, from 0.

        The first series is orange, the others are the darker the later they come.
        """
        figure = Figure((10, 3.6), dpi=150, layout="constrained")
        names, grid = self.series(), figure.subplots(1, len(self.panels), squeeze=False)[0]
        blues = colormaps["Blues"](np.linspace(0.4, 1, len(names) - 1))
        for axes, (panel, groups) in zip(grid, self.panels.items(), strict=True):
            for name, color in zip(names, [figures.PALETTE[0], *blues], strict=True):
                points = [(x, *bars[name]) for x, bars in groups.items() if name in bars]
                x, y, ends = zip(*points, strict=True)
                axes.plot(x, y, "o-", color=color, markersize=3.5, label=name)
                axes.vlines(x, *zip(*ends, strict=True), color=color)
            axes.set_title(panel, fontsize=9)
            axes.set_xlabel(axis, fontsize=8)
            axes.set_xticks(list(groups))
            axes.tick_params(labelsize=8)
            axes.set_ylim(0)
            axes.grid(axis="y", color=figures.GRID)
            axes.spines[["top", "right"]].set_visible(False)
        handles, labels = grid[0].get_legend_handles_labels()
        order = [0, *range(len(names) - 1, 0, -1)]  # as the lines lie
        figure.legend([handles[i] for i in order], [labels[i] for i in order],
                      loc="outside right center", frameon=False, fontsize=8)
        return figure

    def draw_bars(self, axis: str, start: float) -> Figure:
        """Horizontal bars; `start` 1: from 1, on a logarithmic axis, what is slower to the left."""
        colors = dict(zip(self.series(), figures.PALETTE, strict=False))
        lines = max(sum(len(b) + 1 for b in groups.values()) for groups in self.panels.values())
        columns = min(3, len(self.panels))
        rows = math.ceil(len(self.panels) / columns)
        size = max(7, 4.5 * columns), 1.2 + (0.4 + 0.17 * lines) * rows
        figure = Figure(size, dpi=150, layout="constrained")
        grid = figure.subplots(rows, columns, squeeze=False).ravel()
        for axes in grid[len(self.panels) :]:
            axes.set_axis_off()
        for axes, (panel, groups) in zip(grid, self.panels.items(), strict=False):
            middles, y = [], 0.0
            for bars in groups.values():
                middles.append(y + (len(bars) - 1) / 2)
                for series, (value, ends) in bars.items():
                    axes.barh(y, value - start, left=start, height=0.9, color=colors[series])
                    axes.hlines([y] * len(ends[1:]), *(ends or ([], [])), color=figures.INK)
                    axes.text(max(value, start, *ends), y, f" {value:.3g}", va="center", fontsize=7)
                    y += 1
                y += 1
            axes.set_yticks(middles, list(groups), fontsize=7)
            axes.invert_yaxis()
            axes.set(title=panel, xlabel=axis)
            if start:
                axes.set_xscale("log")
                axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
                axes.xaxis.set_major_formatter("{x:g}")
                axes.xaxis.set_minor_formatter(NullFormatter())
            axes.spines[["top", "right"]].set_visible(False)
            axes.margins(x=0.15, y=0.01)
            axes.axvline(start, color=figures.INK, linewidth=0.8)
        patches = [Patch(color=color, label=name) for name, color in colors.items()]
        figure.legend(handles=patches, loc="outside upper right", ncols=len(patches), fontsize=8)
        return figure


# -- command line ----------------------------------------------------------------------------------


def benchmark(options: Options, arguments: Sequence[str]) -> bool:
    """All that is asked for; True where everything was right."""
    for size in options.sizes:
        require(size in SIZES, f"unknown size {size!r}: choose from {', '.join(SIZES)}")
    for name in ("batch", "repeats", "threads"):
        require(getattr(options, name) >= 0, f"--{name} must be 0 or more")
    config = iodine.make_config(device=options.device)
    if options.threads:
        torch.set_num_threads(options.threads)
    device = runs.set_up(config)
    run = runs.evaluation("", config, device)
    info = {key: run[key] for key in ("device", "versions", "commit", "date")}
    info["command"] = shlex.join(["python", "-m", "kernels.benchmark", *arguments])
    with suppress(importlib.metadata.PackageNotFoundError):
        info["versions"]["triton"] = importlib.metadata.version("triton")
    slug = re.sub(r"[^a-z0-9]+", "-", info["device"].lower().replace("(s)", "s")).strip("-")
    options.out = options.out or str(Path(__file__).parent / "results" / slug)
    print(f"{info['device']}, torch {torch.__version__}")
    if device.type != "cuda":
        print("no CUDA device in use: the torch paths are timed, at batch sizes for a CPU")
    session = Session(options, device, info)
    if options.models is None:
        return benchmark_ops(session)
    parts = dict(compare=benchmark_compare, presets=benchmark_presets)
    right = [parts.get(part, partial(benchmark_steps, part))(session)
             for part in options.models or get_args(Part)]
    return all(right)


def main(arguments: Sequence[str]) -> int:
    """Exit status: 0; 1 where something was wrong; 2 for options that cannot be; 130, Ctrl-C."""
    try:
        options = tyro.cli(Options, prog="python -m kernels.benchmark", args=arguments)
        return 0 if benchmark(options, arguments) else 1
    except (UserError, OSError) as error:
        print(f"kernels.benchmark: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
