"""What a training run needs and no model is about: folder, log, checkpoint, Ctrl-C, processes.

Plain functions; the training loop itself stands in each model's file. A run can stop at any moment
(`kill -9` included) and goes on from its last checkpoint as if it had never stopped: a checkpoint
is written to a temporary file and renamed, all randomness is a function of seed and scene number,
and lines of metrics.jsonl past the checkpoint are dropped on resume.
"""

import contextlib
import ctypes
import dataclasses
import datetime
import json
import math
import os
import platform
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from tqdm import tqdm

from data.options import UserError, pick_device

FORMAT = 1  # of checkpoint.pt
SHOWN = ("loss", "elbo", "kl", "ari_fg", "count_accuracy")  # in the progress line, where measured


def set_up(config: Any) -> torch.device:
    """Device, number formats, memory allocator and process group, as the config says."""
    device = pick_device(config.device)
    tf32 = config.precision == "tf32"
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = tf32
    if device.type == "cpu" and platform.system() == "Linux":
        # Keep freed memory: by default every large tensor is new pages, at a page fault each
        # (glibc: M_MMAP_THRESHOLD, M_TRIM_THRESHOLD, M_TOP_PAD).
        with contextlib.suppress(OSError, AttributeError):
            for parameter in (-3, -1, -2):
                ctypes.CDLL(None).mallopt(parameter, 1 << 28)
    if world_size() > 1 and not dist.is_initialized():
        if device.type == "cuda":
            torch.cuda.set_device(device)
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    return device


def rank() -> int:
    """This process's number; 0 without torchrun."""
    return int(os.environ.get("RANK", 0))


def world_size() -> int:
    """How many processes torchrun started; 1 without it."""
    return int(os.environ.get("WORLD_SIZE", 1))


def average(tensors: list[torch.Tensor]) -> None:
    """Mean over processes of every tensor, in place, in one message."""
    if world_size() > 1:
        flat = torch.cat([t.flatten() for t in tensors])
        dist.all_reduce(flat)
        for t, mean in zip(tensors, flat.split([t.numel() for t in tensors]), strict=True):
            t.copy_(mean.view_as(t) / world_size())


def any_process(flag: bool, device: torch.device) -> bool:
    """True where the flag is set in any process, so that all stop at the same step."""
    if world_size() > 1:
        message = torch.tensor(float(flag), device=device)
        dist.all_reduce(message, op=dist.ReduceOp.MAX)
        flag = message.item() > 0
    return flag


class StopFlag:
    """`with StopFlag() as stop`: Ctrl-C makes `stop` true, a second one ends the process."""

    def __enter__(self) -> "StopFlag":
        self.raised, self.before = False, signal.getsignal(signal.SIGINT)
        with contextlib.suppress(ValueError):  # not the main thread: Ctrl-C goes elsewhere
            signal.signal(signal.SIGINT, self.on_signal)
        return self

    def on_signal(self, *_: Any) -> None:
        self.raised = True
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        print("\nstopping after this step (Ctrl-C again: at once)", file=sys.stderr, flush=True)

    def __bool__(self) -> bool:
        return self.raised

    def __exit__(self, *_: Any) -> None:
        with contextlib.suppress(ValueError):
            signal.signal(signal.SIGINT, self.before)


def open_folder(config: Any, model_name: str) -> Path:
    """Makes the folder this run writes to, with its config.json.

    The default folder gets -2, -3, ... where it holds another run; one named with `--out` is then
    refused. A resumed run goes on in its own folder, or in `--out` with a copy of the log.
    UserError where nothing can be written.
    """
    source = checkpoint_file(config.resume).parent if config.resume else None
    if source and not (source / "config.json").exists():  # weights that somebody keeps elsewhere
        source = None
    folder = Path(config.out or source or f"runs/{model_name}-{config.preset}-{config.seed}")
    if holds_run(folder) and not (source and source.resolve() == folder.resolve()):
        if config.out:
            raise UserError(f"{folder} holds another run; name another --out, or --resume {folder}")
        number = 2
        while holds_run(Path(f"{folder}-{number}")):
            number += 1
        folder = Path(f"{folder}-{number}")
    try:
        (folder / "figures").mkdir(parents=True, exist_ok=True)
        if not (config.eval_only or config.experiment):  # which leave the run's own as it is
            write(folder / "config.json", dataclasses.asdict(config))
        if source and source.resolve() != folder.resolve() and (source / "metrics.jsonl").exists():
            (folder / "metrics.jsonl").write_bytes((source / "metrics.jsonl").read_bytes())
    except OSError as error:
        reason = error.strerror or error
        raise UserError(f"cannot write to {folder} ({reason}); name another --out") from None
    return folder


def holds_run(folder: Path) -> bool:
    """True where a run has left a checkpoint; one that was killed before has left nothing."""
    return (folder / "checkpoint.pt").exists()


def write(path: Path, content: Any) -> None:
    """Writes JSON (a list: one line an item) through a temporary file: all of it or nothing."""
    temporary = path.with_name(path.name + ".tmp")
    several = isinstance(content, list)
    lines = map(json.dumps, content) if several else [json.dumps(content, indent=1)]
    temporary.write_text("".join(f"{line}\n" for line in lines))
    temporary.replace(path)


def read_log(folder: Path, last_step: int | None = None) -> list[dict[str, Any]]:
    """The records of metrics.jsonl; those past `last_step` are dropped, from the file as well."""
    path, records = folder / "metrics.jsonl", []
    for line in path.read_text().splitlines() if path.exists() else []:
        with contextlib.suppress(json.JSONDecodeError):  # a line that a kill cut short
            records.append(json.loads(line))
    if last_step is not None:
        records = [record for record in records if record["step"] <= last_step]
        write(path, records)
    return records


def checkpoint_file(path: str | Path) -> Path:
    """A checkpoint's path, from itself or from the folder that holds it."""
    return Path(path) / "checkpoint.pt" if Path(path).is_dir() else Path(path)


def save_checkpoint(
    folder: Path, model_name: str, config: Any, name: str = "checkpoint.pt", **state: Any
) -> None:
    """{format, model_name, config, rng, **state} in `name`, written through another file."""
    content = dict(format=FORMAT, model_name=model_name, config=dataclasses.asdict(config))
    temporary = folder / f"{name}.tmp"
    try:
        torch.save({**content, "rng": torch.get_rng_state(), **state}, temporary)
    except RuntimeError as error:  # what torch makes of a full disk
        raise UserError(f"cannot write {temporary} ({str(error).splitlines()[0]})") from None
    temporary.replace(folder / name)


def load_checkpoint(path: str | Path, model_name: str) -> dict[str, Any]:
    """A checkpoint's content; UserError if it is missing, damaged, newer or another model's."""
    file = checkpoint_file(path)
    if not file.is_file():
        raise UserError(f"{file}: no such checkpoint")
    try:
        content = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # half a dozen types, which all mean the same here
        raise UserError(f"{file}: not a readable checkpoint ({type(error).__name__})") from None
    if not isinstance(content, dict) or not {"format", "model_name", "config"} <= content.keys():
        raise UserError(f"{file}: not a checkpoint of this repository")
    if content["format"] > FORMAT:
        raise UserError(f"{file}: format {content['format']}, newer than this code's {FORMAT}")
    if content["model_name"] != model_name:
        raise UserError(f"{file}: a checkpoint of {content['model_name']}.py, not {model_name}.py")
    return content


def describe(device: torch.device) -> str:
    """For people: 'NVIDIA H100' or 'AMD EPYC, 2 threads'."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    name = platform.processor() or platform.machine()
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next(line.split(": ")[1] for line in lines if line.startswith("model name"))
    threads = torch.get_num_threads()
    return f"{name}, {threads} thread{'s' if threads > 1 else ''}"


def header(title: str, config: Any, default: Any, device: torch.device, folder: Path) -> None:
    """Says what is about to run: preset and changes to it, device, versions, folder."""
    print(title)
    changed = [f"{name} {value}" for name, value in dataclasses.asdict(config).items()
               if value != getattr(default, name) and name not in ("seed", "out", "resume")]
    print(f"  preset   {config.preset}, seed {config.seed}, variant {config.variant}")
    if changed:
        print(f"  changed  {', '.join(changed)}")
    print(f"  device   {describe(device)}, {config.precision}, torch {torch.__version__}")
    print(f"  writes   {folder}/", flush=True)


class Progress:
    """`report(record)` adds a line to metrics.jsonl and shows it: a bar in a terminal, or lines."""

    def __init__(self, folder: Path, config: Any, step: int):
        self.folder = folder
        self.bar = tqdm(total=config.steps, initial=step, leave=False,
                        disable=rank() > 0 or not sys.stderr.isatty(),
                        bar_format="{n_fmt}/{total_fmt} {bar:9} {elapsed}<{remaining}{postfix}")

    def report(self, record: dict[str, Any]) -> None:
        for name, value in record.items():
            if isinstance(value, float):  # six digits; null for what JSON has no number for
                record[name] = float(f"{value:.6g}") if math.isfinite(value) else None
        with open(self.folder / "metrics.jsonl", "a") as file:
            file.write(json.dumps(record) + "\n")
        shown = "  ".join(f"{n} {record[n]:.4g}" for n in SHOWN if record.get(n) is not None)
        self.bar.set_postfix_str(shown, refresh=False)
        self.bar.update(record["step"] - self.bar.n)
        if self.bar.disable:
            print(f"step {record['step']}  {shown}  {record['seconds']:.0f} s", flush=True)

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_: Any) -> None:
        self.bar.close()


@contextlib.contextmanager
def announced(text: str) -> Iterator[None]:
    """Says what is being done, and afterwards how long it took."""
    start = time.monotonic()
    print(f"{text} ...", end=" ", flush=True)
    yield
    print(f"{time.monotonic() - start:.0f} s", flush=True)


def commit() -> str | None:
    """The commit of this code, `-dirty` where it was changed since; None outside of git."""
    command = ["git", "describe", "--always", "--dirty"]
    try:
        done = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True)
    except OSError:  # no git here
        return None
    return done.stdout.strip() or None


def evaluation(model_name: str, config: Any, device: torch.device, **results: Any) -> dict:
    """The content of evaluation.json: what was run, on what, and what came out."""
    return dict(
        model=model_name, preset=config.preset, variant=config.variant,
        command=shlex.join(["python", *sys.argv]), seed=config.seed, device=describe(device),
        versions=dict(python=platform.python_version(), torch=torch.__version__),
        commit=commit(), date=datetime.date.today().isoformat(), **results,
    )


def cuda_graph(function: Callable[..., dict[str, Any]]) -> Callable[..., dict[str, Any]]:
    """`function` of tensors, captured at its first call and replayed at every call."""
    captured: list[Any] = []

    def replay(*tensors: torch.Tensor) -> dict[str, Any]:
        if not captured:
            static = [t.clone() for t in tensors]
            side, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):  # lazy initialisations must not be captured
                for _ in range(3):
                    function(*static)
            torch.cuda.current_stream().wait_stream(side)
            with torch.cuda.graph(graph):
                outputs = function(*static)
            captured.extend((static, graph, outputs))
        static, graph, outputs = captured
        for own, new in zip(static, tensors, strict=True):
            own.copy_(new)
        graph.replay()
        return dict(outputs)

    return replay
