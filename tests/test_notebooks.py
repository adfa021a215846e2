"""The notebooks run and say what their code does; the weights that they open are those of runs.

A notebook is checked twice: as it is committed, without running anything, and by running it from
top to bottom in its own folder, as a reader does.
"""

import ast
import functools
import json
import platform
import re
import sys
from pathlib import Path

import nbformat
import pytest
import torch
from nbclient import NotebookClient
from test_readme import wrong_numbers

import data
import iodine
from data import options, runs
from notebooks import weights

ROOT = Path(__file__).parent.parent
FOLDER = ROOT / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
WEIGHTS = sorted(FOLDER.glob("weights/*.pt"))
LIMIT = 500_000  # bytes of a notebook with its outputs
notebooks = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


@functools.cache
def read(path: Path) -> nbformat.NotebookNode:
    return nbformat.read(path, as_version=4)


def code_cells(notebook: nbformat.NotebookNode) -> list[nbformat.NotebookNode]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def has_image(cell: nbformat.NotebookNode) -> bool:
    return any("image/png" in output.get("data", {}) for output in cell.outputs)


def kinds(cell: nbformat.NotebookNode) -> list:
    """What a cell puts out, whatever the numbers: prints, and the formats of everything else."""
    found = []
    for output in cell.outputs:
        kind = output.get("name") or sorted(output.get("data", {"error": None}))
        if [kind] != found[-1:]:  # a stream may arrive in parts
            found.append(kind)
    return found


# -- as committed ----------------------------------------------------------------------------------


@notebooks
def test_outputs_are_of_one_run_from_top_to_bottom(path):
    cells = code_cells(read(path))
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell.outputs]
    assert not [o for o in outputs if o.output_type == "error" or o.get("name") == "stderr"]


@notebooks
def test_outputs_are_small_and_of_no_particular_machine(path):
    assert path.stat().st_size <= LIMIT
    texts = [cell.source for cell in read(path).cells]
    for output in (output for cell in code_cells(read(path)) for output in cell.outputs):
        texts += [output.get("text", ""), *map(str, output.get("data", {}).values())]
    text = "\n".join(part for part in texts if not re.fullmatch(r"[\w+/=\s]{200,}", part))
    assert not re.findall(r"""(?:^|[\s'"(])/(?:home|root|tmp|work|Users|opt|usr)/\S*""", text)
    assert not re.findall(r" at 0x[0-9a-f]{6,}", text), "an object without a readable form"
    assert not re.findall(rf"\b{re.escape(platform.node())}\b", text)


@notebooks
def test_cells_are_short_and_pictures_have_titles(path):
    cells = code_cells(read(path))
    for cell in cells:
        lines = cell.source.splitlines()
        assert len(lines) <= 15 and max(map(len, lines), default=0) <= 100, cell.source
        strings = [n.value for n in ast.walk(ast.parse(cell.source)) if isinstance(n, ast.Constant)]
        titles = [text for text in strings if isinstance(text, str) and len(text.split()) > 2]
        assert titles or not has_image(cell), cell.source
    assert any(map(has_image, cells[:4])), "the first picture comes late"


@notebooks
def test_numbers_in_the_text_are_those_of_files(path):
    text = "\n\n".join(cell.source for cell in read(path).cells if cell.cell_type == "markdown")
    assert wrong_numbers(text, ROOT) == []


@notebooks
def test_weights_and_links_are_there(path):
    text = "\n".join(cell.source for cell in read(path).cells)
    for name in re.findall(r"weights/([\w.-]+\.pt)", text):
        assert FOLDER / "weights" / name in WEIGHTS
    for target in re.findall(r"\]\((?!https://)([^)#\s]+)", text):
        assert (FOLDER / target).exists(), target


@pytest.mark.parametrize("path", WEIGHTS, ids=lambda path: path.stem)
def test_committed_weights_are_small_and_say_where_they_are_from(path):
    assert path.stat().st_size <= 2_000_000
    content = torch.load(path, weights_only=True)
    origin = json.loads(path.with_suffix(".json").read_text())
    assert {"command", "seed", "device", "minutes", "commit"} <= origin.keys()
    assert (origin["model"], origin["steps"]) == (content["model_name"], content["step"])
    assert origin["command"].startswith(f"python {origin['model']}.py")
    assert origin["metrics"] and "optimizer" not in content


# -- running ---------------------------------------------------------------------------------------


@notebooks
def test_notebook_runs_from_top_to_bottom(path, monkeypatch):
    """Without errors and warnings, each cell with the kind of output that is committed."""
    for name in ("MPLBACKEND", "TRITON_INTERPRET"):  # of the tests, not of readers
        monkeypatch.delenv(name, raising=False)
    notebook = nbformat.read(path, as_version=4)
    NotebookClient(notebook, timeout=100, resources={"metadata": {"path": FOLDER}}).execute()
    for cell, committed in zip(code_cells(notebook), code_cells(read(path)), strict=True):
        assert kinds(cell) == kinds(committed), cell.source
    first = next(cell for cell in code_cells(notebook) if has_image(cell))
    start = code_cells(notebook)[0].metadata.execution["iopub.execute_input"]
    assert seconds(first.metadata.execution["shell.execute_reply"]) - seconds(start) < 30


def seconds(stamp: str) -> float:
    """Of a time like 2026-01-31T23:59:59.5Z, for differences within a day or two."""
    day, hours, minutes, rest = re.fullmatch(r"\d+-\d+-(\d+)T(\d+):(\d+):([\d.]+)Z", stamp).groups()
    return ((int(day) * 24 + int(hours)) * 60 + int(minutes)) * 60 + float(rest)


# -- weights.py ------------------------------------------------------------------------------------

COMMAND = "python iodine.py --seed 5"
SMALL = dict(
    num_slots=2, latent_size=3, decoder_channels=(4,), refinement_channels=(4,), mlp_sizes=(6,),
    num_steps=2, device="cpu",
)  # fmt: skip


@pytest.fixture
def run(tmp_path, monkeypatch) -> Path:
    """The folder of a run that has ended after seven steps."""
    folder = tmp_path / "run"
    folder.mkdir()
    config = iodine.make_config("quick", seed=5, out=str(folder), **SMALL)
    model = iodine.build(config, data.make(config.dataset))
    runs.save_checkpoint(folder, "iodine", config, model=model.state_dict(), step=7, optimizer={})
    metrics = dict(ari_fg=dict(mean=0.25, stderr=0.1, n=4), mse=dict(mean=None, stderr=None, n=0))
    results = dict(steps=7, minutes=0.5, metrics=metrics, settings=[])
    monkeypatch.setattr(sys, "argv", COMMAND.split()[1:])
    evaluation = runs.evaluation("iodine", config, torch.device("cpu"), **results)
    runs.write(folder / "evaluation.json", evaluation)
    return folder


@pytest.fixture
def export(monkeypatch, capsys, tmp_path):
    """`python notebooks/weights.py ARGUMENTS --out kept` -> exit status, what it printed."""

    def call(*arguments: object, out: str = "kept") -> tuple[int, str]:
        line = ["weights.py", *map(str, arguments), "--out", str(tmp_path / out)]
        monkeypatch.setattr(sys, "argv", line)
        try:
            weights.main()
            status = 0
        except SystemExit as error:
            status = error.code
        printed = capsys.readouterr()
        return status, printed.err + printed.out

    return call


@torch.no_grad()
def decode(model: iodine.IODINE) -> torch.Tensor:
    """The last decode of two scenes, which every parameter has a part in."""
    scenes = data.make(model.config.dataset, "test")
    index = torch.arange(2)
    *_, last = model.infer(scenes.scenes(index).image, model.noise(scenes, index))
    return last.decoded


def test_kept_weights_are_the_run(run, export, tmp_path):
    """To the last bit, or to that of float16; with its origin, and without its folder's name."""
    expected = decode(iodine.load_model(run))
    for arguments, name, error in (
        ((), "iodine-quick", 0), (("--half", "--name", "smaller"), "smaller", 1e-2)
    ):  # fmt: skip
        assert export(run, *arguments)[0] == 0
        model = iodine.load_model(tmp_path / "kept" / f"{name}.pt")
        assert {p.dtype for p in model.parameters()} == {torch.float32}
        distance = (decode(model) - expected).abs().max()
        assert distance <= error and (distance > 0) == (error > 0)
        assert str(tmp_path) not in str(model.config)
    assert json.loads((tmp_path / "kept" / "iodine-quick.json").read_text()) == dict(
        model="iodine", preset="quick", command=COMMAND, seed=5,
        device=runs.describe(torch.device("cpu")), minutes=0.5, steps=7, commit=runs.commit(),
        metrics=dict(ari_fg=0.25, mse=None),
    )  # fmt: skip


def test_weights_serve_for_everything_but_training(run, export, tmp_path, monkeypatch):
    """Evaluated in a run's own folder, not where they are kept."""
    export(run)
    weights_file = str(tmp_path / "kept" / "iodine-quick.pt")
    parse = functools.partial(options.parse, iodine.Config, iodine.make_config, iodine.load)
    with pytest.raises(options.UserError, match="weights alone"):
        parse(["--resume", weights_file, "--steps", "9"])
    config = parse(["--resume", weights_file, "--eval-only"])
    monkeypatch.chdir(tmp_path)
    assert runs.open_folder(config, "iodine") == Path("runs/iodine-quick-5")


def remove(name: str):
    return lambda run: (run / name).unlink()


def write(name: str, text: str):
    return lambda run: (run / name).write_text(text)


def change(**values):
    """Of the run's evaluation.json."""

    def spoil(run: Path) -> None:
        path = run / "evaluation.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | values))

    return spoil


@pytest.mark.parametrize(
    ("spoil", "arguments", "message"),
    [
        (remove("checkpoint.pt"), (), "checkpoint.pt: no such checkpoint"),
        (write("checkpoint.pt", "?"), (), "not a readable checkpoint"),
        (remove("evaluation.json"), (), "only a finished run has one"),
        (write("evaluation.json", "{"), (), "not the evaluation of a run"),
        (write("evaluation.json", "[]"), (), "not the evaluation of a run"),
        (change(model="air"), (), "a checkpoint of iodine.py, not air.py"),
        (change(steps=6), (), "of step 6, and the checkpoint is of step 7"),
        (change(), ("other", "--name", "x"), "--name is for one run"),
    ],
)
def test_what_cannot_be_kept_is_said_in_one_line(run, export, tmp_path, spoil, arguments, message):
    spoil(run)
    status, printed = export(run, *arguments)
    assert status == 2 and message in printed.splitlines()[-1]
    assert not (tmp_path / "kept").exists()


def test_too_large(run, export, monkeypatch, tmp_path):
    monkeypatch.setattr(weights, "LIMIT", 1000)
    for arguments, advice in (((), "try --half"), (("--half",), "is too large to keep here")):
        status, printed = export(run, *arguments)
        assert status == 2 and re.fullmatch(rf"weights.py: .* above 0.001; {advice}\n", printed)
    assert not (tmp_path / "kept").exists()


def test_where_nothing_can_be_written(run, export):
    status, printed = export(run, out="run/checkpoint.pt")  # a file, no folder
    assert status == 2 and printed.startswith("weights.py: ") and printed.count("\n") == 1
