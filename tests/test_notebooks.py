"""The notebooks run and are of one run; results.py keeps what a run has measured."""

import ast
import functools
import json
import platform
import re
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import mutants
import nbformat
import pytest
import results
import torch
from nbclient import NotebookClient
from torch import Tensor

import data
import iodine
from data import checkpoints, metrics

ROOT = Path(__file__).parent.parent
FOLDER = ROOT / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
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
def test_outputs_are_of_one_run_small_and_of_no_particular_machine(path):
    cells = code_cells(read(path))
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell.outputs]
    assert not [o for o in outputs if o.output_type == "error" or o.get("name") == "stderr"]
    assert path.stat().st_size <= LIMIT
    texts = [cell.source for cell in read(path).cells]
    for output in outputs:
        texts += [output.get("text", ""), *map(str, output.get("data", {}).values())]
    text = "\n".join(part for part in texts if not re.fullmatch(r"[\w+/=\s]{200,}", part))
    assert not re.findall(r"""(?:^|[\s'"(])/(?:home|root|tmp|work|Users|opt|usr)/\S*""", text)
    assert not re.findall(r" at 0x[0-9a-f]{6,}", text), "an object without a readable form"
    assert not re.findall(rf"\b{re.escape(platform.node())}\b", text)


@notebooks
def test_cells_are_short_and_pictures_come_early(path):
    cells = code_cells(read(path))
    for cell in cells:
        lines = cell.source.splitlines()
        assert len(lines) <= 15 and max(map(len, lines), default=0) <= 100, cell.source
        ast.parse(cell.source)
    assert any(map(has_image, cells[:4])), "the first picture comes late"


@pytest.mark.parametrize("path", [*NOTEBOOKS, FOLDER / "EQUATIONS.md"], ids=lambda p: p.stem)
def test_files_and_links_are_there(path):
    text = path.read_text()
    if path.suffix == ".ipynb":
        text = "\n".join(cell.source for cell in read(path).cells)
    for folder, name in re.findall(r"\b(weights|results|figures)/([\w.-]+\.(?:pt|json|png))", text):
        assert (FOLDER / folder / name).exists(), name
    for target in re.findall(r"\]\((?!https://)([^)#\s]+)", text):
        assert (FOLDER / target).exists(), target


def test_equations_are_where_the_map_says():
    """A row that says `file.py`: `name` means that the file has that name or comment."""
    rows = re.findall(r"^\| (.*) \|$", (FOLDER / "EQUATIONS.md").read_text(), re.M)
    assert len(rows) > 60
    for row in rows:
        for script, names in re.findall(r"`([\w/]+\.py)`:((?: ?`[^`]+`,?)+)", row):
            source = (ROOT / script).read_text()
            for name in re.findall(r"`([^`]+)`", names):
                assert name in " ".join(source.split()), f"{script} {name}"


# -- running ---------------------------------------------------------------------------------------


@notebooks
def test_notebook_runs_from_top_to_bottom(path, monkeypatch):
    """Each cell with the kind of output that is committed; from the root, as editors open it, and
    with the settings of a notebook whose drawing package is not installed here."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)  # of the tests, not of readers
    monkeypatch.setenv("MPLBACKEND", "module://matplotlib_inline.backend_inline")
    notebook = nbformat.read(path, as_version=4)
    folder = ROOT if path.stem == "iodine" else FOLDER
    NotebookClient(notebook, timeout=100, resources={"metadata": {"path": folder}}).execute()
    for cell, committed in zip(code_cells(notebook), code_cells(read(path)), strict=True):
        assert kinds(cell) == kinds(committed), cell.source


# -- results.py ------------------------------------------------------------------------------------


def test_a_cell_is_a_median_a_range_and_of_how_many():
    assert results.spread([0.1, 0.3, 0.25], "{:.2f}", seeds=3) == "0.25 (0.10 to 0.30)"
    assert results.spread([0.1, 0.3, 0.25], "{:.2f}", seeds=10) == "0.25 (0.10 to 0.30; 3)"
    assert results.spread([0.1], "{:.2f}", seeds=10) == "0.10 (1)"
    assert [results.spread([0.1]), results.spread([], seeds=10)] == ["0.100", "–"]


@pytest.fixture
def run(tmp_path, monkeypatch) -> Path:
    """A small finished run, and empty folders for what is kept of it."""
    monkeypatch.chdir(tmp_path)
    for name in ("RESULTS", "WEIGHTS", "FIGURES"):
        (tmp_path / name).mkdir()
        monkeypatch.setattr(results, name, tmp_path / name)
    monkeypatch.setattr(iodine, "evaluate", functools.partial(iodine.evaluate, count=8))
    monkeypatch.setattr(iodine, "further_scores", lambda *_: dict(extra=1), raising=False)
    monkeypatch.setattr(results, "dci", lambda *_: dict(disentanglement=0.5))
    iodine.train(iodine.make_config("quick", steps=2, latent_size=4, decoder_channels=(4,),
                                    refinement_channels=(4,), device="cpu"))
    return tmp_path / "runs" / "iodine-quick-0"


def keep(monkeypatch, capsys, *arguments: object) -> str:
    """What `python notebooks/results.py keep ...` says on standard error."""
    monkeypatch.setattr(sys, "argv", ["results.py", "keep", *map(str, arguments)])
    try:
        results.main()
    except SystemExit as stop:
        assert stop.code == 2
    return capsys.readouterr().err


def test_what_is_kept_is_the_run(run, monkeypatch, capsys):
    assert keep(monkeypatch, capsys, run, "--figures", "decomposition.png") == ""
    kept = json.loads(Path("RESULTS/iodine-quick-cpu-0.json").read_text())
    further = dict(extra=1, dci=dict(disentanglement=0.5))
    assert kept == json.loads((run / "evaluation.json").read_text()) | dict(further=further)
    assert Path("FIGURES/iodine-quick-decomposition.png").exists()
    assert len(list(Path("FIGURES").iterdir())) == 1
    path = Path("WEIGHTS/iodine-quick.pt")
    test = data.make("mini_sprites_16_shaded", "test", 0)
    again = iodine.evaluate(iodine.load_model(path), test)["metrics"]
    assert results.moved(kept["metrics"], again) == []
    content = torch.load(path, weights_only=True)
    assert "optimizer" not in content and content["config"]["out"] == ""
    half = [v for v in content["model"].values() if v.dtype == torch.float16]
    assert len(half) == len(content["model"]) and content["step"] == 2


def test_without_weights_dci_is_kept_and_what_takes_longer_is_not(run, monkeypatch, capsys):
    assert keep(monkeypatch, capsys, "--scores", run) == "" and not list(Path("WEIGHTS").iterdir())
    path = Path("RESULTS/iodine-quick-cpu-0.json")
    assert json.loads(path.read_text())["further"] == dict(dci=dict(disentanglement=0.5))


def test_minutes_count_from_the_first_of_two_runs(run, monkeypatch, capsys):
    second = iodine.train(iodine.make_config(
        "quick", steps=1, latent_size=4, decoder_channels=(4,), refinement_channels=(4,),
        device="cpu", init=str(run), out="runs/iodine-long-0"))
    keep(monkeypatch, capsys, "runs/iodine-long-0")
    minutes = second["minutes"] + json.loads((run / "evaluation.json").read_text())["minutes"]
    kept = json.loads(Path("RESULTS/iodine-long-cpu-0.json").read_text())
    saved = torch.load("WEIGHTS/iodine-long.pt", weights_only=True)
    assert [kept["minutes"], saved["minutes"]] == pytest.approx([minutes] * 2)


def test_the_course_of_training_is_twenty_means(tmp_path):
    records = [dict(step=i, seconds=60.0 * i, ari_fg=i / 40) for i in range(40)]
    write = (tmp_path / "metrics.jsonl").write_text
    write("".join(f"{json.dumps(record)}\n" for record in records))
    course = results.training_course(tmp_path, before=3.0)
    assert course == [[2 * i + 3.5, pytest.approx((2 * i + 0.5) / 40, abs=6e-4)] for i in range(20)]
    write("".join(f"{json.dumps(record)}\n" for record in records[:19]))
    assert results.training_course(tmp_path, 0.0) == []


def test_float32_where_float16_moves_a_score(run, monkeypatch, capsys):
    monkeypatch.setattr(results, "moved", lambda *_: ["ari_fg"])
    keep(monkeypatch, capsys, run)
    content = torch.load("WEIGHTS/iodine-quick.pt", weights_only=True)
    assert all(value.dtype == torch.float32 for value in content["model"].values())


def test_moved():
    score = dict(a=dict(mean=1.0, stderr=0.1), b=dict(mean=None, stderr=None))
    assert results.moved(score, dict(a=dict(mean=1.009), b=dict(mean=None))) == []
    assert results.moved(score, dict(a=dict(mean=1.02), b=dict(mean=None))) == ["a"]


def test_what_cannot_be_kept_is_said_in_one_line(run, monkeypatch, capsys):
    assert "only a finished run" in keep(monkeypatch, capsys, "nowhere")
    monkeypatch.setattr(results, "LIMIT", 10)
    assert "more than 10" in keep(monkeypatch, capsys, run)
    changed = json.loads((run / "evaluation.json").read_text()) | dict(steps=1)
    checkpoints.write_json(run / "evaluation.json", changed)
    assert "evaluate it with --eval-only" in keep(monkeypatch, capsys, run)


# -- DCI -------------------------------------------------------------------------------------------


class Known:
    """A model whose slots are the objects, in another order, and whose codes are four factors and
    noise. Of the first scene of each batch it finds a single pixel of every object.

    It has the methods of all three models, and cheats: it keeps the scenes that it makes noise for.
    """

    config = SimpleNamespace(num_steps_final=1, test_iterations=3)
    order = torch.tensor((2, 0, 3, 1)).argsort()  # the entities of the slots

    def noise(self, scenes: data.Scenes, index: Tensor, num_steps: int = 2) -> Tensor:
        self.batch, g = scenes.scenes(index), torch.Generator().manual_seed(int(index[0]))
        return torch.randn(len(index), 4, 5, num_steps, generator=g)

    def encode(self, image: Tensor, noise: Tensor, num_iterations: int) -> list[tuple]:
        assert num_iterations == 3, "number of iterations is off"
        factors = [self.batch.factors[name] for name in ("color_id", "shape", "row", "col")]
        code = torch.stack([*factors, noise[:, :, 0, 0]], -1).float()[:, self.order]  # (B, K, D)
        return [(0 * code, None), (code, None)]

    def decode(self, slots: Tensor) -> Tensor:
        masks = self.batch.masks.clone()
        pixels = masks[0].flatten(1)
        pixels[1:] &= pixels[1:].long().cumsum(1) == 1
        pixels[0] = ~pixels[1:].any(0)
        logits = 50 * masks[:, self.order, None].float()
        return torch.cat([torch.zeros(*masks.shape[:2], 3, *masks.shape[2:]), logits], 2)

    def infer(self, image: Tensor, noise: Tensor) -> list[SimpleNamespace]:
        slots = self.encode(image, noise, 3)[-1][0]
        posterior = torch.cat([slots, torch.full_like(slots, -30.0)], -1)
        return [None, SimpleNamespace(posterior=posterior, decoded=self.decode(slots))]


def check_dci(name: str, module: ModuleType = results) -> None:
    """The perfect code is found in the slots that match."""
    scenes, asked = data.make("mini_sprites", "test"), {}

    def scored(codes: Tensor, factors: dict[str, Tensor]) -> dict[str, float]:
        asked.update(codes=codes, factors=factors)
        return dict(disentanglement=1.0)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(metrics, "dci", scored)
        result = module.dci(name, Known(), scenes)
    present = scenes.batch(0, 320).present[:, 1:].clone()
    present[::32] = False
    pairs = int(present.sum())
    assert result == dict(disentanglement=1.0, pairs=pairs) and len(asked["codes"]) == pairs
    for latent, factor in enumerate(("color_id", "shape", "row", "col")):
        assert torch.equal(asked["codes"][:, latent], asked["factors"][factor].float()), factor


@pytest.mark.parametrize("name", results.SLOT_MODELS)
def test_dci_is_of_the_slots_that_match(name):
    check_dci(name)


def test_dci_needs_slots_and_masks():
    pictures = SimpleNamespace(batch=lambda start, size: SimpleNamespace(masks=None))
    assert results.dci("iodine", Known(), pictures) == {}
    assert results.dci("mvae", Known(), data.make("mini_sprites", "test")) == {}


@pytest.mark.parametrize(("old", "new"), [
    (", least_iou=0.1)", ")"),  # any slot that shares a pixel
    ("slots[scene, owners[scene, entity + 1]]", "slots[scene, entity + 1]"),  # not matched
    ("numbers[scene, entity + 1]", "numbers[scene, entity]"),  # the next entity's factors
])  # fmt: skip
def test_mutants_of_dci_are_caught(old, new):
    with pytest.raises(AssertionError):
        check_dci("slot_attention", mutants.mutated(results, old, new))
