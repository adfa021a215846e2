"""The trained weights that the notebooks open, from finished runs.

    python notebooks/weights.py runs/iodine-quick-0 runs/air-quick-0
    python notebooks/weights.py --half --name iodine-large runs/iodine-tetrominoes-0

Writes to notebooks/weights/, for each run:

    iodine-quick.pt     its checkpoint without the optimizer, for iodine.load_model; --half stores
                        float16, which load_model copies into float32
    iodine-quick.json   where it is from: command, seed, device, minutes, steps, commit, metrics
"""

import argparse
import io
import json
import sys
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))

from data import runs
from data.options import UserError

FOLDER = Path(__file__).parent / "weights"
LIMIT = 2_000_000  # bytes: what is in a repository is downloaded by everybody, for ever
ORIGIN = "model", "preset", "command", "seed", "device", "minutes", "steps", "commit"


def read_run(run: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """The checkpoint and the evaluation.json of a finished run; UserError if one is missing."""
    path = run / "evaluation.json"
    try:
        evaluation = json.loads(path.read_text())
        model_name = evaluation["model"]
    except OSError:
        raise UserError(f"{path}: no such file; only a finished run has one") from None
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{path}: not the evaluation of a run") from None
    checkpoint = runs.load_checkpoint(runs.checkpoint_file(run), model_name)
    # Training may have gone on, or been evaluated elsewhere: metrics are of these weights or none.
    if checkpoint["step"] != evaluation["steps"]:
        raise UserError(f"{path}: of step {evaluation['steps']}, and the checkpoint is of step "
                        f"{checkpoint['step']}; evaluate it with --eval-only")
    return checkpoint, evaluation


def pack(checkpoint: dict[str, Any], half: bool) -> bytes:
    """What `load_model` reads of a checkpoint, without where it was trained, as a file's bytes."""
    model = {name: value.half() if half and value.is_floating_point() else value
             for name, value in checkpoint["model"].items()}
    config = checkpoint["config"] | dict(out="", resume="")
    kept = {name: value for name, value in checkpoint.items() if name not in ("optimizer", "rng")}
    buffer = io.BytesIO()
    torch.save(kept | dict(config=config, model=model), buffer)
    return buffer.getvalue()


def export(run: Path, folder: Path, name: str = "", half: bool = False) -> Path:
    """Writes NAME.pt and NAME.json to `folder`; returns the first. UserError, OSError."""
    checkpoint, evaluation = read_run(run)
    content = pack(checkpoint, half)
    name = name or f"{evaluation['model']}-{evaluation['preset']}"
    if len(content) > LIMIT:
        advice = "is too large to keep here" if half else "try --half"
        raise UserError(f"{name}.pt: {len(content) / 1e6:.1f} MB, above {LIMIT / 1e6:g}; {advice}")
    origin = {key: evaluation[key] for key in ORIGIN}
    origin["metrics"] = {key: score["mean"] for key, score in evaluation["metrics"].items()}
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.pt"
    temporary = path.with_name(f"{path.name}.tmp")
    temporary.write_bytes(content)
    temporary.replace(path)
    runs.write(path.with_suffix(".json"), origin)
    return path


def main() -> None:
    parser = argparse.ArgumentParser(description="Keeps the weights of finished runs.")
    parser.add_argument("runs", nargs="+", type=Path, help="folders that training has written")
    parser.add_argument("--name", default="", help="of the files; default: <model>-<preset>")
    parser.add_argument("--half", action="store_true", help="store float16")
    parser.add_argument("--out", type=Path, default=FOLDER, help="default: notebooks/weights")
    arguments = parser.parse_args()
    if arguments.name and len(arguments.runs) > 1:
        parser.error("--name is for one run")
    try:
        for run in arguments.runs:
            path = export(run, arguments.out, arguments.name, arguments.half)
            print(f"{run} -> {path} ({path.stat().st_size / 1e6:.2f} MB)")
    except (UserError, OSError) as error:
        print(f"weights.py: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
