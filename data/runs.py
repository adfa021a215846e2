"""What a training run needs and no model is about: options, the run itself, its log. Its files are
in checkpoints.py, its device, processes and signals in processes.py.

A run can stop at any moment (`kill -9` included) and resumes from its last checkpoint as if it had
never stopped: a checkpoint is written to a temporary file and renamed, all randomness is a function
of seed, step and scene, and lines of metrics.jsonl past the checkpoint are dropped on resume.
"""

import contextlib
import ctypes
import dataclasses
import io
import json
import math
import os
import platform
import shlex
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.distributed as dist
import tyro
from filelock import FileLock
from torch import Tensor, nn
from tqdm import tqdm

from data import checkpoints, processes
from data.checkpoints import UserError, require

CHECKPOINT_SECONDS = 60.0  # between checkpoints
SHOWN = ("loss", "elbo", "kl", "ari_fg", "count_accuracy")  # in the progress line, where measured
RESULTS = processes.ROOT / "notebooks" / "results"
# On resume only these may differ from the checkpoint: they say where and how long, not what.
RUN_CONTROL = {"steps", "minutes", "out", "device", "kernels", "compile", "cuda_graph", "log_every",
               "resume", "eval_only"}


# -- options ---------------------------------------------------------------------------------------


@dataclass
class RunConfig:
    """Options that every model has, with the same names and meaning."""

    preset: str = "quick"  # which settings to start from; every other option overrides one of them
    seed: int = 0  # of parameters, scenes and noise
    steps: int = 1_000_000  # stop after this many training steps, counted from the start
    minutes: float = 0.0  # or after this much training time, counted from the start; 0: no limit
    batch_size: int = 32  # B, scenes per step, over all processes
    lr: float = 3e-4  # Adam's learning rate
    device: str = "auto"  # auto (CUDA where there is one), cpu, cuda, cuda:1, ...
    precision: Literal["float32", "tf32", "bfloat16"] = "float32"  # of matmuls and convolutions
    compile: bool = False  # torch.compile the networks
    cuda_graph: bool = False  # replay forward and backward as one CUDA graph (CUDA only)
    kernels: Literal["auto", "triton", "torch"] = "auto"  # who computes the per-pixel operations
    out: str = ""  # folder to write; empty: runs/<model>-<preset>-<seed>
    init: str = ""  # begin with the weights of this checkpoint or run's folder, not random ones
    resume: str = ""  # resume from this checkpoint.pt, or from the folder that holds it
    eval_only: bool = False  # with --resume: evaluate and draw the figures, no training
    log_every: int = 50  # steps between lines of metrics.jsonl

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            setattr(self, field.name, plain(getattr(self, field.name)))


def plain(value: Any) -> Any:
    """NumPy's numbers, paths and lists as what a checkpoint can hold; ~ is the home folder."""
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, list | tuple):
        return tuple(map(plain, value))
    return os.path.expanduser(value) if isinstance(value, str | os.PathLike) else value


def option(name: str) -> str:
    """The option as it is typed: batch_size -> --batch-size."""
    return "--" + name.replace("_", "-")


def at_least(config: Any, least: float, *names: str) -> None:
    """UserError that names the first of these fields that is or holds no number from `least` on."""
    for name in names:
        value = getattr(config, name)
        require(np.size(value) and np.min(value) >= least and np.isfinite(value).all(),
                f"{option(name)} must be at least {least}, not {value}")


def positive(config: Any, *names: str) -> None:
    """UserError that names the first of these fields that is not a number above 0."""
    for name in names:
        value = getattr(config, name)
        require(0 < value < math.inf, f"{option(name)} must be larger than 0, not {value}")


def check(config: RunConfig) -> None:
    """UserError where the options of RunConfig cannot be, or a convolution's kernel is even."""
    at_least(config, 1, "steps", "batch_size", "log_every")
    at_least(config, 0, "minutes")
    positive(config, "lr")
    require(-(2**63) <= config.seed < 2**63, f"--seed must fit into 64 bits, not {config.seed}")
    require(config.resume or not config.eval_only, "--eval-only needs --resume CHECKPOINT")
    for name, value in vars(config).items():
        require(not name.endswith("_kernel") or value % 2, f"{option(name)} must be odd")
    count = processes.world_size()
    require(config.batch_size % count == 0,
            f"--batch-size {config.batch_size} does not divide among {count} processes")
    device = processes.pick_device(config.device)
    require(not config.cuda_graph or device.type == "cuda",
            f"--cuda-graph needs a CUDA device, and this run is on {device}")


def make_config(config_class: type, presets: dict[str, dict], preset: str, **overrides: Any) -> Any:
    """A preset's config; UserError for an unknown preset."""
    require(preset in presets, f"unknown preset {preset!r}: choose from {', '.join(presets)}")
    return config_class(**dict(preset=preset) | presets[preset] | overrides)


def standing(model_name: str, preset: str) -> str:
    """The preset's name, and whether a result of it is committed."""
    measured = any(RESULTS.glob(f"{model_name}-{preset}-*.json"))
    return preset + " (no result in this repository yet)" * (not measured)


def parse(model_name: str, config_class: type, presets: dict[str, dict], argv: list[str]) -> Any:
    """The command line as a `config_class`; `--preset` or `--resume` says what it overrides."""
    first, _ = tyro.cli(RunConfig, args=argv, add_help=False, return_unknown_args=True)
    if first.resume:
        content = checkpoints.load(first.resume, model_name)
        saved = checkpoints.saved_config(config_class, content, first.resume)
        default = dataclasses.replace(saved, out="", resume="", eval_only=False)
    else:
        default = make_config(config_class, presets, first.preset)
    about = "; ".join(standing(model_name, name) for name in presets)
    config = tyro.cli(config_class, args=argv, default=default, description=f"Presets: {about}.")
    if first.resume:
        for name, value in asdict(config).items():
            was = getattr(saved, name)
            require(name in RUN_CONTROL or value == was,
                    f"{option(name)} {value}: trained with {was!r}; only a new run can change it")
        require("optimizer" in content or config.eval_only,
                f"{first.resume}: weights alone; evaluate them with --eval-only, or train anew")
    return config


def typed(model_name: str, config: RunConfig, default: RunConfig) -> str:
    """The command that makes this config from the preset's `default`, as one types it."""
    words = ["python", f"{model_name}.py"]
    usual = asdict(default) | dict(preset=RunConfig.preset)
    for name, value in asdict(config).items():
        if value == usual[name]:
            continue
        if isinstance(value, bool):
            words.append(option(name if value else f"no_{name}"))
        else:
            words += [option(name), *map(str, value if isinstance(value, tuple) else [value])]
    return shlex.join(words)


def main(model_name: str, config_class: type, presets: dict[str, dict], train: Callable) -> None:
    """Parse and train. UserError, no room on disk or GPU: one line, status 2; Ctrl-C: 130."""
    try:
        train(parse(model_name, config_class, presets, sys.argv[1:]))
    except (UserError, OSError, torch.OutOfMemoryError) as error:
        print(f"{model_name}.py: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt as interrupt:
        if processes.rank() == 0:
            reason = str(interrupt) or "stopped; --resume continues from the last checkpoint"
            print(f"{model_name}.py: {reason}", file=sys.stderr)
        sys.exit(130)


def set_up(config: RunConfig) -> torch.device:
    """Device, number formats, memory allocator and process group, as the config says."""
    device = processes.pick_device(config.device)
    tf32 = config.precision == "tf32"
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = tf32
    if device.type == "cpu" and platform.system() == "Linux":
        # Keep freed memory: by default every large tensor is new pages, at a page fault each
        # (glibc: M_MMAP_THRESHOLD, M_TRIM_THRESHOLD, M_TOP_PAD).
        with contextlib.suppress(OSError, AttributeError):
            for size in (1 << 25, 1 << 28):  # the larger is refused where it is too large
                for parameter in (-3, -1, -2):
                    ctypes.CDLL(None).mallopt(parameter, size)
    if processes.world_size() > 1 and not dist.is_initialized():
        if device.type == "cuda":
            torch.cuda.set_device(device)
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    return device


def read_log(folder: Path, last_step: int | None = None) -> list[dict[str, Any]]:
    """The records of metrics.jsonl; those past `last_step` are dropped, from the file as well."""
    path, records = folder / "metrics.jsonl", []
    for line in path.read_text().splitlines() if path.exists() else []:
        with contextlib.suppress(json.JSONDecodeError):  # a line that a kill cut short
            records.append(json.loads(line))
    if last_step is not None:
        records = [record for record in records if record["step"] <= last_step]
        checkpoints.write(path, "".join(f"{json.dumps(record)}\n" for record in records).encode())
    return records


def load_model(path: str | Path, model_name: str, config_class: type, build: Callable) -> Any:
    """The trained model of a checkpoint (a file or a run's folder); `build(config)` makes it."""
    content = checkpoints.load(path, model_name)
    model = build(checkpoints.saved_config(config_class, content, path))
    checkpoints.load_state(model, content["model"], path)
    return model.eval()


# -- a run -----------------------------------------------------------------------------------------


@dataclass
class Run:
    """One training run, made by `start`."""

    name: str  # of the model's file
    config: Any
    command: str  # that trains it anew: resumed or not, a run is the same
    model: nn.Module
    optimizer: torch.optim.Optimizer
    device: torch.device
    folder: Path = Path()
    lock: FileLock | None = None  # the folder's, in the first process
    step: int = 0  # training steps taken
    minutes: float = 0.0  # of training
    skipped: int = 0  # steps without a finite gradient
    nonfinite_streak: int = 0  # of them, the last in a row
    graph: tuple | None = None  # with --cuda-graph: shapes, graph, its inputs, its outputs

    def steps(self) -> Iterator[tuple[int, Tensor]]:
        """Each training step with the numbers (B,) of its scenes: this process's part of them.

        Ends after config.steps steps, config.minutes minutes, or with KeyboardInterrupt after
        Ctrl-C or SIGTERM; saves in every case, and every CHECKPOINT_SECONDS.
        """
        config = self.config
        if config.eval_only:
            return
        local_batch_size = config.batch_size // processes.world_size()
        if processes.rank() == 0:
            read_log(self.folder, last_step=self.step)
        self.save()
        saved = time.monotonic()
        began = saved - 60 * self.minutes
        self.last_log = self.step, saved
        bar = tqdm(total=config.steps, initial=self.step, leave=False,
                   disable=None if processes.rank() == 0 and sys.stderr else True,  # None: no tty
                   bar_format="{n_fmt}/{total_fmt} {bar:9} {elapsed}<{remaining}{postfix}")
        with processes.stop_signals() as raised, bar as self.bar:
            while self.step < config.steps and not processes.any_process(
                bool(raised) or self.minutes >= (config.minutes or math.inf), self.device
            ):
                first = (self.step * processes.world_size() + processes.rank()) * local_batch_size
                yield self.step, torch.arange(first, first + local_batch_size, device=self.device)
                self.step += 1
                now = time.monotonic()
                self.minutes = (now - began) / 60
                if now - saved > CHECKPOINT_SECONDS:
                    self.save()
                    saved = now
            stopped = processes.any_process(bool(raised), self.device)
        self.save()
        if dist.is_initialized():  # a process that ends within a group may abort
            dist.destroy_process_group()
        if stopped:
            raise KeyboardInterrupt(f"stopped after step {self.step}; "
                                    f"continue with --resume {shlex.quote(str(self.folder))}")

    def update(self, loss: Callable, *tensors: Tensor, lr: float,
               clip: float = math.inf) -> dict[str, Tensor]:
        """One training step: forward, backward, mean over processes, clip, Adam.

        `loss(*tensors)` gives 0-d tensors, of which `loss` is minimised, and anything else. Returns
        them detached, the 0-d ones averaged over processes, and `grad_norm` before clipping. `lr`
        and `clip` are those of the optimizer's first group; further groups keep their own lr and
        are not clipped. A gradient that is not finite leaves all parameters as they are; ten in a
        row raise UserError.
        """
        run = self.replay if self.config.cuda_graph else self.forward_backward
        parts = {name: value.detach() for name, value in run(loss, *tensors).items()}
        groups = self.optimizer.param_groups
        parameters = [p for group in groups for p in group["params"]]
        if processes.world_size() > 1:  # all send a gradient where any of them has one
            used = torch.tensor([float(p.grad is not None) for p in parameters], device=self.device)
            processes.average([used])
            for p, share in zip(parameters, used.tolist(), strict=True):
                p.grad = torch.zeros_like(p) if share and p.grad is None else p.grad
        gradients = [p.grad for p in parameters if p.grad is not None]
        processes.average(gradients + [value for value in parts.values() if value.ndim == 0])
        finite = nn.utils.get_total_norm(gradients).isfinite()  # of all groups, before clipping
        parts["grad_norm"] = nn.utils.clip_grad_norm_(groups[0]["params"], clip)
        groups[0]["lr"] = lr
        if finite:
            self.optimizer.step()
            self.nonfinite_streak = 0
        else:
            self.skipped += 1
            self.nonfinite_streak += 1
            require(self.nonfinite_streak < 10, f"step {self.step + 1}: 10 gradients in a row not "
                    f"finite (loss {parts['loss']:.4g}); last checkpoint in {self.folder}")
        return parts

    def forward_backward(self, loss: Callable, *tensors: Tensor) -> dict[str, Tensor]:
        self.optimizer.zero_grad()
        half = self.config.precision == "bfloat16"
        with torch.autocast(self.device.type, torch.bfloat16, enabled=half):
            parts = loss(*tensors)
        parts["loss"].backward()
        return parts

    def replay(self, loss: Callable, *tensors: Tensor) -> dict[str, Tensor]:
        """`forward_backward` as a CUDA graph, captured anew where the shapes have changed."""
        shapes = [t.shape for t in tensors]
        if self.graph is None or self.graph[0] != shapes:
            inputs = [t.clone() for t in tensors]
            side, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
            side.wait_stream(torch.cuda.current_stream())
            buffers = [(own, own.clone()) for own in self.model.buffers()]
            with torch.cuda.stream(side):  # lazy initialisations must not be captured
                for _ in range(3):
                    self.forward_backward(loss, *inputs)
                for own, value in buffers:  # a loss may count its calls in them
                    own.copy_(value)
            torch.cuda.current_stream().wait_stream(side)
            with torch.cuda.graph(graph):
                parts = self.forward_backward(loss, *inputs)
            self.graph = shapes, graph, inputs, parts
        _, graph, inputs, parts = self.graph
        for own, value in zip(inputs, tensors, strict=True):
            own.copy_(value)
        graph.replay()
        return parts

    def due(self, step: int) -> bool:
        """True where this step's numbers are to be logged."""
        return (step + 1) % self.config.log_every == 0

    def log(self, parts: dict[str, Tensor], **scores: Tensor | float) -> None:
        """A line of metrics.jsonl: the 0-d tensors of `update` and this process's scores, which are
        averaged over processes; shown as a bar in a terminal, as a line elsewhere."""
        values = {name: value for name, value in parts.items() if value.ndim == 0}
        for name, value in scores.items():
            values[name] = torch.as_tensor(value, dtype=torch.float32, device=self.device).clone()
        processes.average([values[name] for name in scores])
        if processes.rank() > 0:
            return
        (last_step, last), now = self.last_log, time.monotonic()
        step = self.step + 1
        self.last_log = step, now
        record = dict(step=step, **values, lr=self.optimizer.param_groups[0]["lr"],
                      skipped=self.skipped, seconds=60 * self.minutes,
                      seconds_per_step=(now - last) / (step - last_step))
        for name, value in record.items():
            if not isinstance(value, int):  # six digits; null for what JSON has no number for
                record[name] = float(f"{value:.6g}") if math.isfinite(value) else None
        with open(self.folder / "metrics.jsonl", "a") as file:
            file.write(json.dumps(record) + "\n")
        shown = "  ".join(f"{n} {record[n]:.4g}" for n in SHOWN if record.get(n) is not None)
        self.bar.set_postfix_str(shown, refresh=False)
        self.bar.update(step - self.bar.n)
        if self.bar.disable:
            print(f"step {step}  {shown}  {record['seconds']:.0f} s", flush=True)

    def save(self) -> None:
        """Writes checkpoint.pt: {format, model_name, config, model, optimizer, step, ...}."""
        if processes.rank() == 0:
            buffer = io.BytesIO()
            torch.save(dict(
                format=checkpoints.FORMAT, model_name=self.name, config=asdict(self.config),
                model=self.model.state_dict(), optimizer=self.optimizer.state_dict(),
                step=self.step, minutes=self.minutes, skipped=self.skipped,
            ), buffer)
            checkpoints.write(self.folder / "checkpoint.pt", buffer.getvalue())

    def finish(
        self, scenes: Any, evaluate: Callable, draw: Callable, show: Sequence[str], picture: str
    ) -> dict[str, Any]:
        """Evaluates and draws, writes evaluation.json, says what was reached; returns its content.

        `evaluate(model, scenes)` gives {"metrics": {name: {"mean", ...}}, ...};
        `draw(model, scenes, folder, results)` writes pictures. Only the first process works; the
        others get {}. `show` names the metrics to print.
        """
        if processes.rank() > 0:
            return {}
        print("evaluating test scenes, drawing figures", flush=True)
        results = evaluate(self.model, scenes)
        evaluation = dict(
            model=self.name, preset=self.config.preset, command=self.command,
            seed=self.config.seed, device=processes.describe(self.device),
            versions=dict(python=platform.python_version(), torch=torch.__version__),
            commit=processes.commit(), date=time.strftime("%Y-%m-%d"), steps=self.step,
            minutes=self.minutes, skipped=self.skipped, **results,
        )
        checkpoints.write_json(self.folder / "evaluation.json", evaluation)
        draw(self.model, scenes, self.folder / "figures", results)
        reached = shown_means(results["metrics"], show)
        print(f"reached  {reached} after {self.step:,} steps in {self.minutes:.1f} min")
        for name, scores in floors(scenes.name).items():
            if means := shown_means(scores, show):
                print(f"floor    {means} ({name.replace('_', ' ')})")
        print(f"look at  {self.folder / 'figures' / picture}")
        self.lock.release()
        return evaluation


def floors(dataset: str) -> dict[str, Any]:
    """What no learning scores on a data set's test scenes: {method: {metric: {"mean", ...}}}."""
    path = RESULTS / f"floors-{dataset}.json"
    return json.loads(path.read_text())["floors"] if path.exists() else {}


def shown_means(metrics: dict[str, Any], show: Sequence[str]) -> str:
    means = {name: metrics[name]["mean"] for name in show if name in metrics}
    return ", ".join(f"{name} {mean:.4g}" for name, mean in means.items() if mean is not None)


def start(
    name: str, config: Any, presets: dict[str, dict], model: nn.Module,
    optimizer: torch.optim.Optimizer, *, title: str, kernels: str = "none in this model",
    compiled: Sequence[nn.Module] = (),
) -> Run:
    """Opens or resumes a run: folder, weights, header. `compiled`: what `--compile` compiles;
    `kernels`: what the header says about who computes the per-pixel operations. UserError."""
    anew = dataclasses.replace(config, out="", resume="", eval_only=False)
    command = typed(name, anew, make_config(type(config), presets, config.preset))
    run = Run(name, config, command, model, optimizer, next(model.parameters()).device)
    if config.resume:
        saved = checkpoints.load(config.resume, name)
        checkpoints.load_state(model, saved["model"], config.resume)
        if not config.eval_only:
            checkpoints.load_state(optimizer, saved["optimizer"], config.resume)
        run.step = saved["step"]
        run.minutes, run.skipped = saved.get("minutes", 0.0), saved.get("skipped", 0)
    elif config.init:
        places = Path(config.init), processes.ROOT / config.init  # a preset's is in the latter
        path = next((place for place in places if place.exists()), config.init)
        checkpoints.load_state(model, checkpoints.load(path, name)["model"], path)
    if config.compile and not config.eval_only:
        for part in compiled:
            part.compile()
    if processes.rank() == 0:
        run.folder, run.lock = checkpoints.open_folder(config, name)
        device = f"{processes.describe(run.device)}, {config.precision}, torch {torch.__version__}"
        header = dict(preset=standing(name, config.preset), command=command, device=device,
                      kernels=kernels, writes=f"{run.folder}/")
        print(f"{title}, {sum(p.numel() for p in model.parameters()):,} parameters")
        for label, value in header.items():
            print(f"  {label:8} {value}", flush=True)
    return run
