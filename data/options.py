"""The command line that all models share: options, presets, errors in one line."""

import argparse
import dataclasses
import math
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
import tyro

# On resume only these may differ from the checkpoint: they say where and how long, not what.
RUN_CONTROL = {"steps", "minutes", "out", "device", "kernels", "compile", "cuda_graph", "log_every",
               "checkpoint_seconds", "resume", "eval_only", "experiment"}


class UserError(Exception):
    """Something that the person at the keyboard can put right: one line, exit status 2."""


@dataclass
class RunConfig:
    """Options that every model has, with the same names and meaning."""

    preset: str = "quick"  # which settings to start from; every other option overrides one of them
    variant: Literal["paper", "released"] = "paper"  # the paper's model, or its authors' code
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
    resume: str = ""  # go on from this checkpoint.pt, or from the folder that holds it
    eval_only: bool = False  # with --resume: evaluate and draw the figures, no training
    experiment: str = ""  # with --resume: run one of EXPERIMENTS instead of training
    log_every: int = 50  # steps between lines of metrics.jsonl
    checkpoint_seconds: float = 60.0  # time between checkpoints


def option(name: str) -> str:
    """The option as it is typed: batch_size -> --batch-size."""
    return "--" + name.replace("_", "-")


def require(condition: bool, message: str) -> None:
    """UserError unless the condition holds."""
    if not condition:
        raise UserError(message)


def at_least_one(config: Any, *names: str) -> None:
    """UserError that names the first of these fields that is (or holds a value) below 1."""
    for name in names:
        value = getattr(config, name)
        smallest = min(value, default=0) if isinstance(value, tuple) else value
        require(smallest >= 1, f"{option(name)} must be at least 1, not {value}")


def at_least_zero(config: Any, *names: str) -> None:
    """UserError that names the first of these fields that is below 0."""
    for name in names:
        value = getattr(config, name)
        require(value >= 0, f"{option(name)} must be 0 or more, not {value}")


def positive(config: Any, *names: str) -> None:
    """UserError that names the first of these fields that is not above 0."""
    for name in names:
        value = getattr(config, name)
        require(value > 0, f"{option(name)} must be larger than 0, not {value}")


def pick_device(name: str) -> torch.device:
    """The device of `--device`; auto is CUDA where there is one; UserError where it is missing."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0].split(". ")[0]
        raise UserError(f"--device {name}: not available here ({reason})") from None
    if device.type == "cuda" and "LOCAL_RANK" in os.environ:
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    return device


def check(config: Any, experiments: Any = ()) -> None:
    """UserError where the options of RunConfig cannot be."""
    for name, value in dataclasses.asdict(config).items():
        require(not isinstance(value, float) or math.isfinite(value),
                f"{option(name)} must be a finite number, not {value}")
    at_least_one(config, "steps", "batch_size", "log_every")
    at_least_zero(config, "minutes", "checkpoint_seconds")
    positive(config, "lr")
    require(-(2**63) <= config.seed < 2**63, f"--seed must fit into 64 bits, not {config.seed}")
    require(bool(config.resume) or not config.eval_only, "--eval-only needs --resume CHECKPOINT")
    require(bool(config.resume) or not config.experiment, "--experiment needs --resume CHECKPOINT")
    require(config.experiment in ("", *experiments),
            f"unknown experiment {config.experiment!r}: choose from {', '.join(experiments)}")
    world = int(os.environ.get("WORLD_SIZE", 1))
    require(config.batch_size % world == 0,
            f"--batch-size {config.batch_size} does not divide among {world} processes")
    device = pick_device(config.device)
    require(not config.cuda_graph or device.type == "cuda",
            f"--cuda-graph needs a CUDA device, and this run is on {device}")


def saved_config(config_class: type, content: dict[str, Any], path: Any) -> Any:
    """The config of a checkpoint's content; UserError if its fields are another version's."""
    saved, names = content["config"], {field.name for field in dataclasses.fields(config_class)}
    require(saved.keys() == names, f"{path}: its settings are another version's "
            f"({', '.join(sorted(saved.keys() ^ names))})")
    return config_class(**saved)


def parse(
    config_class: type, make_default: Callable, load: Callable[[str], dict], argv: list[str]
) -> Any:
    """The command line as a `config_class`. `--preset`, `--variant` and `--resume` are read first.

    `make_default(preset, variant)` gives the config that the other options override; with
    `--resume PATH` that is the checkpoint's own, from `load(PATH)`. Raises UserError.
    """
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for name, default in (("preset", "quick"), ("variant", "paper"), ("resume", "")):
        first.add_argument(option(name), nargs="?", default=default, const=default)
    chosen, _ = first.parse_known_args(argv)
    if not chosen.resume:
        default = make_default(chosen.preset, chosen.variant)
        return tyro.cli(config_class, default=default, args=argv)
    content = load(chosen.resume)
    saved = dataclasses.asdict(saved_config(config_class, content, chosen.resume))
    default = config_class(**saved | dict(out="", resume="", eval_only=False, experiment=""))
    config = tyro.cli(config_class, default=default, args=argv)
    free = RUN_CONTROL | getattr(config_class, "run_control", set())  # a model may have more
    for name, value in dataclasses.asdict(config).items():
        require(name in free or value == saved[name],
                f"{option(name)} {value}: trained with {saved[name]}; only a new run can change it")
    require("optimizer" in content or config.eval_only or config.experiment, f"{chosen.resume}: "
            "weights alone, good for --eval-only and --experiment; training cannot go on from them")
    return config


def main(config_class: type, make_default: Callable, load: Callable, train: Callable) -> None:
    """Parse and train. UserError (and a disk that is full): one line, status 2; Ctrl-C: 130."""
    script = os.path.basename(sys.argv[0])
    try:
        train(parse(config_class, make_default, load, sys.argv[1:]))
    except (UserError, OSError) as error:
        print(f"{script}: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt as interrupt:
        reason = str(interrupt) or "stopped; --resume goes on from the last checkpoint"
        print(f"{script}: {reason}", file=sys.stderr)
        sys.exit(130)
