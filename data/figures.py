"""The pictures of a run: decompositions, steps of inference, samples, curves, tables and bars.

Every function takes torch tensors (on any device) or arrays, writes a PNG of 150 dots per inch to
`path` and returns the path. The file appears whole or not at all. Images have one or three channels
and are clipped to [0, 1]. ValueError for shapes that do not fit and for NaN, OSError where the file
cannot be written. Nothing here reads or changes the state of matplotlib.pyplot.

Pixel art is pasted, not plotted: a picture is one array in which every panel is enlarged by a whole
number, so that its pixels stay square, and only the text is drawn on top. Lengths are in dots.

Colours: entity 0, the background, is grey; entity e and the slot that matches it (`metrics.match`)
have PALETTE[e - 1]; slots that match nothing take the colours after those of the entities.

Axes: N scenes, E entities, K slots, T refinement steps, S attention steps, R rows, V columns,
C H W image.
"""

import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from einops import rearrange, repeat
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties
from matplotlib.patches import Rectangle
from matplotlib.textpath import TextToPath
from matplotlib.ticker import Formatter, LogLocator, MaxNLocator, NullFormatter

from data import metrics

# Okabe & Ito's seven hues, then colours that keep their distance from white, the grey and each
# other, also as seen with protanopia, deuteranopia and tritanopia (CIE Lab distance 15 or more).
PALETTE = (
    "#E69F00", "#56B4E9", "#009E73", "#D55E00", "#0072B2", "#CC79A7", "#F0E442", "#332288",
    "#882255", "#4B692D", "#A58CFF", "#A5F0B4", "#9600F0", "#00FF78", "#4B2D1E", "#F01E4B",
    "#784BD2", "#690F69", "#A50000", "#C3A54B", "#785A87", "#FF7896", "#5A00B4", "#000000",
)  # fmt: skip
BACKGROUND = "#CDD0D6"
INK, FAINT, HAIRLINE = "#1F2328", "#59636E", "#D1D5DB"  # titles; other text; frames of images
GRID, SHADE = "#ECEEF1", "#0B4F8A"  # lines behind curves and bars; a table's cell with all its row
LIGHTER = 0.25  # how far images below boxes go to white, so that dark colours show on black

DPI = 150
PANEL = 120  # the least width of a panel; images are enlarged by the next whole number
FRAME, GAP, WIDE = 3, 8, 24  # around a panel; between frames; between groups of panels
MARGIN, MIN_WIDTH, LABEL_WIDTH = 20, 480, 200  # of the picture; row labels break at the last
TITLE, TEXT = 9.5, 7.0  # points
LINE = 1.25  # line spacing
LINE_HEIGHT = LINE * DPI / 72  # dots per point of font size


class Panel(NamedTuple):
    image: np.ndarray  # (H, W, 3) in [0, 1]
    frame: Any = None  # its colour; a hairline where None
    boxes: Any = ()  # drawn on it: pairs of (top, left, height, width), in its pixels, and colour


# -- the figures -----------------------------------------------------------------------------------


def decomposition(
    path: str | Path,
    image: Any,
    reconstruction: Any,
    true_masks: Any,
    masks: Any,
    means: Any,
    title: str,
    scores: Any = None,
) -> Path:
    """A scene a row: Input, Reconstruction, True masks, Predicted masks, then its slots on white.

    image, reconstruction (N, C, H, W); true_masks (N, E, H, W) bool, exclusive; masks (N, K, H, W)
    in [0, 1], shown as a mixture of the slots' colours; means (N, K, C, H, W), shown with the mask
    as opacity. The slots of a row stand in the order of its entities, the background's first, those
    that match none last; frames have the slots' colours. `scores` (N): ARI-FG, printed at the left,
    a dash for NaN.
    """
    image, reconstruction = _images(image, "image", 4), _images(reconstruction, "reconstruction", 4)
    masks, means = _masks(masks, "masks", 4), _images(means, "means", 5)
    true_masks = _bools(true_masks, "true_masks", 4)
    _same("n h w", image[..., 0], reconstruction[..., 0], true_masks[:, 0], masks[:, 0])
    _same("n k h w", masks, means[..., 0])
    slots = metrics.match(torch.from_numpy(true_masks), torch.from_numpy(masks)).numpy()

    rows = []
    for n in range(len(image)):
        entity_colors, slot_colors, order = _colors(slots[n], masks.shape[1])
        row = [Panel(image[n]), Panel(reconstruction[n])]
        row += [Panel(_paint(true_masks[n], entity_colors)), Panel(_paint(masks[n], slot_colors))]
        row += [Panel(_on_white(means[n, k], masks[n, k]), slot_colors[k]) for k in order]
        rows.append(row)
    heads = ["Input", "Reconstruction", "True masks", "Predicted masks"]
    heads += _slot_heads(masks.shape[1])
    labels = []
    if scores is not None:
        scores = np.asarray(_numpy(scores), dtype=float)
        if scores.shape != (len(image),):
            raise ValueError(f"scores must be ({len(image)},), not {scores.shape}")
        labels = [f"{s:.2f}".replace("-", "−") if math.isfinite(s) else "–" for s in scores]
    corner = "ARI-FG" if labels else ""
    return _save(_sheet(rows, title, heads, labels, corner, columns_apart=(2, 4)), path)


def refinement(
    path: str | Path,
    image: Any,
    true_masks: Any,
    reconstructions: Any,
    masks: Any,
    means: Any,
    title: str,
    labels: Sequence[str] = (),
) -> Path:
    """Iterative inference on one scene, a step a row (IODINE's Fig. 7), below what it should find.

    image (C, H, W); true_masks (E, H, W); reconstructions (T, C, H, W); masks (T, K, H, W); means
    (T, K, C, H, W). The first row is the truth: the input, the true masks and, above the slots that
    match them at the last step, the entities cut out of the input. Order and colours of the slots
    are those of the last step throughout, so that one colour follows one slot. `labels` (T) stand
    at the left; step 1, step 2, ... where there are none.
    """
    image, true_masks = _images(image, "image", 3), _bools(true_masks, "true_masks", 3)
    reconstructions = _images(reconstructions, "reconstructions", 4)
    masks, means = _masks(masks, "masks", 4), _images(means, "means", 5)
    _same("h w", image[..., 0], true_masks[0], reconstructions[0, ..., 0], masks[0, 0])
    _same("t k h w", masks, means[..., 0])
    _same("t", reconstructions[:, 0, 0, 0], masks[:, 0, 0, 0])
    last = torch.from_numpy(true_masks)[None], torch.from_numpy(masks)[-1:]
    slots = metrics.match(*last)[0].numpy()
    entity_colors, slot_colors, order = _colors(slots, masks.shape[1])

    truth: list[Panel | None] = [Panel(image), Panel(_paint(true_masks, entity_colors))]
    for k in order:
        entity = np.flatnonzero(slots == k)  # none or one
        cut_out = [Panel(_on_white(image, true_masks[e]), slot_colors[k]) for e in entity]
        truth.append(cut_out[0] if cut_out else None)
    rows = [truth]
    for t in range(len(masks)):
        row = [Panel(reconstructions[t]), Panel(_paint(masks[t], slot_colors))]
        row += [Panel(_on_white(means[t, k], masks[t, k]), slot_colors[k]) for k in order]
        rows.append(row)
    heads = ["Reconstruction", "Masks", *_slot_heads(masks.shape[1])]
    labels = labels or [f"step {t}" for t in range(1, len(masks) + 1)]
    if len(labels) != len(masks):
        raise ValueError(f"labels must be {len(masks)}, not {list(labels)}")
    labels = ["truth", *labels]
    return _save(_sheet(rows, title, heads, labels, columns_apart=(2,), rows_apart=(1,)), path)


def attention(
    path: str | Path,
    image: Any,
    boxes: Any,
    canvases: Any,
    title: str,
    labels: Sequence[str] = (),
) -> Path:
    """A scene a row (AIR's Fig. 3): Input, Attention, then the canvas after every step taken.

    image (N, C, H, W); boxes (N, S, 4) in pixels: top, left, height, width, all NaN from the first
    step that was not taken; or of each scene (n, 4), n <= S. canvases (N, S, C, H, W) after each
    step: the last one taken is the reconstruction. Step s has colour PALETTE[s - 1]: its box, which
    is cut off at the edges of the image, and the frame of its canvas. `labels` (N) stand at the
    left.
    """
    image, canvases = _images(image, "image", 4), _images(canvases, "canvases", 5)
    _same("n h w", image[..., 0], canvases[:, 0, ..., 0])
    if len(boxes) != len(image) or len(labels) not in (0, len(image)):
        raise ValueError(f"boxes and labels must be of {len(image)} scenes, not {len(boxes)} and "
                         f"{len(labels)}")  # fmt: skip
    rows = []
    for n in range(len(image)):
        taken = _boxes(boxes[n], canvases.shape[1])  # (n, 4)
        drawn = [(box, _color(s + 1)) for s, box in enumerate(taken)]
        row = [Panel(image[n]), Panel(LIGHTER + (1 - LIGHTER) * image[n], boxes=drawn)]
        row += [Panel(canvases[n, s], drawn[s][1], drawn[s : s + 1]) for s in range(len(drawn))]
        rows.append(row)
    heads = ["Input", "Attention", *(f"Step {s}" for s in range(1, max(map(len, rows)) - 1))]
    return _save(_sheet(rows, title, heads, list(labels), columns_apart=(2,)), path)


def grid(
    path: str | Path,
    images: Any,
    title: str,
    heads: Sequence[str] = (),
    labels: Sequence[str] = (),
    apart: Sequence[int] = (),
) -> Path:
    """Images (R, V, C, H, W) in rows and columns, with `heads` (V) above and `labels` (R) beside.

    Before the columns that `apart` names, the gap is wide.
    """
    images = _images(images, "images", 5)
    for texts, number in ((heads, images.shape[1]), (labels, images.shape[0])):
        if len(texts) not in (0, number):
            raise ValueError(f"images are {images.shape[:2]}: not {number} of {list(texts)}")
    rows = [[Panel(image) for image in row] for row in images]
    return _save(_sheet(rows, title, heads, labels, columns_apart=apart), path)


def traversals(
    path: str | Path, images: Any, labels: Sequence[str], values: Sequence[float], title: str
) -> Path:
    """Images (R, V, C, H, W) in a grid (IODINE's Fig. 6): a row per latent, named by `labels` (R),
    a column per value that it is set to, `values` (V)."""
    shape = _images(images, "images", 5).shape[:2]
    values = np.asarray(_numpy(values), dtype=float)
    if (len(labels), *values.shape) != shape:
        raise ValueError(f"labels and values must be {shape} for these images, "
                         f"not {(len(labels), *values.shape)}")  # fmt: skip
    step = np.ptp(values) / max(len(values) - 1, 1)  # the fewest digits that keep columns apart
    digits = next((d for d in range(4) if (abs(values - values.round(d)) <= step / 9).all()), 3)
    heads = [f"{v:.{digits}f}".replace("-", "−") for v in values.round(digits) + 0.0]  # no -0
    return grid(path, images, title, heads, labels)


def samples(path: str | Path, images: Any, title: str, masks: Any = None) -> Path:
    """Images (N, C, H, W) in a grid, with the segments of `masks` (N, K, H, W) below each.

    There is no truth to match: slot k has colour PALETTE[k], and the slot with the largest mask the
    grey of the background.
    """
    images = _images(images, "images", 4)
    grid = [[Panel(image) for image in images]]
    if masks is not None:
        masks = _masks(masks, "masks", 4)
        _same("n h w", images[..., 0], masks[:, 0])
        grid.append([])
        for scene in masks:
            colors = [_color(k + 1) for k in range(len(scene))]
            colors[scene.sum((1, 2)).argmax()] = _color(0)
            grid[1].append(Panel(_paint(scene, colors)))
    height = math.ceil(len(images) / 8)
    width = math.ceil(len(images) / height)
    starts = range(0, len(images), width)
    rows = [line[i : i + width] for i in starts for line in grid]
    apart = range(2, len(rows), 2) if masks is not None else ()
    return _save(_sheet(rows, title, rows_apart=apart), path)


def curves(
    path: str | Path,
    panels: Mapping[str, Mapping[str, tuple[Any, Any, Any]]],
    xlabel: str,
    title: str,
    marks: Mapping[str, float] | None = None,
    logy: Sequence[str] = (),
) -> Path:
    """Panels side by side (IODINE's Fig. 8): {panel title: {label: (x, y, stderr or None)}}.

    A line a label, the same colour in every panel, with a band of ± stderr; one legend if there is
    more than one label. None and NaN leave a gap. `marks` {text: x} are dotted vertical lines.
    `logy` names panels with a logarithmic axis. More than four panels take several rows.
    """
    if not panels:
        raise ValueError("curves needs at least one panel")
    labels = list(dict.fromkeys(label for lines in panels.values() for label in lines))
    num_rows = math.ceil(len(panels) / 4)
    num_columns = math.ceil(len(panels) / num_rows)
    legend = math.ceil(max(map(_text_width, labels), default=0) + 60) if len(labels) > 1 else 0
    width = num_columns * 360 + 2 * MARGIN + legend
    figure, grid = _plots(title, width, num_rows * 290, num_rows, num_columns)
    for axes in grid[len(panels) :]:
        axes.set_axis_off()
    every_x = [_numpy(x) for panel in panels.values() for x, _, _ in panel.values()]
    every_x = np.concatenate([*every_x, list((marks or {}).values())]).astype(float)
    handles = {}
    for axes, (name, panel) in zip(grid, panels.items(), strict=False):
        for label, (x, y, stderr) in panel.items():
            color = _color(LINES[labels.index(label) % len(LINES)])
            handles[label] = _line(axes, x, y, stderr, color, name in logy)
        _dress(axes, name, xlabel, every_x, name in logy, marks or {})
    if legend:
        box = grid[num_columns - 1].legend(
            [handles[label] for label in labels], labels, prop=_font(TEXT), labelcolor=INK,
            loc="upper left", bbox_to_anchor=(1.04, 1), borderaxespad=0, frameon=False,
        )  # fmt: skip
        for text in box.get_texts():
            text.set_parse_math(False)
    return _save(figure, path)


def confusion(
    path: str | Path,
    matrix: Any,
    title: str,
    rows: str = "true count",
    columns: str = "predicted count",
) -> Path:
    """A table of how often what is r was taken for v, `matrix` (R, V) of integers, 0 or more.

    Below each number stands its share of the row, and so deep is the shade. The diagonal is framed.
    `rows` and `columns` say what is 0, 1, 2, ... there. A row of zeros has no shares.
    """
    matrix = np.asarray(_numpy(matrix))
    if matrix.ndim != 2 or not matrix.size or matrix.dtype.kind not in "iu" or matrix.min() < 0:
        raise ValueError(f"matrix must be counts (R, V), not {matrix.dtype} {matrix.shape}")
    shares = matrix / np.maximum(matrix.sum(1, keepdims=True), 1)  # (R, V)
    cells = 1 - shares[..., None] * (1 - _rgb(SHADE))  # (R, V, 3)

    num_rows, num_columns = matrix.shape
    width = max(130, 24 + math.ceil(_text_width(f"{matrix.max():,}", TEXT + 2)))  # of a cell
    height = 84
    figure, (axes,) = _plots(title, num_columns * width + 110, num_rows * height + 80)
    axes.pcolormesh(cells, edgecolors=HAIRLINE, linewidth=0.8)
    for r, v in np.ndindex(matrix.shape):
        color = _readable(cells[r, v]) if matrix[r, v] else FAINT
        share = f"{shares[r, v]:.1%}" if matrix[r].any() else "–"
        for text, y, size in ((f"{matrix[r, v]:,}", 0.36, TEXT + 2), (share, 0.7, TEXT - 0.5)):
            axes.text(v + 0.5, r + y, text, color=color, font=_font(size), ha="center", va="center")
        if r == v:
            frame = dict(fill=False, edgecolor=INK, linewidth=1.5, zorder=3, clip_on=False)
            axes.add_patch(Rectangle((v, r), 1, 1, **frame))
    _bare(axes)
    axes.invert_yaxis()
    axes.xaxis.tick_top()
    axes.xaxis.set_label_position("top")
    for axis, name, number, size in (
        (axes.xaxis, columns, num_columns, width), (axes.yaxis, rows, num_rows, height)
    ):  # fmt: skip
        axis.set_ticks(np.arange(number) + 0.5, [str(i) for i in range(number)])
        axis.labelpad = 6
        _name(axis, name, number * size)
    return _save(figure, path)


def bars(
    path: str | Path,
    values: Mapping[str, tuple[float | None, float | None]],
    title: str,
    ylabel: str,
    log: bool = False,
) -> Path:
    """{label: (value, stderr or None)}: a horizontal bar each, its value in print, ± stderr a line.

    `ylabel` says what the values are. `log`: their axis is logarithmic, and a value that is not
    above 0 has no bar. None, NaN and infinity become a dash.
    """
    if not values:
        raise ValueError("bars needs at least one value")
    pairs = [[math.nan if v is None else float(v) for v in pair] for pair in values.values()]
    value, stderr = np.array(pairs).T  # (R,) each
    printed = [_number(v) if math.isfinite(v) else "–" for v in value]
    stderr = np.where(np.isfinite(stderr), stderr, 0)
    drawn = np.isfinite(value) & ((value > 0) | (not log))
    start, low, high = 0.0, value - stderr, value + stderr
    log = log and bool(drawn.any())
    if log:  # from a power of ten that leaves the shortest bar some length
        low = np.where(low > 0, low, value)
        start = 10.0 ** math.floor(math.log10(low[drawn].min()) - 0.2)
    value, low, high = (np.where(drawn, ends, start) for ends in (value, low, high))

    labels = [_wrap(label, LABEL_WIDTH, TEXT) for label in values]
    label_width = max(_text_width(line) for lines in labels for line in lines)
    width = math.ceil(label_width + 440 + max(map(_text_width, printed)) + 2 * MARGIN)
    height = math.ceil(max(map(len, labels)) * TEXT * LINE_HEIGHT) + 20
    figure, (axes,) = _plots(title, width, len(labels) * height + 80)
    y = np.arange(len(labels))
    axes.barh(y, value - start, left=start, height=0.62, color=_color(LINES[0]))
    axes.hlines(y, low, high, color=INK, linewidth=1.2)
    axes.axvline(start, color=FAINT, linewidth=0.8, clip_on=False)
    for i, text in enumerate(printed):
        axes.annotate(
            text, (max(high[i], start), i), xytext=(5, 0), textcoords="offset points",
            va="center_baseline", color=INK, font=_font(TEXT), annotation_clip=False,
        )  # fmt: skip
    _bare(axes)
    axes.grid(True, axis="x", color=GRID, linewidth=0.7, linestyle="-")
    axes.set_ylim(len(labels) - 0.5, -0.5)
    axes.set_yticks(y, ["\n".join(lines) for lines in labels], parse_math=False, linespacing=LINE)
    ends = np.array([min(low.min(), start), max(high.max(), start)])
    axes.set_xlim(ends[0], ends[1] if np.ptp(ends) else 1)
    _ticks(axes, "x", ends, log)
    _name(axes.xaxis, ylabel, 440)
    return _save(figure, path)


# -- colours ---------------------------------------------------------------------------------------

LINES = (5, 4, 3, 1, 6, 2, 8, 9, 10, 11)  # of curves, as entity numbers, the darker ones first


def _rgb(code: str) -> np.ndarray:
    """#RRGGBB as (3,) in [0, 1]."""
    return np.array([int(code[i : i + 2], 16) for i in (1, 3, 5)]) / 255


def _color(entity: int) -> np.ndarray:
    """(3,) in [0, 1] for entity 0 (grey), 1, 2, ...; they repeat after PALETTE's last."""
    return _rgb(PALETTE[(entity - 1) % len(PALETTE)] if entity else BACKGROUND)


def _colors(slots: np.ndarray, num_slots: int) -> tuple[np.ndarray, np.ndarray, list[int]]:
    """Of one scene's matching (E,): colours of entities (E, 3) and of slots (K, 3), order of slots.

    Matched slots come first, in the order of their entities, with their entities' colours.
    """
    entity_of = {int(slot): entity for entity, slot in enumerate(slots) if slot >= 0}
    unmatched = [k for k in range(num_slots) if k not in entity_of]
    entity_of |= {k: len(slots) + i for i, k in enumerate(unmatched)}  # colours after the entities'
    entity_colors = np.stack([_color(e) for e in range(len(slots))])
    slot_colors = np.stack([_color(entity_of[k]) for k in range(num_slots)])
    return entity_colors, slot_colors, sorted(entity_of, key=entity_of.__getitem__)


def _readable(color: np.ndarray) -> str:
    """Black or white, whichever has more contrast (WCAG 2.1) with a colour (3,)."""
    linear = np.where(color <= 0.04045, color / 12.92, ((color + 0.055) / 1.055) ** 2.4)
    luminance = linear @ (0.2126, 0.7152, 0.0722)
    return "black" if (luminance + 0.05) / 0.05 > 1.05 / (luminance + 0.05) else "white"


def _paint(masks: np.ndarray, colors: Any) -> np.ndarray:
    """Masks (K, H, W) as a mixture of the slots' colours (K, 3), white where they sum to less than
    1: (H, W, 3)."""
    masks = np.clip(masks.astype(np.float64), 0, 1)
    total = masks.sum(0)  # (H, W)
    mixture = np.einsum("khw, kc -> hwc", masks / np.maximum(total, 1), np.asarray(colors))
    return mixture + np.clip(1 - total, 0, 1)[..., None]


def _on_white(image: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """(H, W, 3) with the mask (H, W) as opacity."""
    mask = np.clip(mask.astype(np.float64), 0, 1)[..., None]
    return image * mask + (1 - mask)


def _slot_heads(num_slots: int) -> list[str]:
    return [f"Slot {i}" for i in range(1, num_slots + 1)]


# -- sheets of panels ------------------------------------------------------------------------------


def _sheet(
    rows: Sequence[Sequence[Panel | None]],
    title: str,
    heads: Sequence[str] = (),
    labels: Sequence[str] = (),
    corner: str = "",
    columns_apart: Sequence[int] = (),
    rows_apart: Sequence[int] = (),
) -> Figure:
    """A grid of equally large panels (None: an empty place) under a title.

    `heads` stand above the columns, `labels` left of the rows, `corner` above the labels. Before
    the columns and rows that the last two arguments name, the gap is wide.
    """
    height, width = rows[0][0].image.shape[:2]
    scale = max(1, math.ceil(PANEL / width))
    height, width = height * scale, width * scale
    heads = [_wrap(head, width + GAP, TEXT) for head in heads]  # lines of text, each
    labels = [_wrap(label, LABEL_WIDTH, TEXT) for label in labels]
    margin = MARGIN
    if labels:
        parts = [corner, *(part for label in labels for part in label)]
        margin += math.ceil(max(map(_text_width, parts))) + 12

    num_columns = max(map(len, rows))
    left = _starts(margin, num_columns, width, columns_apart)  # of the panels, frames left out
    total_width = max(left[-1] + width + FRAME + MARGIN, MIN_WIDTH)
    title_lines = _wrap(title, total_width - left[0] - MARGIN, TITLE, "bold")
    title_height = len(title_lines) * TITLE * LINE_HEIGHT
    heads_height = max(map(len, heads), default=0) * TEXT * LINE_HEIGHT
    top = MARGIN + title_height + (12 if heads else 6) + heads_height
    top = _starts(math.ceil(top), len(rows), height, rows_apart)
    total_height = top[-1] + height + FRAME + MARGIN

    canvas = np.ones((total_height, total_width, 3))
    for y, row in zip(top, rows, strict=True):
        for x, panel in zip(left, row, strict=False):
            if panel is not None:
                rim = 1 if panel.frame is None else FRAME
                frame = _rgb(HAIRLINE) if panel.frame is None else panel.frame
                canvas[y - rim : y + height + rim, x - rim : x + width + rim] = frame
                big = repeat(panel.image, "h w c -> (h i) (w j) c", i=scale, j=scale)
                canvas[y : y + height, x : x + width] = np.clip(big, 0, 1)
                for box, color in panel.boxes:
                    _outline(canvas[y : y + height, x : x + width], box * scale, color)

    figure = _figure(total_width, total_height)
    figure.figimage((canvas * 255).round().astype(np.uint8), origin="upper", resize=False)

    def write(x, y, text, size=TEXT, weight="normal", color=FAINT, **where):
        figure.text(
            x / total_width, 1 - y / total_height, text, color=color, font=_font(size, weight),
            linespacing=LINE, parse_math=False, **where,
        )  # fmt: skip

    def write_head(x, lines, ha):  # up from a common baseline, whatever letters it has
        for i, text in enumerate(reversed(lines)):
            y = top[0] - FRAME - 9 - i * TEXT * LINE_HEIGHT
            write(x, y, text, ha=ha, va="baseline")

    write(left[0] - 1, MARGIN, "\n".join(title_lines), TITLE, "bold", INK, ha="left", va="top")
    for x, head in zip(left, heads, strict=False):
        write_head(x + width / 2, head, "center")
    if corner:
        write_head(left[0] - FRAME - 10, [corner], "right")
    for y, label in zip(top, labels, strict=False):
        write(left[0] - FRAME - 10, y + height / 2, "\n".join(label), ha="right", va="center")
    return figure


def _outline(dots: np.ndarray, box: np.ndarray, color: np.ndarray) -> None:
    """Draws a box (top, left, height, width), FRAME dots thick, on what it meets of (H, W, 3)."""
    y, x = np.ogrid[: dots.shape[0], : dots.shape[1]]
    y, x = y + 0.5 - box[0], x + 0.5 - box[1]  # centres of dots, from the box's corner
    depth = np.minimum(np.minimum(y, box[2] - y), np.minimum(x, box[3] - x))  # below 0 outside
    dots[(depth > 0) & (depth < FRAME)] = color


def _starts(first: int, number: int, size: int, apart: Sequence[int]) -> list[int]:
    """Where `number` panels of `size` begin along one side, with the wider gap before `apart`."""
    starts = [first + FRAME]
    for i in range(1, number):
        starts.append(starts[-1] + size + 2 * FRAME + (WIDE if i in apart else GAP))
    return starts


# -- text and axes ---------------------------------------------------------------------------------


def _font(size: float, weight: str = "normal") -> FontProperties:
    """The font that comes with matplotlib, so that a picture looks the same everywhere."""
    return FontProperties(family="DejaVu Sans", size=size, weight=weight)


def _text_width(text: str, size: float = TEXT, weight: str = "normal") -> float:
    """In dots, and a little more, as hinting widens letters."""
    points = TextToPath().get_text_width_height_descent(text, _font(size, weight), ismath=False)[0]
    return 1.04 * points * DPI / 72


def _wrap(text: str, width: float, size: float, weight: str = "normal") -> list[str]:
    """Lines of at most `width` dots; a word that is longer is broken."""
    lines = [""]
    for word in text.split():
        joined = f"{lines[-1]} {word}".strip()
        if _text_width(joined, size, weight) <= width:
            lines[-1] = joined
            continue
        if lines[-1]:
            lines.append("")
        for letter in word:
            if lines[-1] and _text_width(lines[-1] + letter, size, weight) > width:
                lines.append("")
            lines[-1] += letter
    return lines


def _line(axes: Any, x: Any, y: Any, stderr: Any, color: np.ndarray, log: bool) -> Any:
    """One curve with its band; dots where the values are few enough to be told apart."""
    x, y = (np.asarray(_numpy(values), dtype=float) for values in (x, y))  # None becomes NaN
    if stderr is not None:
        stderr = np.asarray(_numpy(stderr), dtype=float)
        low, high = y - stderr, y + stderr
        if log:  # a band that reaches 0 has no place on a logarithmic axis
            low = np.where(low > 0, low, y)
        axes.fill_between(x, low, high, color=color, alpha=0.2, linewidth=0)
    marker = {"marker": "o", "markersize": 2.6} if len(x) <= 30 else {}
    width = 1.4 if len(x) <= 300 else 0.9
    (line,) = axes.plot(x, y, color=color, linewidth=width, linestyle="-", **marker)
    return line


def _dress(
    axes: Any, name: str, xlabel: str, every_x: np.ndarray, log: bool, marks: Mapping[str, float]
) -> None:
    """All around the lines: title, grid, marks, few and short tick labels, one range of x."""
    above = 5 + len(marks) * TEXT * LINE  # points between plot and title, for the marks' names
    axes.set_title(name, loc="left", parse_math=False, color=INK, font=_font(TEXT + 1), pad=above)
    _name(axes.xaxis, xlabel)
    _bare(axes, "left", "bottom")
    axes.grid(True, which="major", color=GRID, linewidth=0.7, linestyle="-")

    low, high = every_x.min(initial=math.inf), every_x.max(initial=-math.inf)
    if low < high < math.inf:
        axes.set_xlim(low - 0.04 * (high - low), high + 0.04 * (high - low))
    whole = bool((every_x == every_x.round()).all())  # no step 2.5
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=whole))
    axes.xaxis.set_major_formatter(Ticks())
    y = np.concatenate([np.zeros(0), *(line.get_ydata() for line in axes.lines)])
    _ticks(axes, "y", y, log)

    low, high = axes.get_xlim()
    for i, (text, x) in enumerate(marks.items()):
        axes.axvline(x, color=FAINT, linewidth=1.0, linestyle=(0, (1, 2)), zorder=1)
        share = (x - low) / (high - low)
        axes.annotate(
            text, (x, 1), xycoords=("data", "axes fraction"), parse_math=False, color=FAINT,
            xytext=(0, 3 + i * TEXT * LINE), textcoords="offset points", va="baseline",
            ha="left" if share < 0.3 else "right" if share > 0.7 else "center",
            font=_font(TEXT - 0.5),
        )  # fmt: skip


def _plots(
    title: str, width: int, height: int, num_rows: int = 1, num_columns: int = 1
) -> tuple[Figure, np.ndarray]:
    """A figure and its axes, row by row; the lines of the title add to the height."""
    width = max(width, MIN_WIDTH)
    lines = _wrap(title, width - 2 * MARGIN, TITLE, "bold")
    figure = _figure(width, height + MARGIN + len(lines) * LINE_HEIGHT * TITLE)
    pad = MARGIN / DPI  # inches
    figure.set_layout_engine("constrained", w_pad=pad, h_pad=pad / 2, wspace=0, hspace=0)
    figure.suptitle("\n".join(lines), x=MARGIN / width, ha="left", parse_math=False, color=INK,
                    font=_font(TITLE, "bold"), linespacing=LINE)  # fmt: skip
    return figure, figure.subplots(num_rows, num_columns, squeeze=False).ravel()


def _bare(axes: Any, *sides: str) -> None:
    """White, with lines at these sides alone, and small numbers without ticks."""
    axes.set_facecolor("white")
    axes.set_axisbelow(True)
    for side, spine in axes.spines.items():
        spine.set(visible=side in sides, color=HAIRLINE, linewidth=0.8)
    axes.tick_params(which="both", length=0, labelsize=TEXT, labelcolor=FAINT, pad=4)
    axes.tick_params(labelfontfamily="DejaVu Sans")


def _name(axis: Any, text: str, width: float = math.inf) -> None:
    """What an axis shows, in lines of at most `width` dots."""
    text = "\n".join(_wrap(text, width, TEXT))
    axis.set_label_text(text, parse_math=False, color=FAINT, font=_font(TEXT))


def _ticks(axes: Any, name: str, values: np.ndarray, log: bool) -> None:
    """Few and short labels along x or y; logarithmic where there are values for it."""
    axis = getattr(axes, f"{name}axis")
    axis.set_major_locator(MaxNLocator(5))
    axis.set_major_formatter(Ticks())
    if log and (values > 0).any():
        getattr(axes, f"set_{name}scale")("log", nonpositive="mask")
        subs = (1,) if np.ptp(np.log10(values[values > 0])) > 2 else (1, 2, 5)
        axis.set_major_locator(LogLocator(subs=subs, numticks=7))
        axis.set_major_formatter(Ticks(log=True))
        axis.set_minor_formatter(NullFormatter())


def _number(value: float) -> str:
    """In three digits or whole: 0.0123, 12.3, 12,345, 1.23e7."""
    text = f"{value:,.0f}" if 1000 <= round(abs(value)) < 1e6 else f"{value:.3g}"
    for exponent, short in (("e+0", "e"), ("e+", "e"), ("e-0", "e-")):
        text = text.replace(exponent, short)
    return text.replace("-", "−", text.startswith("-"))


class Ticks(Formatter):
    """Tick labels with a common unit and number of digits: 0.0 0.5 1.0, or 0 50k 100k."""

    def __init__(self, log: bool = False):
        self.log = log

    def __call__(self, value: float, pos: int | None = None) -> str:
        return self.format_ticks([value])[0]

    def format_ticks(self, values: Sequence[float]) -> list[str]:
        if self.log:
            return [f"{v:g}".replace("e-0", "e-").replace("e+0", "e") for v in values]
        values, unit = np.asarray(values, dtype=float), ""
        while unit != "G" and abs(values).max(initial=0) >= 1e4:
            values, unit = values / 1e3, {"": "k", "k": "M", "M": "G"}[unit]
        near = np.ptp(values) / 1e6 if len(values) > 1 else 0  # binary fractions are not round
        values = np.where(abs(values) <= near, 0.0, values)  # nor is their 0; and no -0
        digits = [d for d in range(7) if (abs(values - values.round(d)) <= near).all()]
        text = [f"{v:.{digits[0]}f}" if digits else f"{v:g}" for v in values]
        text = [part if unit and not float(part) else part + unit for part in text]  # no 0k
        return [part.replace("-", "−") for part in text]


# -- in and out ------------------------------------------------------------------------------------


def _numpy(values: Any) -> Any:
    if isinstance(values, torch.Tensor):
        values = values.detach().cpu()
        values = values.float() if values.dtype == torch.bfloat16 else values  # numpy has none
        return values.numpy()
    return values


def _floats(values: Any, name: str, ndim: int) -> np.ndarray:
    """As a float32 array with `ndim` axes, none of them empty, without NaN."""
    array = np.asarray(_numpy(values))
    if array.ndim != ndim or not array.size:
        raise ValueError(f"{name} must have {ndim} axes, none empty, not {array.shape}")
    if array.dtype.kind not in "fb":  # integers would be on the scale of 0 to 255
        raise ValueError(f"{name} must be floats in [0, 1], not {array.dtype}")
    if np.isnan(array).any():
        raise ValueError(f"{name} holds NaN")
    return array.astype(np.float32)


def _masks(values: Any, name: str, ndim: int) -> np.ndarray:
    array = _floats(values, name, ndim)
    if array.min() < -1e-3 or array.max() > 1 + 1e-3:  # rounding may leave the range, logits do
        raise ValueError(f"{name} must be in [0, 1], not {array.min():g} to {array.max():g}")
    return array


def _bools(values: Any, name: str, ndim: int) -> np.ndarray:
    array = np.asarray(_numpy(values))
    if array.ndim != ndim or not array.size or array.dtype != bool:
        raise ValueError(f"{name} must be bool with {ndim} axes, not {array.dtype} {array.shape}")
    return array


def _images(values: Any, name: str, ndim: int) -> np.ndarray:
    """(..., C, H, W) -> (..., H, W, 3), clipped to [0, 1]; one channel becomes grey."""
    array = rearrange(_floats(values, name, ndim), "... c h w -> ... h w c")
    if array.shape[-1] not in (1, 3):
        raise ValueError(f"{name} must have 1 or 3 channels, not {array.shape[-1]}")
    return np.clip(np.broadcast_to(array, (*array.shape[:-1], 3)), 0, 1)


def _boxes(values: Any, most: int) -> np.ndarray:
    """The boxes of one scene, at most `most`, as (n, 4), without the NaN rows at their end."""
    boxes = np.asarray(_numpy(values), dtype=float)
    if boxes.ndim != 2 or boxes.shape[1] != 4 or len(boxes) > most:
        raise ValueError(f"boxes of a scene must be (n, 4), n at most {most}, not {boxes.shape}")
    boxes = boxes[: (~np.isnan(boxes).all(1)).sum()]
    if not (np.isfinite(boxes).all() and (boxes[:, 2:] > 0).all()):
        raise ValueError(f"boxes must be finite, of sizes above 0, or NaN rows at the end: {boxes}")
    return boxes


def _same(axes: str, *arrays: np.ndarray) -> None:
    """Raises ValueError unless all shapes are equal; `axes` names what they have in common."""
    shapes = [array.shape for array in arrays]
    if len(set(shapes)) > 1:
        raise ValueError(f"arguments differ in ({axes}): {', '.join(map(str, shapes))}")


def _figure(width: int, height: int) -> Figure:
    """A white figure of width x height dots. (A hundredth more: a dot must not be rounded away.)"""
    size = (width + 0.01) / DPI, (height + 0.01) / DPI
    figure = Figure(figsize=size, dpi=DPI, facecolor="white", edgecolor="white")
    FigureCanvasAgg(figure)
    return figure


def _save(figure: Figure, path: str | Path) -> Path:
    """Through a temporary file in the same folder, which is made if need be, and a rename."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        # Not savefig, whose crop and resolution rcParams may change; no version number in the file.
        figure.canvas.print_png(temporary, metadata={"Software": None})
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    return path
