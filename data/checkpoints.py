"""The files of a run: each is written whole or not at all, and read with errors of one line.

A checkpoint is {format, model_name, config, model, optimizer, step, ...}; weights that are shipped
lack the optimizer. A folder belongs to one run, and to one process at a time.
"""

import contextlib
import dataclasses
import itertools
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from torch import nn

FORMAT = 1  # of checkpoint.pt


class UserError(Exception):
    """Something that the person at the keyboard can put right: one line, exit status 2."""


def require(condition: Any, message: str) -> None:
    """UserError unless the condition holds."""
    if not condition:
        raise UserError(message)


def write(path: Path, content: bytes) -> None:
    """Through a temporary file that is renamed: all of it or nothing. OSError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    try:
        temporary.write_bytes(content)
        temporary.replace(path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise


def write_json(path: Path, content: Any) -> None:
    write(path, (json.dumps(content, indent=1) + "\n").encode())


def load(path: str | Path, model_name: str) -> dict[str, Any]:
    """The content of a checkpoint, or of the one in a run's folder; UserError if it is missing,
    damaged, of another version or another model's."""
    file = Path(path, "checkpoint.pt") if Path(path).is_dir() else Path(path)
    require(file.is_file(), f"{file}: no such checkpoint")
    try:
        content = dict(torch.load(file, map_location="cpu", weights_only=True))
        found, of = content["format"], content["model_name"]
    except Exception as error:  # half a dozen types, which all mean the same here
        raise UserError(f"{file}: not a readable checkpoint ({type(error).__name__})") from None
    require((found, of) == (FORMAT, model_name), f"{file}: a checkpoint of {of}.py in format "
            f"{found}, not of {model_name}.py in format {FORMAT}")
    return content


def saved_config(config_class: type, content: dict[str, Any], path: str | Path) -> Any:
    """The config of a checkpoint's content. A field that it lacks gets its default, which is what
    the code did before the field existed; UserError for fields that are unknown."""
    unknown = content["config"].keys() - {field.name for field in dataclasses.fields(config_class)}
    require(not unknown, f"{path}: its settings are another version's ({', '.join(unknown)})")
    return config_class(**content["config"])


def load_state(part: nn.Module | torch.optim.Optimizer, state: Any, path: str | Path) -> None:
    """`load_state_dict`; UserError where the file's tensors are not this model's."""
    try:
        part.load_state_dict(state)
    except (RuntimeError, ValueError, KeyError, TypeError) as error:
        reason = " ".join(str(error).split())[:120]
        raise UserError(f"{path}: its tensors do not fit this model ({reason})") from None


def open_folder(config: Any, model_name: str) -> tuple[Path, FileLock]:
    """The folder that this run writes to, with the lock that it holds while its process lives.

    The default folder gets -2, -3, ... where it holds another run or one is at work in it; one
    named with `--out` is then refused. A resumed run continues in its own folder, or in `--out`
    with a copy of the log. UserError where another process resumes it; OSError.
    """
    path = Path(config.resume)
    source = path if path.is_dir() else path.parent
    # Weights that somebody keeps elsewhere have no config.json beside them.
    own = (config.resume and (source / "config.json").exists()
           and Path(config.out or source).resolve() == source.resolve())
    first = source if own else config.out or f"runs/{model_name}-{config.preset}-{config.seed}"
    for number in itertools.count(1):
        folder = Path(first if number == 1 else f"{first}-{number}")
        lock = FileLock(folder / ".lock", blocking=False)
        (folder / "figures").mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(Timeout):
            lock.acquire()
        if own and config.eval_only:  # another process may be training here
            return folder, lock
        full = any((folder / name).exists() for name in ("checkpoint.pt", "evaluation.json"))
        if lock.is_locked and (own or not full):
            break
        lock.release()
        require(not own, f"{folder}: another process is training this run")
        require(not config.out,
                f"{folder} holds another run; name another --out, or --resume {folder}")
    if config.resume and not own and (source / "metrics.jsonl").exists():
        write(folder / "metrics.jsonl", (source / "metrics.jsonl").read_bytes())
    write_json(folder / "config.json", asdict(config))
    return folder, lock
