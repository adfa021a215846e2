"""Where a run runs: its device, its processes under torchrun, the signals that stop it, and what
its results say of the machine and the code."""

import contextlib
import os
import platform
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from data.checkpoints import UserError

ROOT = Path(__file__).resolve().parent.parent


def rank() -> int:
    """This process's number; 0 without torchrun. The first process writes, prints, evaluates."""
    return int(os.environ.get("RANK", 0))


def world_size() -> int:
    """How many processes torchrun started; 1 without it."""
    return int(os.environ.get("WORLD_SIZE", 1))


def pick_device(name: str) -> torch.device:
    """The device of `--device`, this process's under torchrun; UserError where it is missing."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        if device.type == "cuda" and "LOCAL_RANK" in os.environ:
            device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0].split(". ")[0]
        raise UserError(f"--device {name}: not available here ({reason})") from None
    return device


def average(tensors: list[Tensor]) -> None:
    """Mean over processes of every tensor, in place, in one message."""
    if world_size() > 1 and tensors:
        flat = torch.cat([t.flatten() for t in tensors])
        dist.all_reduce(flat)
        for t, mean in zip(tensors, flat.split([t.numel() for t in tensors]), strict=True):
            t.copy_(mean.view_as(t) / world_size())  # in place: a CUDA graph knows the address


def any_process(flag: bool, device: torch.device) -> bool:
    """True where the flag is set in any process, so that all stop at the same step."""
    if world_size() == 1:
        return flag
    message = torch.tensor(float(flag), device=device)
    average([message])
    return message.item() > 0


def describe(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    info = Path("/proc/cpuinfo")
    names = re.findall(r"^model name\s*: (.*)$", info.read_text(), re.M) if info.exists() else []
    threads = torch.get_num_threads()
    return f"{[*names, platform.processor()][0]}, {threads} thread{'s' if threads > 1 else ''}"


def commit() -> str | None:
    """The commit of this code, `-dirty` where it was changed since; None where it has none."""
    # A repository that begins further up is another project's, with a copy of this code in it.
    environment = os.environ | dict(GIT_CEILING_DIRECTORIES=str(ROOT.parent))
    with contextlib.suppress(OSError):  # no git here
        done = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=ROOT,
                              env=environment, capture_output=True, text=True)
        return done.stdout.strip() or None
    return None


@contextlib.contextmanager
def stop_signals() -> Iterator[list[int]]:
    """A list that gets Ctrl-C's or SIGTERM's number; a second signal acts as it did before."""
    raised = []
    with contextlib.ExitStack() as before:

        def on_signal(number: int, _: Any) -> None:
            raised.append(number)
            before.close()
            if rank() == 0:
                print("\nstopping after this step (again: at once)", file=sys.stderr)

        with contextlib.suppress(ValueError):  # not the main thread: signals go elsewhere
            for number in (signal.SIGINT, signal.SIGTERM):
                before.callback(signal.signal, number, signal.signal(number, on_signal))
        yield raised
