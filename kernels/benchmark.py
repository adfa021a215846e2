"""What the operations, and training steps of the models, cost on this machine.

    python -m kernels.benchmark                             # every operation at five sizes
    python -m kernels.benchmark --sizes tetrominoes clevr6  # at two of them
    python -m kernels.benchmark --models step compare scale # tables of models; no name: all

Correctness comes first: everything is compared, at the very shape, with plain torch in float64
(error: the largest deviation over the largest value, of every output and gradient; of models, of
loss and gradient). What is wrong gets a red row without a number, and makes the exit status 1.

Times are milliseconds, medians and 20th and 80th percentile of candidates that take turns. On CUDA:
between two events around the call, after a pass over a buffer larger than the cache. On a CPU: CPU
time of all threads, so that other programs do not count. MB: the peak of what a call allocates.

Operations: "eager" is tests/baselines.py, as ports of the models write them; "fallback" and
"triton" are the public operation, "compiled" is the fallback under torch.compile. GB/s counts what
a perfect kernel moves: inputs (backward: twice), cotangents, outputs and gradients; "copy" is its
share of what copying a large tensor reached here. Without a GPU a table says what the compiler
makes of each kernel: "fused MB" counts each argument once, "bound us" is the time at the card's
nominal bandwidth, "eager MB" is of eager torch. (masks.py says why masks move more.)

Models: ms is a step (loss, gradient, Adam), "fwd ms" the loss alone. `compare` is the timing figure
of EfficientMORL's paper (Emami et al. 2021): models with the sizes of CLEVR6 in their own papers,
but Slot Attention, which doubles 8 x 8 pixels there, with the decoder of the others. `scale` is
appendix A.2 of IODINE's paper: its Tetris model with K slots and T decodes; both times of inference
are of one call. x: first row over this row.

Axes: B batch, K slots, T decodes, D latent, O channels, H W image.
"""

import csv
import datetime
import math
import os
import platform
import re
import shlex
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, partial
from itertools import product
from pathlib import Path
from types import ModuleType
from typing import Any, Literal, get_args

import numpy as np
import torch
import tyro
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

import air
import data
import efficient_morl
import iodine
import kernels
import mvae
import slot_attention
from data import checkpoints, figures, processes, runs

sys.path.append(str(processes.ROOT / "tests"))
import baselines
import compile_kernels

SIZES = {  # name: B on CUDA, B on a CPU, K, H = W; D, O and kernel of the decoder's first layer
    "quick": (64, 16, 5, 16, 16, 32, 1),
    "tetrominoes": (32, 32, 4, 35, 32, 32, 5),
    "multi_dsprites": (32, 8, 6, 64, 16, 32, 5),
    "clevr6": (32, 2, 7, 128, 64, 64, 3),
    "clevr": (32, 1, 11, 128, 64, 64, 3),
}
CARD, TARGET, NOMINAL = "H100 SXM", 90, 3.35e12  # compute capability; bytes per second
OP_TOLERANCE, STEP_TOLERANCE = 1e-4, 1e-3
MODELS = {  # what the loss takes after the image: (model, scenes, index of the scenes) -> tensors
    iodine: lambda model, *at: [model.noise(*at)],
    efficient_morl: lambda model, *at: [model.noise(*at, model.config.num_steps)],
    slot_attention: lambda model, *at: [model.noise(*at)],
    air: lambda model, *at: model.noise(*at),
    mvae: lambda model, *at: [model.noise(*at)],
}
PIXELS = 64, 96, 128  # a side, of the images in `compare`
DECODES, SLOTS = (2, 4, 8, 16), (2, 4, 8)  # T and K in `scale`
OP_COLUMNS = ("implementation", "ms", "p20", "p80", "x eager", "GB/s", "copy", "MB", "error")
BOUND_COLUMNS = ("kernel", "regs", "spilled", "shared", "fused MB", "eager MB", "bound us")
MODEL_COLUMNS = ("setting", "fwd ms", "ms", "MB", "x fwd ms", "x ms", "x MB", "error")
COMPARED = ("fwd ms", "ms", "MB")
Part = Literal["step", "compare", "scale"]
Size = Literal[tuple(SIZES)]
Preset = Literal[tuple({preset: 0 for module in MODELS for preset in module.PRESETS})]


@dataclass
class Options:
    """Times the operations or, with --models, training steps and models of slots side by side."""

    models: tuple[Part, ...] | None = None  # tables; no name: all
    sizes: tuple[Size, ...] = tuple(SIZES)  # of the operations
    presets: tuple[Preset, ...] = ()  # of the models in `step`; none: all
    batch: int = 0  # B; 0: every size and preset has its own (on a CPU: small ones)
    repeats: int = 0  # timed calls; 0: 30 of an operation, 5 of a model
    device: str = "auto"  # auto (CUDA where there is one), cpu, cuda, cuda:1, ...
    out: str = ""  # folder to write; empty: kernels/results/<device>


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
                begin = time.process_time()
                call()
                elapsed = 1e3 * (time.process_time() - begin)
            if repeat >= 0:
                times[name].append(elapsed)
    return {name: dict(zip(("ms", "p20", "p80"), np.quantile(t, (0.5, 0.2, 0.8)), strict=True))
            for name, t in times.items()}


def check(values: Callable[[], list], truth: Callable[[], list], tolerance: float) -> dict:
    """`error`, and where that is too large (or there are no values) `wrong`, which says why."""
    try:
        pairs = zip(values(), truth(), strict=True)
        errors = [(v.double() - t).abs().max() / t.abs().max() for v, t in pairs]
    except Exception as error:  # one that breaks must not keep the others from us
        return dict(wrong=f"{type(error).__name__}: {error}".splitlines()[0])
    error = torch.stack(errors).nan_to_num(math.inf).max().item()
    wrong = dict(wrong=f"error {error:.0e}, at most {tolerance:.0e} allowed")
    return dict(error=error, **(wrong if error > tolerance else {}))


def copy_bandwidth(device: torch.device) -> float:
    """GB/s of copying a large tensor, bytes read and bytes written."""
    source = torch.ones(1 << (28 if device.type == "cuda" else 24), device=device)
    target = torch.empty_like(source)
    times = interleave({"copy": lambda: target.copy_(source)}, 10, device)["copy"]
    return baselines.num_bytes([source, target]) / times["ms"] / 1e6


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


def move(values: Sequence[Any], to: Any) -> list[Any]:
    return [value.to(to) if isinstance(value, Tensor) else value for value in values]


def with_backend(backend: str, function: Callable, *arguments: Any) -> Any:
    with kernels.use(backend):
        return function(*arguments)


# -- the operations --------------------------------------------------------------------------------


def time_op(
    op: str, inputs: list[Any], backward: bool, options: Options, device: torch.device
) -> dict[str, dict[str, Any]]:
    """The row of every implementation."""
    public, eager = getattr(kernels, op), getattr(baselines, op)
    functions = {"eager": partial(with_backend, "torch", eager),
                 "fallback": partial(with_backend, "torch", public)}
    if device.type == "cuda":
        torch.compiler.reset()  # else it gives up after a few shapes
        functions["compiled"] = partial(with_backend, "torch", torch.compile(public, dynamic=False))
    if kernels.backend(device) == "triton" and op != "broadcast_conv":
        functions["triton"] = partial(with_backend, "triton", public)
    calls = {name: baselines.make_call(op, f, inputs, backward) for name, f in functions.items()}
    exact = cache(lambda: baselines.make_call(op, eager, move(inputs, torch.float64), backward)())
    rows = {name: check(call, exact, OP_TOLERANCE) for name, call in calls.items()}
    right = {name: calls[name] for name, row in rows.items() if "wrong" not in row}
    for name, times in interleave(right, options.repeats or 30, device).items():
        traffic = baselines.perfect_bytes(inputs, calls[name](), backward)
        rows[name] |= times | {"GB/s": traffic / times["ms"] / 1e6,
                               "MB": peak_allocated(calls[name], device)}
        if "ms" in rows["eager"]:
            rows[name]["x eager"] = rows["eager"]["ms"] / times["ms"]
    return rows


def benchmark_ops(options: Options, device: torch.device, info: dict[str, Any]) -> bool:
    """Prints and writes ops.*; True where everything was right."""
    on_gpu, bandwidth, bars = device.type == "cuda", copy_bandwidth(device), {}
    report = Report("ops", OP_COLUMNS, options.out, info | dict(copy_gb_per_s=bandwidth))
    for size, op, backward in product(options.sizes, baselines.GRADIENTS, (False, True)):
        if backward and op == "leave_one_out":
            continue  # it has no gradient
        batch = options.batch or SIZES[size][not on_gpu]
        inputs = move(baselines.make_inputs(op, batch, *SIZES[size][2:]), device)
        direction = "forward+backward" if backward else "forward"
        group = dict(op=op, size=size, batch=batch, direction=direction)
        for name, row in time_op(op, inputs, backward, options, device).items():
            if "ms" in row:
                row["copy"] = row["GB/s"] / bandwidth
            report.add(f"{op}, {size}, batch {batch}, {direction}",
                       group | dict(implementation=name) | row)
            if name != "eager" and (backward or op == "leave_one_out"):
                label = f"{op}, {size}, {name}".replace("_", " ")  # lines break at spaces
                bars[label] = row.get("x eager"), None
    figures.bars(report.chart, bars, report.title,
                 "times as fast as eager, forward and backward", log=True)
    return report.write() & (on_gpu or not_measured(options, info))


def not_measured(options: Options, info: dict[str, Any]) -> bool:
    """Prints and writes not_measured.*: the kernels as the compiler sees them, and their bytes."""
    print(f"\nnot measured: the Triton kernels, compiled for sm_{TARGET}; bounds of an {CARD}")
    if "triton" not in info["versions"]:
        print("the package triton is not installed")
        return True
    info = info | dict(card=CARD, bytes_per_second=NOMINAL)
    report = Report("not_measured", BOUND_COLUMNS, options.out, info)
    sizes = {SIZES[size][2:4]: size for size in options.sizes}  # (K, H): name
    cases = [compile_kernels.Case(side, slots) for slots, side in sizes]
    for entry in compile_kernels.compile_in_child({TARGET: cases}):
        op, (side, slots, *_) = entry["operation"], entry["case"]
        if op in baselines.GRADIENTS:
            size, direction, fused = sizes[slots, side], entry["direction"], entry["bytes"]
            batch, shape = compile_kernels.BATCH, SIZES[size][2:]
            _, eager = baselines.bytes_moved(op, batch, *shape, backward=direction == "backward")
            group = dict(op=op, size=size, batch=batch, direction=direction)
            report.add(f"{size}, batch {batch}", group | {
                "kernel": entry["kernel"].removesuffix("_kernel"), "regs": entry["registers"],
                "spilled": entry["spilled"], "shared": entry["shared"],
                "fused MB": fused / 1e6, "eager MB": eager / 1e6, "bound us": 1e6 * fused / NOMINAL,
            })  # fmt: skip
    return report.write()


# -- the models ------------------------------------------------------------------------------------


class Candidate:
    """A model that takes training steps of always the same scenes and noise."""

    def __init__(self, module: ModuleType, config: Any, scenes: data.Scenes, index: Tensor,
                 setting: str = "auto", dtype: torch.dtype = torch.float32):
        self.model = module.build(config, scenes).to(dtype)
        noise = MODELS[module](self.model, scenes, index)
        self.inputs = move([scenes.scenes(index).image, *noise], dtype)
        self.backend = setting if setting in ("triton", "auto") else "torch"
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=1e-6, fused=True)
        for network in self.model.children() if setting == "compiled" else ():
            network.compile(dynamic=False)

    def loss(self) -> Tensor:
        return with_backend(self.backend, self.model.loss, *self.inputs)["loss"]

    def backward(self) -> list[Tensor]:
        """Loss (1,) and gradient of all parameters (P,)."""
        self.optimizer.zero_grad()
        loss = self.loss()
        loss.backward()
        gradients = [p.grad.flatten() for p in self.model.parameters() if p.grad is not None]
        return [loss.detach()[None], torch.cat(gradients)]

    def step(self) -> None:
        self.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()  # so that memory is measured from where it starts


class Inference(Candidate):
    """The same in a test, where nothing is kept for a training step's gradient."""

    def backward(self) -> list[Tensor]:
        return [with_backend(self.backend, self.model.infer, *self.inputs)[-1].decoded]

    loss = step = backward


def presets(options: Options, device: torch.device) -> Iterator[tuple[str, dict]]:
    """Of every preset: plain torch, on CUDA also compiled and with Triton kernels."""
    for module in MODELS:
        for preset in [name for name in module.PRESETS if name in (options.presets or [name])]:
            config = module.make_config(preset, device=str(device))
            most = config.batch_size if device.type == "cuda" or preset == "quick" else 8
            index = torch.arange(options.batch or most, device=device)
            scenes = data.make(config.dataset, device=device)
            triton = kernels.backend(device) == "triton" and hasattr(module, "kernels")
            settings = ["torch", *["compiled"] * (device.type == "cuda"), *["triton"] * triton]
            yield (f"{module.__name__} {preset}, batch {len(index)}",
                   {name: partial(Candidate, module, config, scenes, index, setting=name)
                    for name in settings})


def rivals(options: Options, device: torch.device) -> Iterator[tuple[str, dict]]:
    """Of every size of images: IODINE, EfficientMORL with more and more steps, Slot Attention."""
    first = iodine.make_config(  # Greff et al., appendix C.1
        "tetrominoes", num_slots=7, latent_size=64, decoder_channels=(64,) * 4, decoder_kernel=3,
        refinement_channels=(64,) * 4, refinement_kernel=3, refinement_stride=2,
        mlp_size=256, lstm_size=256, device=str(device))  # fmt: skip
    third = slot_attention.Config(num_slots=7, encoder_channels=(64,) * 4, decoder_kernel=3,
                                  decoder_channels=(64,) * 4, device=str(device))
    made = {f"IODINE, T = {first.num_steps}": (iodine, first)}
    made |= {f"EfficientMORL, I = {i}": (efficient_morl, efficient_morl.Config(
        **efficient_morl.CLEVR6, num_steps=i, device=str(device))) for i in range(4)}
    made[f"Slot Attention, T = {third.num_iterations}"] = slot_attention, third
    index = torch.arange(options.batch or 1 + 3 * (device.type == "cuda"), device=device)
    for side in PIXELS:
        scenes = data.make("solids_48", size=side, device=device)
        yield f"{side} pixels, batch {len(index)}", {
            name: partial(Candidate, *one, scenes, index) for name, one in made.items()}


def grown(options: Options, device: torch.device) -> Iterator[tuple[str, dict]]:
    """Of every number of decodes: IODINE with more and more slots, in training and in a test."""
    index = torch.arange(options.batch or 1 + 3 * (device.type == "cuda"), device=device)
    scenes = data.make("tetrominoes", device=device)
    for steps in DECODES:
        group, kinds = {}, dict(training=Candidate, inference=Inference)
        for slots, kind in product(SLOTS, kinds):
            config = iodine.make_config("tetrominoes", num_slots=slots, num_steps=steps,
                                        update_gain=0.1, device=str(device))  # 1 diverges
            group[f"K = {slots}, {kind}"] = partial(kinds[kind], iodine, config, scenes, index)
        yield f"T = {steps}, batch {len(index)}", group


def benchmark_models(
    part: Part, options: Options, device: torch.device, info: dict[str, Any]
) -> bool:
    """Prints and writes step.*, compare.* or scale.*; True where everything was right."""
    report, groups = Report(part, MODEL_COLUMNS, options.out, info), {}
    candidates, *axis = dict(step=[presets], compare=[rivals, "pixels a side", PIXELS],
                             scale=[grown, "decodes T", DECODES])[part]
    for title, makers in candidates(options, device):
        torch.compiler.reset()  # else it gives up after a few models
        group, rows, calls = {name: make() for name, make in makers.items()}, {}, {}
        for name, own in group.items():
            exact = partial(makers[name], setting="torch", dtype=torch.float64)
            rows[name] = check(own.backward, lambda new=exact: new().backward(), STEP_TOLERANCE)
            if "wrong" not in rows[name]:
                calls |= {(name, "loss"): own.loss, (name, "step"): own.step}
        times = interleave(calls, options.repeats or 5, device)
        for name, row in rows.items():
            if "wrong" not in row:
                row |= times[name, "step"] | {"fwd ms": times[name, "loss"]["ms"],
                                              "MB": peak_allocated(group[name].step, device)}
                first = next(iter(rows.values()))
                row |= {f"x {k}": first[k] / row[k] for k in COMPARED if k in first}
            report.add(title, dict(group=title, setting=name) | row)
            groups.setdefault(name, []).append(row)
    if axis:
        panels = {key: {name: (axis[1], [row.get(key) for row in rows], None)
                        for name, rows in groups.items()} for key in COMPARED}
        figures.curves(report.chart, panels, axis[0], report.title)
    else:
        bars = {f"{r['group']}, {r['setting']}": (r.get("ms"), None) for r in report.rows}
        figures.bars(report.chart, bars, report.title, "milliseconds of a training step", log=True)
    return report.write()


# -- tables and command line -----------------------------------------------------------------------


class Report:
    """A table: printed as its rows come, then written as CSV and JSON."""

    def __init__(self, name: str, columns: tuple[str, ...], out: str, info: dict[str, Any]):
        self.columns, self.info, self.rows, self.heading = columns, info, [], ""
        self.path, self.title = Path(out) / name, f"{name}: {info['device']}, {info['date']}"
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.chart = self.path.with_suffix(".png")

    def add(self, heading: str, row: dict[str, Any]) -> None:
        first, *others = self.columns
        if heading != self.heading:
            print(f"\n{heading}\n{first:28}" + "".join(f"{name:>9}" for name in others))
        self.heading = heading
        self.rows.append(row)
        values = [row.get(name, "") for name in others]
        numbers = [f"{v:.3g}" if isinstance(v, float) and abs(v) < 100 else
                   f"{v:.0f}" if isinstance(v, float) else str(v) for v in values]
        line = f"{row[first]:28}" + "".join(f"{number:>9}" for number in numbers)
        if "wrong" in row:
            line = f"\033[31m{row[first]:28} WRONG, not timed: {row['wrong']}\033[0m"
        print(line if sys.stdout.isatty() else re.sub(r"\033\[\d*m", "", line), flush=True)

    def write(self) -> bool:
        """Both files; True where no row is wrong."""
        checkpoints.write_json(self.path.with_suffix(".json"), dict(**self.info, rows=self.rows))
        with open(self.path.with_suffix(".csv"), "w", newline="") as file:
            file.writelines(f"# {key}: {value}\n" for key, value in self.info.items())
            table = csv.DictWriter(file, dict.fromkeys(key for row in self.rows for key in row))
            table.writeheader()
            table.writerows(self.rows)
        print(f"wrote {self.path}.*")
        return not any("wrong" in row for row in self.rows)


def benchmark(options: Options, arguments: Sequence[str]) -> bool:
    """All that is asked for; True where everything was right."""
    runs.at_least(options, 0, "batch", "repeats")
    runs.require(options.sizes, "--sizes needs a name")
    device = runs.set_up(runs.RunConfig(device=options.device))
    versions = dict(python=platform.python_version(), torch=torch.__version__)
    if triton := kernels.launch.triton:
        versions["triton"] = triton.__version__
    info = dict(device=processes.describe(device), versions=versions, commit=processes.commit(),
                date=datetime.date.today().isoformat(),
                command=shlex.join(["python", "-m", "kernels.benchmark", *arguments]))
    slug = re.sub(r"[^a-z0-9]+", "-", info["device"].lower()).strip("-")
    options.out = options.out or str(Path(__file__).parent / "results" / slug)
    print(f"{info['device']}, torch {torch.__version__}; kernels: {kernels.describe(device)}")
    if options.models is None:
        return benchmark_ops(options, device, info)
    return not [part for part in options.models or get_args(Part)
                if not benchmark_models(part, options, device, info)]


def main(arguments: Sequence[str]) -> int:
    """Exit status: 0; 1 where something was wrong; 2 for options that cannot be; 130, Ctrl-C."""
    try:
        options = tyro.cli(Options, prog="python -m kernels.benchmark", args=arguments)
        return 0 if benchmark(options, arguments) else 1
    except (runs.UserError, OSError) as error:
        print(f"kernels.benchmark: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
