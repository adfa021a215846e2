"""What all models share, one test for all of them: presets, two steps, weights, documentation."""

import ast
import dataclasses
import functools
import json
import re
import tomllib
from pathlib import Path

import numpy as np
import pytest
import results
import test_files
import torch
from checks import command_line
from PIL import Image

import air
import apdr
import data
import efficient_morl
import iodine
import kernels
import mvae
import slot_attention
from data import checkpoints, metrics, runs
from kernels import benchmark

ROOT = Path(__file__).parent.parent
MODELS = {module.__name__: module
          for module in (iodine, efficient_morl, slot_attention, air, apdr, mvae)}
WEIGHTS = sorted((ROOT / "notebooks" / "weights").glob("*.pt"))
PRESETS = [(name, preset) for name, module in MODELS.items() for preset in module.PRESETS]
models = pytest.mark.parametrize("name", MODELS)
NOT_AIR = ("iodine", "efficient_morl", "slot_attention", "mvae")
# Small enough that two steps and an evaluation take a second.
TINY = {
    "iodine": dict(decoder_channels=(4,), refinement_channels=(4,), latent_size=4),
    "efficient_morl": dict(decoder_channels=(4,), encoder_channels=(4,), latent_size=4),
    "slot_attention": dict(decoder_channels=(4,), encoder_channels=(4,), latent_size=4),
    "air": dict(lstm_size=16, latent_size=4, encoder_sizes=(8,), decoder_sizes=(8,)),
    "apdr": dict(lstm_size=8, hidden_size=8, latent_size=4, num_samples=1),
    "mvae": dict(encoder_channels=(4, 4, 4), hidden_size=8, latent_size=4),
}
ANY_SCENES = {"mvae": dict(single_steps=0)}  # quick begins with scenes of one sprite


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with kernels.use("auto"):
        yield


@pytest.fixture
def quick_evaluation(monkeypatch):
    """A few scenes and no pictures."""
    for module in MODELS.values():
        monkeypatch.setattr(module, "evaluate", lambda model, scenes, *_: dict(metrics={}))
        monkeypatch.setattr(module, "draw", lambda *_: None)


def tiny(name: str, **changes) -> runs.RunConfig:
    small = dict(steps=2, batch_size=4, log_every=1, device="cpu")
    return MODELS[name].make_config(**small | TINY[name] | changes)


# -- presets and options ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name in MODELS if name != "apdr"])
def test_a_model_of_images_refuses_sequences(name):
    with pytest.raises(runs.UserError, match=r"moving_mnist: (sequences|choose one)"):
        MODELS[name].check(tiny(name, dataset="moving_mnist", **ANY_SCENES.get(name, {})))


@pytest.mark.parametrize(("name", "preset"), PRESETS)
def test_every_preset_can_be_built_and_called(name, preset):
    module = MODELS[name]
    config = module.make_config(preset, device="cpu")
    module.check(config)
    model = module.build(config, data.make(config.dataset, device="cpu"))
    assert all(p.isfinite().all() for p in model.parameters())
    if config.init:  # of a preset that continues from kept weights
        content = checkpoints.load(ROOT / config.init, name)
        checkpoints.load_state(model, content["model"], config.init)


@models
def test_at_most_thirty_fields_each_with_a_comment(name):
    module = MODELS[name]
    fields, common = ({f.name for f in dataclasses.fields(config)}
                      for config in (module.Config, runs.RunConfig))
    own = fields - common
    assert len(own) <= 30
    lines = (ROOT / f"{name}.py").read_text().splitlines()
    for field in own:
        definition = next(line for line in lines if re.match(rf"    {field}: ", line))
        assert "  # " in definition or lines[lines.index(definition) - 1].lstrip().startswith("#")


@models
def test_the_docstring_names_every_departure_of_quick(name):
    """The defaults of Config are the paper's; each field that quick changes stands in the table."""
    module = MODELS[name]
    text = re.sub(r"[ \n]+", " ", module.__doc__)
    quick, paper = module.make_config("quick"), module.Config()
    for field in dataclasses.fields(module.Config):
        if field.name not in ("preset", "steps") and (
            getattr(quick, field.name) != getattr(paper, field.name)
        ):
            assert re.search(rf"\b{field.name}\b", text), field.name


@models
def test_no_function_is_longer_than_sixty_lines(name):
    tree = ast.parse((ROOT / f"{name}.py").read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef):
            limit = 30 if node.name == "train" else 60
            assert node.end_lineno - node.lineno < limit, node.name


@models
@pytest.mark.parametrize("line", [
    "--dataset nonsense", "--batch-size 0", "--lr nan", "--latent-size 0", "--preset nonsense",
    "--resume nowhere", "--eval-only", "--device nonsense",
])  # fmt: skip
def test_what_cannot_be_is_refused_in_one_line(monkeypatch, capsys, name, line):
    status, _, error = command_line(monkeypatch, capsys, MODELS[name], *line.split())
    assert status == 2 and len(error.splitlines()) == 1 and error.startswith(f"{name}.py: ")
    assert not list(Path().iterdir())


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device here")
@models
def test_triton_where_it_cannot_run_is_refused_in_one_line(monkeypatch, capsys, name):
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    status, _, error = command_line(monkeypatch, capsys, MODELS[name], "--kernels", "triton")
    assert status == 2 and len(error.splitlines()) == 1
    assert "--kernels" in error or "triton" in error


@pytest.mark.parametrize("name", [module.__name__ for module in benchmark.MODELS])
def test_noise_is_a_function_of_the_scene_and_the_seed(name):
    module, noise = MODELS[name], benchmark.MODELS[MODELS[name]]
    scenes = data.make(tiny(name).dataset)
    model, other = (module.build(tiny(name, seed=seed), scenes) for seed in (0, 1))
    index = torch.tensor([5, 2**40, 7])
    draws = (noise(m, scenes, i) for m, i in ((model, index), (model, index[2:]), (other, index)))
    for whole, last, others in zip(*draws, strict=True):
        assert len(whole.unique()) == whole.numel()
        assert torch.equal(whole[2:], last) and not torch.equal(whole, others)


# -- training --------------------------------------------------------------------------------------


@models
def test_same_seed_same_training_and_resume_is_exact(name, quick_evaluation):
    module = MODELS[name]
    for folder, steps in dict(a=4, b=2).items():
        module.train(tiny(name, steps=steps, out=folder))
    line = ["--resume", "b", "--steps", "4"]
    module.train(runs.parse(name, module.Config, module.PRESETS, line))
    a, b = (torch.load(f"{folder}/checkpoint.pt", weights_only=True) for folder in "ab")
    for key, value in a["model"].items():
        assert torch.equal(value, b["model"][key]), key
    logs = [[{k: v for k, v in json.loads(line).items() if "seconds" not in k}
             for line in Path(folder, "metrics.jsonl").read_text().splitlines()] for folder in "ab"]
    assert logs[0] == logs[1] and len(logs[0]) == 4


@models
def test_a_run_writes_what_it_says(name, capsys):
    """With its real evaluation and figures, on the smallest network; numpy's numbers as options."""
    module = MODELS[name]
    result = module.train(tiny(name, lr=np.float64(1e-3), seed=np.int64(1), out=Path("run")))
    printed = capsys.readouterr().out.splitlines()
    assert printed[-1].startswith("look at  run") and Path(printed[-1].split()[-1]).exists()
    assert any(line.startswith("  kernels  ") for line in printed)
    assert json.loads(Path("run/evaluation.json").read_text()) == json.loads(json.dumps(result))
    for score in result["metrics"].values():
        assert {"mean", "stderr", "n"} <= score.keys()
    assert result["command"].startswith(f"python {name}.py --seed 1 --steps 2")
    module.load_model("run")


@pytest.mark.parametrize("name", ["iodine", "efficient_morl"])
def test_training_scenes_may_be_others(name, quick_evaluation, monkeypatch):
    with pytest.raises(runs.UserError, match="--train-dataset: images of "):
        MODELS[name].check(tiny(name, train_dataset="tetrominoes"))
    made, make = {}, data.make
    monkeypatch.setattr(data, "make", lambda *a, **b: made.update({a[1:2]: a[0]})
                        or make(*a, **b))
    MODELS[name].train(tiny(name, preset="quick_same_color"))
    assert made[("train",)] == "mini_sprites_16_shaded"
    assert made[("test",)] == "mini_sprites_16_same_color"


@pytest.mark.parametrize("kind", ["binarized", "clevr"])  # test_files.py reads every kind
@pytest.mark.parametrize("name", NOT_AIR)  # it needs boxes
def test_official_files_are_trained_on(name, kind, tmp_path, monkeypatch):
    """Two steps on a file of one channel or three, then an evaluation of four scenes."""
    path, module = test_files.write_records(tmp_path / "official", kind, 5), MODELS[name]
    monkeypatch.setattr(module, "evaluate", functools.partial(module.evaluate, count=4))
    monkeypatch.setattr(module, "draw", lambda *_: None)
    result = module.train(tiny(name, dataset=f"{path}@16", out="run", **ANY_SCENES.get(name, {})))
    assert result["steps"] == 2 and ("ari_fg" in result["metrics"]) == (name != "mvae")


@pytest.mark.parametrize("name", NOT_AIR)
def test_pictures_without_masks_are_trained_on(name, tmp_path, monkeypatch):
    """Scores that need masks are left out; pictures are drawn all the same."""
    (tmp_path / "pictures").mkdir()
    for i in range(10):
        pixels = np.random.default_rng(i).integers(0, 255, (20, 24, 3), np.uint8)
        Image.fromarray(pixels).save(tmp_path / "pictures" / f"{i}.png")
    module = MODELS[name]
    monkeypatch.setattr(module, "evaluate", functools.partial(module.evaluate, count=4))
    more = ANY_SCENES.get(name, {})
    result = module.train(tiny(name, dataset="pictures@16", out="run", **more))
    assert "mse" in result["metrics"] and not {"ari_fg", "ari", "miou"} & result["metrics"].keys()
    assert list(Path("run/figures").glob("*.png"))


# -- what is committed -----------------------------------------------------------------------------


@pytest.mark.parametrize("path", WEIGHTS, ids=lambda path: path.stem)
@pytest.mark.parametrize("options", ["--eval-only", "--eval-only --device cpu --kernels torch"])
def test_committed_weights_open_with_every_option(monkeypatch, capsys, quick_evaluation, path,
                                                  options):
    name = path.stem.partition("-")[0]
    if name in ("mvae", "air", "apdr"):
        options = options.replace(" --kernels torch", "")
    resume = functools.partial(command_line, monkeypatch, capsys, MODELS[name], "--resume", path)
    status, _, error = resume(*options.split())
    assert status == 0, error
    assert Path("runs").is_dir() and not list(path.parent.glob("*.json.tmp"))
    status, _, error = resume("--steps", 10**6)
    assert status == 2 and "weights alone" in error
    assert path.stat().st_size <= 2 * 2**20


@pytest.mark.parametrize("path", WEIGHTS, ids=lambda path: path.stem)
def test_committed_weights_score_what_is_printed_beside_them(path):
    """On a few test scenes, within what a few may differ by."""
    name, kept = path.stem.partition("-")[0], json.loads(path.with_suffix(".json").read_text())
    model, index = MODELS[name].load_model(path), torch.arange(8)
    scenes = data.make(model.config.dataset, "test", kept["seed"])
    if name in results.SLOT_MODELS:
        *_, decoded = results.infer(name, model, scenes, index)
        found = metrics.ari(scenes.scenes(index).masks, decoded[:, :, -1].softmax(1))
        found = dict(ari_fg=metrics.mean_stderr(found))
    else:
        found = MODELS[name].evaluate(model, scenes, 16)["metrics"]
    metric = next(m for m in ("ari_fg", "count_accuracy", "mse") if m in found)
    assert found[metric]["mean"] == pytest.approx(kept["metrics"][metric], rel=0.3)


@models
def test_script_block_is_requirements(name):
    """`uv run` installs what requirements.txt has, but for tests and notebooks."""
    text = (ROOT / f"{name}.py").read_text()
    block = re.match(r"# /// script\n(.*?)# ///\n", text, re.S)[1]
    block = tomllib.loads(re.sub("^# ?", "", block, flags=re.M))
    lines = (ROOT / "requirements.txt").read_text().replace('"', "'").splitlines()
    needed = {line for line in lines if re.match(r"[a-z]", line)}
    tools = ("pytest", "hypothesis", "ruff", "jupyterlab", "ipykernel", "nbclient", "nbformat")
    assert block["requires-python"] == ">=3.11"
    assert set(block["dependencies"]) == {n for n in needed if not n.startswith(tools)}
