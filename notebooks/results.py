"""Keeps what runs have measured, and fills the tables of the README with it.

    python notebooks/results.py keep runs/iodine-quick-0        evaluation, weights and figures
    python notebooks/results.py keep --scores runs/iodine-quick-[1-9]
    python notebooks/results.py floors tetrominoes              what no learning scores there
    python notebooks/results.py table                           README.md, between its markers

`keep` writes, named after the run (iodine-quick):

    results/iodine-quick-cpu-0.json    evaluation.json and `further` scores: of slots DCI; without
                                       --scores what the model's further_scores(model, scenes) gives
                                       and the `course` of training; minutes are with those of the
                                       run whose weights it began with (--init)
    weights/iodine-quick.pt, .json     the checkpoint without its optimizer, in float16 where that
                                       moves no score by more than a tenth of its standard error;
                                       where it is from, and its scores
    figures/iodine-quick-*.png         the pictures that are here already, and those of --figures

A table of README.md stands between `<!-- begin NAME -->` and `<!-- end NAME -->`; TABLES has them.
"""

import argparse
import importlib
import io
import json
import re
import shutil
import statistics
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy import ndimage
from sklearn.cluster import KMeans
from torch import Tensor

NOTEBOOKS = Path(__file__).resolve().parent
sys.path.insert(0, str(NOTEBOOKS.parent))

import data  # noqa: E402
from data import checkpoints, metrics, runs  # noqa: E402

RESULTS, WEIGHTS, FIGURES = (NOTEBOOKS / name for name in ("results", "weights", "figures"))
SLOT_MODELS = "iodine", "efficient_morl", "slot_attention"
LIMIT = 2 * 2**20  # bytes of a file of weights: everybody who clones downloads it
FLOOR_SCENES = 320  # of the test split, as many as a run evaluates
COUNT_IMAGES = 12_800  # for the most frequent number, and for how often it is right (mvae.py's)

# -- keep ------------------------------------------------------------------------------------------


def read_run(run: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """evaluation.json and the checkpoint of a finished run; UserError where one is missing."""
    path = run / "evaluation.json"
    runs.require(path.exists(), f"{path}: no such file; only a finished run has one")
    evaluation = json.loads(path.read_text())
    checkpoint = checkpoints.load(run, evaluation["model"])
    runs.require(checkpoint["step"] == evaluation["steps"],
                 f"{path}: of step {evaluation['steps']}, and the checkpoint is of step "
                 f"{checkpoint['step']}; evaluate it with --eval-only")
    return evaluation, checkpoint


def pack(checkpoint: dict[str, Any], half: bool) -> bytes:
    """What load_model reads of a checkpoint, without where it was trained, as a file's bytes."""
    kept = {name: value for name, value in checkpoint.items() if name != "optimizer"}
    here = {"out", "resume", "mnist_dir"} & checkpoint["config"].keys()
    kept["config"] = checkpoint["config"] | dict.fromkeys(here, "")
    kept["model"] = {name: value.half() if half and value.is_floating_point() else value
                     for name, value in checkpoint["model"].items()}
    buffer = io.BytesIO()
    torch.save(kept, buffer)
    return buffer.getvalue()


def moved(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """The metrics whose mean differs by more than a tenth of its standard error."""
    return [name for name, score in before.items() if score["mean"] is not None
            and abs(after[name]["mean"] - score["mean"]) > 0.1 * (score.get("stderr") or 0)]


def choose_precision(run: Path, module: Any, checkpoint: dict[str, Any],
                     evaluation: dict[str, Any], test: data.Scenes) -> bytes:
    """The weights in float16, in float32 where that moves a score; UserError beyond LIMIT."""
    path = run / "kept.pt"
    checkpoints.write(path, pack(checkpoint, half=True))
    if moved(evaluation["metrics"], module.evaluate(module.load_model(path), test)["metrics"]):
        checkpoints.write(path, pack(checkpoint, half=False))
    content = path.read_bytes()
    path.unlink()
    runs.require(len(content) <= LIMIT, f"{run}: weights of {len(content):,} bytes, more than "
                                        f"{LIMIT:,}; keep its --scores")
    return content


def training_course(run: Path, before: float) -> list[list[float]]:
    """Minutes and ARI-FG of the scenes in training: means over twenty parts of a run."""
    points = [(before + record["seconds"] / 60, record["ari_fg"]) for record in runs.read_log(run)
              if record.get("ari_fg") is not None]
    parts = np.array_split(np.array(points), 20) if len(points) >= 20 else []
    return [part.mean(0).round(3).tolist() for part in parts]


def keep(run: Path, scores_only: bool, pictures: Iterable[str]) -> None:
    """One finished run into results/, and unless `scores_only` weights/ and figures/."""
    evaluation, checkpoint = read_run(run)
    module = importlib.import_module(evaluation["model"])
    init = checkpoint["config"]["init"]  # the training of the weights that it began with counts
    before = checkpoints.load(init, evaluation["model"])["minutes"] if init else 0.0
    evaluation["minutes"] = checkpoint["minutes"] = before + evaluation["minutes"]
    name = f"{evaluation['model']}-{evaluation['preset']}"
    # runs/iodine-quick-0 is the preset itself; a folder with another name is a variation of it.
    if not re.fullmatch(rf"{name}-\d+(-\d+)?", run.name):
        name = run.name.removesuffix(f"-{evaluation['seed']}")
    model, further = module.load_model(run), {}
    maker = getattr(module, "make_scenes", lambda c, split: data.make(c.dataset, split, c.seed))
    test = maker(model.config, "test")
    if hasattr(module, "further_scores") and not scores_only:
        further |= module.further_scores(model, test)
    if (course := training_course(run, before)) and not scores_only:
        evaluation |= dict(course=course)
    if scores := dci(evaluation["model"], model, test):
        further |= dict(dci=scores)
    evaluation |= dict(further=further) if further else {}
    content = None if scores_only else choose_precision(run, module, checkpoint, evaluation, test)
    kind = "cuda" if "NVIDIA" in evaluation["device"] else "cpu"
    checkpoints.write_json(RESULTS / f"{name}-{kind}-{evaluation['seed']}.json", evaluation)
    if content is None:
        return
    path = WEIGHTS / f"{name}.pt"
    checkpoints.write(path, content)
    origin = "model", "preset", "command", "seed", "device", "minutes", "steps", "commit"
    means = {metric: score["mean"] for metric, score in evaluation["metrics"].items()}
    checkpoints.write_json(path.with_suffix(".json"), {key: evaluation[key] for key in origin}
                    | dict(metrics=means))
    here = {picture.name.removeprefix(f"{name}-") for picture in FIGURES.glob(f"{name}-*")}
    for picture in here.union(pictures) & {path.name for path in (run / "figures").iterdir()}:
        shutil.copyfile(run / "figures" / picture, FIGURES / f"{name}-{picture}")


@torch.no_grad()
def infer(name: str, model: torch.nn.Module, scenes: data.Scenes, index: Tensor) -> list[Tensor]:
    """As in a test: slots, of posteriors their means, (B, K, D), and decodes (B, K, C+1, H, W)."""
    image = scenes.scenes(index).image
    if name == "slot_attention":
        slots, _ = model.encode(image, model.noise(scenes, index), model.config.test_iterations)[-1]
        return [slots, model.decode(slots)]
    num_steps = [model.config.num_steps_final] if name == "efficient_morl" else []
    last = model.infer(image, model.noise(scenes, index, *num_steps))[-1]
    return [last.posterior.chunk(2, -1)[0], last.decoded]


def dci(name: str, model: torch.nn.Module, scenes: data.Scenes) -> dict[str, Any]:
    """As EfficientMORL's paper measures it (app. E.2): masks match slots to the objects of 320
    scenes, those with an IoU above 0.1. Empty for models without slots and scenes without masks."""
    codes, factors = [], {}
    if name not in SLOT_MODELS or scenes.batch(0, 1).masks is None:
        return {}
    for index in torch.arange(min(320, scenes.count), device=scenes.device).split(32):
        batch, (slots, decoded) = scenes.scenes(index), infer(name, model, scenes, index)
        masks = decoded[:, :, -1].softmax(1).nan_to_num()  # (B, K, H, W)
        owners = metrics.match(batch.masks, masks, least_iou=0.1)  # slots, (B, E)
        scene, entity = (batch.present & (owners >= 0))[:, 1:].nonzero().unbind(1)
        codes.append(slots[scene, owners[scene, entity + 1]])
        for factor, numbers in batch.factors.items():
            factors.setdefault(factor, []).append(numbers[scene, entity + 1])
    codes = torch.cat(codes)
    scores = metrics.dci(codes, {factor: torch.cat(numbers) for factor, numbers in factors.items()})
    return scores | dict(pairs=len(codes))


def no_learning(image: torch.Tensor, num_slots: int, seed: int) -> dict[str, np.ndarray]:
    """Three ways to take an image (C, H, W) apart: masks (1, K, H, W), bool.

    one_hue: connected components (4 neighbours) of one hue, a pixel's colours over the largest, or
    of one brightness where there is one channel, to a twentieth. kmeans: of colour and place (the
    side counts half as much as black to white), num_slots clusters, the best of four starts.
    voronoi: the nearest of num_slots random points, which never sees the image.
    """
    image = image.double().cpu().numpy()
    channels, *size = image.shape
    place = (np.indices(size) + 0.5) / np.reshape(size, (2, 1, 1))  # (2, H, W) in [0, 1]
    hue = image if channels == 1 else image / image.max(0).clip(1e-9)
    features = np.concatenate([image, place / 2]).reshape(channels + 2, -1).T  # (H W, C + 2)
    points = np.random.default_rng(seed).random((num_slots, 2, 1, 1))
    segments = dict(
        one_hue=components(np.round(hue * 20)),
        kmeans=KMeans(num_slots, n_init=4, random_state=seed).fit_predict(features).reshape(size),
        voronoi=((place - points) ** 2).sum(1).argmin(0),
    )
    return {k: s == np.arange(s.max() + 1)[None, :, None, None] for k, s in segments.items()}


def components(values: np.ndarray) -> np.ndarray:
    """The connected components of equal values: (C, H, W) -> numbers from 0, (H, W)."""
    height, width = values.shape[1:]
    # Pixels are at the even places; between two of them is a bridge where they are equal.
    grid = np.zeros((2 * height - 1, 2 * width - 1), dtype=bool)
    grid[::2, ::2] = True
    grid[1::2, ::2] = (values[:, 1:] == values[:, :-1]).all(0)
    grid[::2, 1::2] = (values[:, :, 1:] == values[:, :, :-1]).all(0)
    return ndimage.label(grid)[0][::2, ::2] - 1


def dataset_floors(scenes: data.Scenes) -> dict[str, Any]:
    """What no learning scores on FLOOR_SCENES of these scenes.

    Where each pixel has one owner: ari_fg, ari, miou of `no_learning`, with as many slots
    as entities. Where objects blend: how often the number is right that is the most frequent one
    in training; both of COUNT_IMAGES.
    """
    num_slots, floors, first = scenes.max_entities, {}, scenes.batch(0, 1)
    blended = first.coverage is not None
    number = COUNT_IMAGES // scenes.length if blended else min(FLOOR_SCENES, scenes.count)
    if blended:
        seen, counts = (torch.cat([  # of each frame, (scenes, T)
            part.scenes(index).present[..., 1:].sum(-1).reshape(len(index), -1)
            for index in torch.arange(number).split(320)
        ]) for part in (data.make(scenes.name, "train", scenes.seed), scenes))
        right = (counts == seen.flatten().mode().values).double().mean(1)
        floors["most_frequent_count"] = dict(count_accuracy=right)
    elif first.masks is not None:
        for i in range(number):  # one by one, as a photograph has thousands of components
            image, masks, present, *_ = scenes.batch(i, 1)
            for name, found in no_learning(image[0], num_slots, i).items():
                floor = floors.setdefault(name, dict(ari_fg=[], ari=[], miou=[]))
                floor["ari_fg"].append(metrics.ari(masks, found).item())
                floor["ari"].append(metrics.ari(masks, found, foreground=False).item())
                floor["miou"].append(metrics.miou(masks, present, found).item())
    for floor in floors.values():
        floor.update({name: metrics.mean_stderr(values) for name, values in floor.items()})
    command = f"python notebooks/results.py floors {scenes.name}"
    return dict(command=command, dataset=scenes.name, split=scenes.split, seed=scenes.seed,
                scenes=number, num_slots=num_slots, floors=floors)  # fmt: skip


def keep_floors(name: str) -> None:
    """What no learning scores on the test scenes of a data set, into results/."""
    content = dataset_floors(data.make(name, "test"))
    checkpoints.write_json(RESULTS / f"floors-{name}.json", content)


# -- tables ----------------------------------------------------------------------------------------


def values(pattern: str, path: str) -> list[float]:
    """The number at `path` ("metrics.ari_fg.mean") of every file of results/ that has it."""
    found = []
    for file in sorted(RESULTS.glob(pattern)):
        content = json.loads(file.read_text())
        try:
            for key in path.split("."):
                content = content[int(key)] if isinstance(content, list) else content[key]
        except (KeyError, IndexError):
            continue
        found.append(content)
    return found


def spread(numbers: list[float], form: str = "{:.3f}", seeds: int = 0) -> str:
    """Median and range: 0.961 (0.945 to 0.972); of fewer numbers than `seeds` also how many."""
    if not numbers:
        return "–"
    middle, least, most = (form.format(f(numbers)) for f in (statistics.median, min, max))
    notes = [f"{least} to {most}"] if len(numbers) > 1 else []
    notes += [str(len(numbers))] if len(numbers) < seeds else []
    return f"{middle} ({'; '.join(notes)})" if notes else middle


def markdown(head: list[str], rows: Iterable[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


# model, preset, metric, goal, published (which paper's table, or that there is none)
ROWS = [
    ("iodine", "quick", "ari_fg", 0.95, "–"),
    ("iodine", "quick", "miou", 0.9, "–"),
    ("iodine", "quick_same_color", "ari_fg", 0.8, "–"),
    ("iodine", "tetrominoes_long", "ari_fg", 0.95, "0.992 ± 0.004"),
    ("iodine", "tetrominoes_long", "miou", 0.85, "–"),
    ("iodine", "multi_dsprites_long", "ari_fg", 0.77, "0.767 ± 0.056"),
    ("iodine", "multi_dsprites_binarized_short", "ari_fg", 0.65, "0.648 ± 0.172"),
    ("iodine", "solids_long", "ari_fg", 0.9, "–"),
    ("iodine", "shapes_short", "ari_fg", 0.91, "0.910 ± 0.119"),
    ("efficient_morl", "quick", "ari_fg", 0.95, "–"),
    ("efficient_morl", "quick", "miou", 0.9, "–"),
    ("efficient_morl", "quick_same_color", "ari_fg", 0.8, "–"),
    ("efficient_morl", "mini_tetrominoes", "ari_fg", 0.95, "–"),
    ("efficient_morl", "mini_tetrominoes", "miou", 0.85, "–"),
    ("efficient_morl", "tetrominoes_long", "ari_fg", 0.98, "0.982 ± 0.018"),
    ("efficient_morl", "solids_short", "ari_fg", 0.9, "–"),
    ("slot_attention", "quick", "ari_fg", 0.9, "–"),
    ("slot_attention", "quick", "miou", 0.9, "–"),
    ("slot_attention", "tetrominoes_long", "ari_fg", 0.95, "0.995 ± 0.002"),
    ("slot_attention", "multi_dsprites_short", "ari_fg", 0.9, "0.913 ± 0.003"),
    ("slot_attention", "solids_short", "ari_fg", 0.9, "–"),
    ("air", "quick", "count_accuracy", 0.97, "–"),
    ("air", "multi_mnist", "count_accuracy", 0.97, "0.987 (Pyro)"),
    ("apdr", "quick", "count_accuracy", 0.95, "–"),
    ("apdr", "moving_mnist", "count_accuracy", 0.98, "0.9986 (SQAIR)"),
    ("mvae", "quick", "count_accuracy", 0.85, "0.726 (at 64 x 64)"),
    ("mvae", "sprites3_short", "count_accuracy", 0.726, "0.726"),
    ("mvae", "sprites8_short", "count_accuracy", 0.5, "–"),
]


def floor(dataset: str, metric: str) -> str:
    """The best score of a floor of the data set, with its name."""
    scores = {name: values[metric]["mean"] for name, values in runs.floors(dataset).items()
              if metric in values}
    best = max(scores, key=scores.get, default=None)
    return f"{scores[best]:.3f} {best.replace('_', ' ')}" if best else "–"


def results_table() -> str:
    rows = []
    for model, preset, metric, goal, published in ROWS:
        config = importlib.import_module(model).make_config(preset)
        pattern = f"{model}-{preset}-c[pu]*-[0-9].json"
        scores, minutes = (values(pattern, path) for path in (f"metrics.{metric}.mean", "minutes"))
        good = f"{sum(score > goal for score in scores)}/{len(scores)} above {goal}"
        rows.append([f"`{model}.py`", f"`{preset}`", f"`{config.dataset}`", f"`{metric}`",
                     spread(scores) if scores else "no result yet", good if scores else "–",
                     floor(config.dataset, metric), published, spread(minutes, "{:.1f}")])
    return markdown(["file", "preset", "data", "score", "measured", "seeds", "floor", "published",
                     "minutes"], rows)


def records_table() -> str:
    """Of every row with a target that its median seed reaches: the minutes that this took."""
    rows = []
    for model, preset, metric, target, _ in ROWS:
        config = importlib.import_module(model).make_config(preset)
        pattern = f"{model}-{preset}-c[pu]*-[0-9].json"
        scores = values(pattern, f"metrics.{metric}.mean")
        if scores and statistics.median(scores) > target:
            commits = {commit[:7] for commit in values(pattern, "commit")}
            minutes = values(pattern, "minutes")
            rows.append((config.dataset, metric, statistics.median(minutes), [
                f"`{config.dataset}`", f"`{metric}` {target}", f"`{model}.py --preset {preset}`",
                spread(minutes, "{:.1f}"), ", ".join(sorted(commits))]))
    head = ["data", "target", "set by", "minutes", "commit"]
    return markdown(head, [row for *_, row in sorted(rows, key=lambda row: row[:3])])


def floors_table() -> str:
    """One row a data set; scores of one method joined by slashes."""
    kinds = "one_hue", "kmeans", "voronoi", "most_frequent_count"
    rows = []
    for name in data.DATASETS:
        floors = runs.floors(name)
        scores = [[f"{score['mean']:.3f}" for score in floors.get(kind, {}).values()]
                  for kind in kinds]
        if floors:
            rows.append([f"`{name}`", *(" / ".join(score) or "–" for score in scores)])
    return markdown(["data", "components of one hue", "k-means", "random Voronoi cells",
                     "most frequent number"], rows)


def table(rows: dict[str, str], columns: dict[str, tuple[str, str]], first: str) -> str:
    """Rows: label -> files, or files:prefix of the path. Columns: heading -> (path, format). A row
    without any file is left out; a number that some files lack says of how many it is."""
    lines = []
    for label, source in rows.items():
        pattern, _, prefix = source.partition(":")
        if seeds := len([*RESULTS.glob(pattern)]):
            lines.append([label, str(seeds), *(spread(values(pattern, prefix + path), form, seeds)
                                               for path, form in columns.values())])
    return markdown([first, "seeds", *columns], lines)


def stages_table() -> str:
    names = ["layer 1", "layer 2", "layer 3", "1 step of refinement (as trained)", "2 steps",
             "3 steps"]
    rows = {name: f"efficient_morl-quick-cpu-*.json:settings.{i}.metrics."
            for i, name in enumerate(names)}
    columns = {"`ari_fg`": ("ari_fg.mean", "{:.3f}"), "`miou`": ("miou.mean", "{:.3f}"),
               "`mse`": ("mse.mean", "{:.4f}"),
               "KL of all layers, nats": ("kl_hierarchy.mean", "{:.0f}"),
               "KL of the refined posterior, nats": ("kl.mean", "{:.0f}")}
    return table(rows, columns, "decoded after")


SEGMENTATION = {f"`{name}`": (f"metrics.{name}.mean", form) for name, form in dict(
    ari_fg="{:.3f}", ari="{:.3f}", miou="{:.3f}", mse="{:.4f}").items()}


def ablations_table() -> str:
    """`quick` with one of its departures undone, each over the seeds that are here."""
    names = {"IODINE": "iodine-quick",
             "IODINE, colours never flat": "iodine-quick-no-flat",
             "IODINE, sigma 0.2 from the start": "iodine-quick-no-soft",
             "IODINE, no spare slot": "iodine-quick-no-spare",
             "IODINE, learning rate 3e-4": "iodine-quick-paper-lr",
             "IODINE, mean pooling": "iodine-quick-mean-pooling",
             "IODINE, step weights t/T": "iodine-quick-linear-weights",
             "IODINE, decoder of 3 x 3": "iodine-quick-3x3",
             "IODINE, deconvolution decoder, bfloat16": "iodine-quick-deconv",
             "IODINE, 4 decodes in training, 8 in tests": "iodine-quick-4-steps",
             "IODINE, 9 decodes in training, 8 in tests": "iodine-quick-9-steps",
             "IODINE, 9 slots": "iodine-quick-9-slots",
             "EfficientMORL": "efficient_morl-quick",
             "EfficientMORL, colours never flat": "efficient_morl-quick-no-flat",
             "EfficientMORL, no spare slot": "efficient_morl-quick-no-spare",
             "EfficientMORL, mean of values": "efficient_morl-quick-no-sum",
             "EfficientMORL, bottom-up prior": "efficient_morl-quick-bottom-up",
             "EfficientMORL, reversed prior, not ++": "efficient_morl-quick-reversed",
             "EfficientMORL, one GRU": "efficient_morl-quick-no-dual-gru",
             "EfficientMORL, KL weight 1, GECO": "efficient_morl-quick-geco"}
    rows = {label: f"{name}-cpu-?.json:" for label, name in names.items()}
    return table(rows, SEGMENTATION, "`quick`, and one change")


def slots_table() -> str:
    """The models of segmentation on the same test scenes."""
    names = {"IODINE": "iodine-quick", "EfficientMORL": "efficient_morl-quick",
             "Slot Attention": "slot_attention-quick", "Slot MLP": "slot_attention-quick-mlp"}
    rows = {label: f"{name}-cpu-?.json:" for label, name in names.items()}
    columns = SEGMENTATION | {title: (f"further.dci.{path}", "{:.2f}") for title, path in {
        "disentanglement": "disentanglement", "completeness": "completeness",
        "shape, accuracy": "informativeness.shape", "colour, accuracy": "informativeness.color_id",
        "row, R²": "informativeness.row", "brightness, R²": "informativeness.brightness"}.items()}
    return table(rows, columns, "the same test scenes")


def estimators_table() -> str:
    rows = []
    for name in ("enumerate", "mvd", "vimco", "concrete", "rebar", "nvil"):
        scatter = (values("air-quick-cpu-0.json", f"further.variance.{name}.{path}")
                   for path in ("variance", "bias", "chance"))
        run = "air-quick" if name == "enumerate" else f"air-quick-{name}"
        trained = values(f"{run}-cpu-[0-2].json", "metrics.count_accuracy.mean")
        rows.append([f"`{name}`", *(spread(found, "{:.2g}") for found in scatter), spread(trained)])
    return markdown(["`--estimator`", "variance", "bias", "chance",
                     "count accuracy, trained, 3 seeds"], rows)


def backgrounds_table() -> str:
    cells = {"black": ("air-quick-cpu-?.json", "air-quick-black-background-cpu-?.json")}
    for name in ("gradient", "grid", "noise"):
        cells[name] = f"air-quick-{name}-cpu-?.json", f"air-quick-{name}-background-cpu-?.json"
    return markdown(["background", "AIR", "`--background`"], [
        [name, *(spread(values(pattern, "metrics.count_accuracy.mean")) for pattern in patterns)]
        for name, patterns in cells.items()
    ])  # fmt: skip


def mvae_table() -> str:
    names = {"`quick`": "quick", "without the start with one sprite": "quick-no-single",
             "places that are not selected pay nothing": "quick-no-unselected",
             "a place beside a larger one pays no more": "quick-no-exclusion",
             "sum instead of max": "quick-sum", "VAE, 60 latents": "quick-vae",
             "`quick` after one step of training": "quick-untrained",
             "`sprites3_short`": "sprites3_short", "its VAE, 3,000 steps": "sprites3_short-vae",
             "`sprites8_short`": "sprites8_short"}
    rows = {label: f"mvae-{name}-cpu-?.json:metrics." for label, name in names.items()}
    columns = {"ELBO, nats": ("elbo.mean", "{:.1f}"), "KL, nats": ("kl.mean", "{:.1f}"),
               "places": ("count_accuracy.mean", "{:.3f}"),
               "peaks": ("count_accuracy_peaks.mean", "{:.3f}"),
               "regions": ("count_accuracy_regions.mean", "{:.3f}"),
               "leak": ("leak.mean", "{:.3f}")}
    return table(rows, columns, "MVAE")


TABLES: dict[str, Callable[[], str]] = {
    "results": results_table, "records": records_table, "floors": floors_table,
    "slots": slots_table, "ablations": ablations_table, "stages": stages_table,
    "estimators": estimators_table, "backgrounds": backgrounds_table, "mvae": mvae_table,
}  # fmt: skip


def fill(text: str) -> str:
    """The text with every table between its markers as TABLES makes it now."""
    for name, table in TABLES.items():
        begin, end = f"<!-- begin {name} -->", f"<!-- end {name} -->"
        runs.require(begin in text and end in text.partition(begin)[2],
                     f"README.md: no table {name} between its markers")
        before, _, rest = text.partition(begin)
        text = f"{before}{begin}\n\n{table()}\n\n{end}{rest.partition(end)[2]}"
    return text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    kept = commands.add_parser("keep", help="copy finished runs into notebooks/")
    kept.add_argument("runs", nargs="+", type=Path, help="folders that training has written")
    kept.add_argument("--scores", action="store_true", help="the evaluation alone")
    kept.add_argument("--figures", nargs="*", default=[], help="pictures that are new here")
    floors = commands.add_parser("floors", help="score data sets without learning")
    floors.add_argument("datasets", nargs="+")
    commands.add_parser("table", help="fill the tables of README.md")
    arguments = parser.parse_args()
    try:
        if arguments.command == "keep":
            for run in arguments.runs:
                keep(run, arguments.scores, arguments.figures)
        elif arguments.command == "floors":
            for name in arguments.datasets:
                keep_floors(name)
        else:
            readme = NOTEBOOKS.parent / "README.md"
            readme.write_text(fill(readme.read_text()))
    except (runs.UserError, OSError, ValueError) as error:
        print(f"results.py: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
