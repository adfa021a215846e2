"""The pictures of a run: decompositions, steps of inference, samples, curves, tables and bars.

Every function takes torch tensors (on any device) or arrays, writes a PNG (`animation`: a GIF) to
`path` and returns the path. Equal input gives an equal file: neither a backend nor a matplotlibrc
of the user changes it, and matplotlib.pyplot is left alone. Images are floats with one or three
channels, clipped to [0, 1], and enlarged by a whole number, so that their pixels stay sharp.
ValueError for images and masks of a wrong shape and for NaN.

Colours: entity 0, the background, is grey; entity e and the slot that matches it (`metrics.match`)
have PALETTE[e - 1]; slots that match nothing take the colours after those of the entities.

Axes: N scenes, E entities, K slots, T refinement steps, S attention steps, R rows, V columns,
C H W image.
"""

import io
import math
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import PIL.Image
import torch
from einops import rearrange, repeat
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.style import context
from matplotlib.ticker import EngFormatter, LogLocator, MaxNLocator, NullLocator
from matplotlib.transforms import Bbox

from data import checkpoints, metrics

# Okabe & Ito's seven hues, then colours far from white, the grey and each other for any eyes.
PALETTE = (
    "#E69F00", "#56B4E9", "#009E73", "#D55E00", "#0072B2", "#CC79A7", "#F0E442", "#332288",
    "#882255", "#4B692D", "#A58CFF", "#A5F0B4", "#9600F0", "#00FF78", "#4B2D1E", "#F01E4B",
)  # fmt: skip
LINES = (5, 4, 3, 1, 6, 2, 8, 9, 10, 11)  # of curves, as entity numbers, the darker ones first
BACKGROUND = "#CDD0D6"
INK, FAINT, HAIRLINE = "#1F2328", "#59636E", "#D1D5DB"  # titles; other text; frames of images
SHADE = "#0B4F8A"  # a table's cell that has all of its row

DPI = 150
PANEL = 120  # dots; images are enlarged by a whole number to this width or more
FRAME, GAP, WIDE = 3, 14, 30  # dots: around a panel; between panels; between groups of panels

drawing = context(["default", Path(__file__).with_suffix(".mplstyle")])  # of all that draws


class Panel(NamedTuple):
    image: np.ndarray  # (H, W, 3)
    frame: Any = None  # its colour; a hairline where None


@drawing
def decomposition(path: str | Path, image: Any, reconstruction: Any, true_masks: Any, masks: Any,
                  means: Any, title: str, scores: Any = None) -> Path:
    """A scene a row: Input, Reconstruction, True masks, Predicted masks, then its slots on white.

    image, reconstruction (N, C, H, W); true_masks (N, E, H, W) bool, exclusive, or None; masks
    (N, K, H, W) in [0, 1], shown as a mixture of the slots' colours; means (N, K, C, H, W), shown
    with the mask as opacity (images without colour: on grey). Slots stand in the order of entities,
    those that match none last. `scores` (N): ARI-FG, printed at the left, a dash for NaN.
    """
    labels = [] if scores is None else [f"{s:.2f}".replace("nan", "–") for s in _array(scores)]
    args = image, reconstruction, true_masks, masks, means, masks, labels, "ARI-FG"
    return _save(_decomposition(*args), title, path)


@drawing
def animation(path: str | Path, image: Any, reconstructions: Any, true_masks: Any, masks: Any,
              means: Any, title: str) -> Path:
    """Inference as a GIF: `decomposition` of four scenes after each step, with the last step's
    order and colours. With T: reconstructions (T, N, C, H, W), masks and means.
    """
    sheets = [_decomposition(image[:4], mean, true_masks, *slots, masks[-1])
              for mean, *slots in zip(reconstructions, masks, means, strict=True)]
    titles = [f"{title}: step {t} of {len(masks)}" for t in range(1, len(masks) + 1)]
    return _animate(path, sheets, titles, 500)


@drawing
def refinement(path: str | Path, image: Any, true_masks: Any, reconstructions: Any, masks: Any,
               means: Any, title: str, labels: Sequence[str] = ()) -> Path:
    """`decomposition` of one scene, a step of inference a row (IODINE's Fig. 7), with the last
    step's order and colours.

    image (C, H, W); true_masks (E, H, W) or None; reconstructions (T, C, H, W); masks (T, K, H, W);
    means (T, K, C, H, W). `labels` (T) stand at the left; step 1, step 2, ... without them.
    """
    labels = labels or [f"step {t}" for t in range(1, len(masks) + 1)]
    image, true_masks, last = (None if value is None else _array(value)[None].repeat(len(masks), 0)
                               for value in (image, true_masks, masks[-1]))
    args = image, reconstructions, true_masks, masks, means, last, labels
    return _save(_decomposition(*args), title, path)


@drawing
def attention(path: str | Path, image: Any, boxes: Any, canvases: Any, title: str,
              labels: Sequence[str] = ()) -> Path:
    """A scene a row (AIR's Fig. 3): Input, Attention, then the canvas after every step taken.

    image (N, C, H, W); boxes (N, S, 4) in pixels: top, left, height, width, all NaN from the first
    step that was not taken; or of each scene (n, 4), n <= S. canvases (N, S, C, H, W): the last
    step's is the reconstruction. Step s has colour PALETTE[s - 1]: its box, cut off at the edges of
    the image, and the frame of its canvas. `labels` (N) stand at the left.
    """
    image, canvases = _images(image, "image", 4), _images(canvases, "canvases", 5)
    rows = []
    for n in range(len(image)):
        taken = _array(boxes[n])
        taken = taken[np.isfinite(taken).all(1)]  # (n, 4)
        steps = [(box, _color(s)) for s, box in enumerate(taken, 1)]
        lighter = 0.25 + 0.75 * image[n]  # so that dark boxes show on black
        seen = [Panel(_enlarge(canvases[n, s], [step]), step[1]) for s, step in enumerate(steps)]
        rows.append([Panel(image[n]), Panel(_enlarge(lighter, steps)), *seen])
    heads = ["Input", "Attention", *(f"Step {s}" for s in range(1, max(map(len, rows)) - 1))]
    return _save(_sheet(rows, heads, labels, "", (2,)), title, path)


@drawing
def tracking(path: str | Path, canvases: Any, boxes: Any, identities: Any, title: str,
             image: Any = None) -> Path:
    """Sequences, their objects boxed in the colours of their identities: one a row, its frames from
    left to right below those of the input; where `path` ends in .gif, an animation.

    image, canvases (R, T, C, H, W); boxes (R, T, N, 4) in pixels: top, left, height, width;
    identities (R, T, N), 0 where there is no object.
    """
    canvases, boxes = _images(canvases, "canvases", 5), _array(boxes)
    identities = _array(identities).astype(int)
    images = None if image is None else _images(image, "image", 5)
    rows, labels = [], []  # of frames
    for r, row in enumerate(canvases):
        if images is not None:
            rows.append([Panel(frame) for frame in images[r]])
        rows.append([Panel(_enlarge(frame, [(box[k], _color(i)) for k, i in enumerate(found) if i]))
                     for frame, box, found in zip(row, boxes[r], identities[r], strict=True)])
        labels += ["found"] if image is None else ["input", "found"]
    heads = [f"t = {t}" for t in range(1, canvases.shape[1] + 1)]
    if Path(path).suffix != ".gif":
        return _save(_sheet(rows, heads, labels), title, path)
    lines = len(rows) // len(canvases)
    sheets = [_sheet([[row[t] for row in rows[i::lines]] for i in range(lines)], (), labels[:lines])
              for t in range(len(heads))]
    return _animate(path, sheets, [f"{title}, {head}" for head in heads], 300)


@drawing
def grid(path: str | Path, images: Any, title: str, heads: Sequence[str | float] = (),
         labels: Sequence[str] = (), apart: Sequence[int] = ()) -> Path:
    """Images (R, V, C, H, W) in rows and columns, with `heads` (V; numbers, where the columns are
    values of a latent) above and `labels` (R) beside. Before columns `apart` the gap is wide."""
    rows = [[Panel(image) for image in row] for row in _images(images, "images", 5)]
    return _save(_sheet(rows, heads, labels, "", apart), title, path)


@drawing
def samples(path: str | Path, images: Any, title: str, masks: Any = None) -> Path:
    """Images (N, C, H, W) in a grid, with the segments of `masks` (N, K, H, W) below each.

    Slot k has colour PALETTE[k], and the slot with the largest mask the background's grey.
    """
    images = _images(images, "images", 4)
    lines = [[Panel(image) for image in images]]
    if masks is not None:
        lines.append([])
        for scene in _array(masks, "masks", 4):
            entities = list(range(1, len(scene) + 1))
            entities[scene.sum((1, 2)).argmax()] = 0
            lines[1].append(Panel(_paint(scene, entities)))
    width = math.ceil(len(images) / math.ceil(len(images) / 8))
    rows = [line[i : i + width] for i in range(0, len(images), width) for line in lines]
    apart = range(2, len(rows), 2) if masks is not None else ()
    return _save(_sheet(rows, rows_apart=apart), title, path)


@drawing
def curves(path: str | Path, panels: Mapping[str, Mapping[str, tuple[Any, Any, Any]]],
           xlabel: str, title: str, marks: Mapping[str, float] | None = None,
           logy: Sequence[str] = ()) -> Path:
    """Panels side by side (IODINE's Fig. 8): {panel title: {label: (x, y, stderr or None)}}.

    A line a label, the same colour in every panel, with a band of ± stderr; None and NaN leave a
    gap. `marks` {text: x} are dotted vertical lines. `logy` names panels with a logarithmic axis.
    """
    marks = marks or {}
    num_rows = math.ceil(len(panels) / 4)
    num_columns = math.ceil(len(panels) / num_rows)
    figure = Figure((num_columns * 360 / DPI, num_rows * 290 / DPI), layout="constrained")
    handles = {}
    for n, (name, panel) in enumerate(panels.items(), 1):
        axes = figure.add_subplot(num_rows, num_columns, n)
        for label, (x, y, stderr) in panel.items():
            x, y = _array(x), _array(y)
            color = _color(LINES[len(handles) % len(LINES)])
            color = handles[label].get_color() if label in handles else color
            if stderr is not None:
                band = y - _array(stderr), y + _array(stderr)
                axes.fill_between(x, *band, color=color, alpha=0.2, linewidth=0)
            dots = dict(marker="o", markersize=2.6) if len(x) <= 30 else {}
            (handles[label],) = axes.plot(x, y, color=color, linewidth=1.2, **dots)
        axes.set_title(textwrap.fill(name, 40), pad=6 + 9 * len(marks))  # points, above the marks
        axes.set_xlabel(xlabel)
        axes.grid(True)
        _ticks(axes.xaxis)
        _ticks(axes.yaxis, name in logy)
        for i, (text, x) in enumerate(marks.items()):
            axes.axvline(x, color=FAINT, linewidth=1, linestyle=":", zorder=1)
            place = dict(xycoords=("data", "axes fraction"), textcoords="offset points")
            axes.annotate(text, (x, 1), (0, 5 + 9 * i), ha="center", fontsize=6.5, **place)
    figure.draw_without_rendering()
    figure.set_layout_engine("none")  # the plots stay; the legend and the title stand around them
    if len(handles) > 1:
        place = dict(loc="upper left", bbox_to_anchor=(1.02, figure.axes[0].get_position().y1))
        figure.legend(handles.values(), map(_wrap, handles), **place)
    return _save(figure, title, path)


@drawing
def confusion(path: str | Path, matrix: Any, title: str) -> Path:
    """A table of how often r objects were counted as v, `matrix` (R, V) of integers, 0 or more.

    Below each number stands its share of the row, which darkens the cell.
    """
    matrix = _array(matrix)
    shares = matrix / np.maximum(matrix.sum(1, keepdims=True), 1)  # (R, V)
    axes = _axes(matrix.shape[1] * 130, matrix.shape[0] * 84)
    colors = 1 - shares[..., None] * (1 - np.array(to_rgb(SHADE)))  # (R, V, 3)
    axes.pcolormesh(colors, edgecolors=HAIRLINE, linewidth=0.8)
    for r, v in np.ndindex(matrix.shape):
        text = f"{matrix[r, v]:,.0f}\n{shares[r, v]:.1%}"
        color = "white" if shares[r, v] > 0.76 else "black"
        axes.text(v + 0.5, r + 0.5, text, color=color, ha="center", va="center")
    axes.set_xticks(np.arange(matrix.shape[1]) + 0.5, range(matrix.shape[1]))
    axes.set_yticks(np.arange(matrix.shape[0]) + 0.5, range(matrix.shape[0]))
    axes.set(xlabel="predicted count", ylabel="true count", ylim=(matrix.shape[0], 0))
    axes.xaxis.set(ticks_position="top", label_position="top")
    return _save(axes.figure, title, path)


@drawing
def bars(path: str | Path, values: Mapping[str, tuple[float | None, float | None]], title: str,
         ylabel: str, log: bool = False) -> Path:
    """{label: (value, stderr or None)}: a horizontal bar each, its value in print, ± stderr a line.

    `log`: on a logarithmic axis. None, NaN, infinity and, on that, what is not above 0 have no bar.
    """
    value, stderr = np.array([_array(pair) for pair in values.values()]).T  # (R,) each
    value = np.where(np.isfinite(value) & ((value > 0) | (not log)), value, math.nan)
    labels = [_wrap(label) for label in values]
    height = 15 * max(label.count("\n") + 1 for label in labels) + 20
    axes = _axes(440, height * len(labels))
    y = range(len(labels))
    stderr = np.nan_to_num(stderr, posinf=0)
    axes.barh(y, value, xerr=stderr, height=0.62, color=_color(LINES[0]), ecolor=INK)
    _ticks(axes.xaxis, log)
    for i in np.flatnonzero(np.isfinite(value)):
        place = dict(xytext=(5, 0), textcoords="offset points", va="center_baseline", color=INK)
        axes.annotate(_number(value[i]), (max(value[i] + stderr[i], 0), i), **place)
    axes.grid(True, axis="x")
    axes.set(ylim=(len(y) - 0.5, -0.5), yticks=y, yticklabels=labels, xlabel=_wrap(ylabel, 440))
    return _save(axes.figure, title, path)


# -- what they are made of -------------------------------------------------------------------------


def _color(entity: int) -> tuple[float, float, float]:
    """Of entity 0 (grey), 1, 2, ...; they repeat after PALETTE's last."""
    return to_rgb(PALETTE[(entity - 1) % len(PALETTE)] if entity else BACKGROUND)


def _entities(true_masks: np.ndarray | None, masks: np.ndarray) -> dict[int, int]:
    """{slot: entity} of (E, H, W) and (K, H, W); slots that match none have the numbers after."""
    matched = [-1]
    if true_masks is not None:
        both = torch.from_numpy(true_masks[None] > 0), torch.from_numpy(masks[None])
        matched = metrics.match(*both)[0].tolist()
    entity_of = {slot: entity for entity, slot in enumerate(matched) if slot >= 0}
    unmatched = [k for k in range(len(masks)) if k not in entity_of]
    return entity_of | {k: entity for entity, k in enumerate(unmatched, len(matched))}


def _paint(masks: np.ndarray, entities: Iterable[int]) -> np.ndarray:
    """Masks (K, H, W) as a mixture of the colours of `entities` (K), white where they sum to less
    than 1: (H, W, 3)."""
    total = masks.sum(0)  # (H, W)
    colors = np.array([_color(entity) for entity in entities])  # (K, 3)
    mixture = np.einsum("khw, kc -> hwc", masks / np.maximum(total, 1), colors)
    return mixture + np.clip(1 - total, 0, 1)[..., None]


def _decomposition(image: Any, reconstruction: Any, true_masks: Any, masks: Any, means: Any,
                   matched: Any, labels: Sequence[str] = (), corner: str = "") -> Figure:
    """The sheet of `decomposition`; the masks `matched` say which slot belongs to which entity."""
    ground = 1 if np.shape(image)[1] == 3 else 0.6  # of the slots: white objects must show
    image, reconstruction = _images(image, "image", 4), _images(reconstruction, "reconstruction", 4)
    masks, means = _array(masks, "masks", 4), _images(means, "means", 5)
    truths = [None] * len(image) if true_masks is None else _array(true_masks, "true_masks", 4)
    slots = ground - masks[..., None] * (ground - means)  # (N, K, H, W, 3)
    rows = []
    for n, (truth, match) in enumerate(zip(truths[: len(image)], _array(matched), strict=False)):
        entity_of = _entities(truth, match)
        row = [Panel(image[n]), Panel(reconstruction[n])]
        if truth is not None:
            row.append(Panel(_paint(truth, range(len(truth)))))
        row.append(Panel(_paint(masks[n], [entity_of[k] for k in range(len(masks[n]))])))
        rows.append(row + [Panel(slots[n, k], _color(e)) for k, e in entity_of.items()])
    known = [] if true_masks is None else ["True masks"]
    heads = ["Input", "Reconstruction", *known, "Predicted masks"]
    apart = 2, len(heads)
    heads += [f"Slot {k}" for k in range(1, masks.shape[1] + 1)]
    return _sheet(rows, heads, labels, corner, apart)


def _sheet(rows: Sequence[Sequence[Panel]], heads: Sequence[str | float] = (),
           labels: Sequence[str] = (), corner: str = "", columns_apart: Sequence[int] = (),
           rows_apart: Sequence[int] = ()) -> Figure:
    """Equally large panels, pasted into one array. `corner` stands above the labels of the rows."""
    height, width = _enlarge(rows[0][0].image).shape[:2]
    left = _starts(max(map(len, rows)), width, columns_apart)
    top = _starts(len(rows), height, rows_apart)
    canvas = np.ones((top[-1] + height + FRAME, left[-1] + width + FRAME, 3))
    for y, row in zip(top, rows, strict=True):
        for x, (image, frame) in zip(left, row, strict=False):
            rim, color = (FRAME, frame) if frame else (1, to_rgb(HAIRLINE))
            canvas[y - rim : y + height + rim, x - rim : x + width + rim] = color
            canvas[y : y + height, x : x + width] = _enlarge(image).clip(0, 1)
    axes = _axes(canvas.shape[1], canvas.shape[0])  # a dot of the canvas is one of the figure
    axes.imshow(canvas, interpolation="nearest", aspect="auto")
    axes.xaxis.tick_top()
    heads = [_wrap(h if isinstance(h, str) else _number(h), width + GAP) for h in heads]
    labels = [_wrap(label) for label in labels]
    axes.set_xticks(left + width / 2 if heads else [], heads)
    axes.set_yticks(top + height / 2 if labels else [], labels)
    place = dict(xycoords="axes fraction", textcoords="offset points", ha="right", va="bottom")
    axes.annotate(corner if labels else "", (0, 1), (-4, 3.5), **place)
    return axes.figure


def _enlarge(image: np.ndarray, boxes: Iterable[tuple[np.ndarray, Any]] = ()) -> np.ndarray:
    """With boxes (top, left, height, width) in their colours, FRAME dots thick, drawn on it."""
    scale = max(1, math.ceil(PANEL / image.shape[1]))
    dots = repeat(image, "h w c -> (h i) (w j) c", i=scale, j=scale)
    y, x = np.ogrid[: dots.shape[0], : dots.shape[1]]
    for box, color in boxes:
        top, left, height, width = box * scale
        from_top, from_left = y + 0.5 - top, x + 0.5 - left  # of the centres of the dots
        vertical = np.minimum(from_top, height - from_top)
        depth = np.minimum(vertical, np.minimum(from_left, width - from_left))  # below 0 outside
        dots[(depth > 0) & (depth < FRAME)] = color
    return dots


def _starts(number: int, size: int, apart: Sequence[int]) -> np.ndarray:
    """Where `number` panels of `size` begin along one side, with the wider gap before `apart`."""
    gaps = [WIDE if i in apart else GAP for i in range(1, number)]
    return np.cumsum([FRAME, *(size + gap for gap in gaps)])


def _axes(width: int, height: int) -> Any:
    """All of a figure of so many dots; the text stands outside of it."""
    return Figure((width / DPI, height / DPI)).add_axes((0, 0, 1, 1), frame_on=False)


def _wrap(text: str, width: float = 200) -> str:
    """Lines of about `width` dots."""
    return textwrap.fill(text, max(1, int(width / 8.7)))


def _ticks(axis: Any, log: bool = False) -> None:
    """Few and short labels: 0.0 0.5 1.0, or 0 50k 100k. Logarithmic where data are above 0."""
    low, high = axis.get_data_interval()
    if log and high > 0:
        axis.axes.set(**{f"{axis.axis_name}scale": "log"})
        subs = (1,) if high > 50 * axis.get_minpos() else (1, 2, 5)
        axis.set_major_locator(LogLocator(subs=subs, numticks=7))
        axis.set_major_formatter(lambda value, _: _number(value))
        axis.set_minor_locator(NullLocator())
        return
    axis.set_major_locator(MaxNLocator(5, steps=(1, 2, 2.5, 5, 10), integer=True, min_n_ticks=4))
    if 1e4 <= max(abs(low), abs(high)) < math.inf:
        axis.set_major_formatter(EngFormatter(sep=""))


def _number(value: float) -> str:
    """In three digits or whole: 0.0123, 12.3, 12,345, 1.23e+07."""
    text = f"{value:,.0f}" if 1000 <= round(abs(value)) < 1e6 else f"{value:.3g}"
    return text.replace("-", "−", text.startswith("-"))


def _array(values: Any, name: str = "", ndim: int | None = None) -> np.ndarray:
    """As float64; None becomes NaN. With `ndim` what has other axes or holds NaN is refused."""
    if isinstance(values, torch.Tensor):
        values = values.detach().cpu().double()
    array = np.asarray(values, dtype=float)
    if ndim is not None and (array.ndim != ndim or not array.size or np.isnan(array).any()):
        raise ValueError(f"{name} must have {ndim} axes, none empty, and no NaN: {array.shape}")
    return array


def _images(values: Any, name: str, ndim: int) -> np.ndarray:
    """(..., C, H, W) -> (..., H, W, 3), clipped to [0, 1]; one channel becomes grey."""
    array = rearrange(_array(values, name, ndim), "... c h w -> ... h w c")
    return np.clip(np.broadcast_to(array, (*array.shape[:-1], 3)), 0, 1)


def _save(figure: Figure, title: str, path: str | Path) -> Path:
    checkpoints.write(Path(path), _png(figure, title))
    return Path(path)


def _animate(path: str | Path, figures: Sequence[Figure], titles: Sequence[str],
             milliseconds: int) -> Path:
    """A GIF of the figures; the last one stays five times as long."""
    pages = [PIL.Image.open(io.BytesIO(_png(*page))) for page in zip(figures, titles, strict=True)]
    pages = [page.convert("RGB").quantize(dither=PIL.Image.Dither.NONE) for page in pages]
    content, times = io.BytesIO(), [milliseconds] * (len(pages) - 1) + [5 * milliseconds]
    pages[0].save(content, "GIF", save_all=True, append_images=pages[1:], duration=times, loop=0)
    checkpoints.write(Path(path), content.getvalue())
    return Path(path)


def _png(figure: Figure, title: str) -> bytes:
    """With the title above all that is drawn, and a margin around it."""
    FigureCanvasAgg(figure)
    box = figure.get_tightbbox()  # inches
    title = textwrap.fill(title, int(max(box.width * DPI, 480) / 12))
    place = np.array([box.x0, box.y1 + 0.1]) / figure.get_size_inches()
    figure.text(*place, title, va="bottom", color=INK, fontsize=9.5, fontweight="bold")
    # Whole dots, lest images be resampled; and a hundredth, lest a dot be rounded away.
    dots = np.round(figure.get_tightbbox().padded(20 / DPI).extents * DPI)
    box = Bbox.from_extents((dots + np.array([0, 0, 0.01, 0.01])) / DPI)
    content = io.BytesIO()
    figure.savefig(content, format="png", bbox_inches=box, metadata={"Software": None})
    return content.getvalue()
