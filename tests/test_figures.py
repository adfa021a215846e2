"""Figures: colours that follow the matching, sharp images, text that does not collide."""

import itertools
import os
import subprocess
import sys

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import PIL.Image
import pytest
import torch
from matplotlib.text import Text
from torch.nn.functional import one_hot

from data import figures


def scene(num_scenes=2, num_entities=4, num_slots=5, size=12, channels=3):
    """Arguments of `decomposition`: entities in random pixels, each with a random slot. The last of
    several entities is absent in scene 0; where slots are too few, the last entities share one."""
    torch.manual_seed(0)
    labels = torch.randint(num_entities, (num_scenes, size, size))
    labels[0] %= max(num_entities - 1, 1)
    slots = torch.stack([torch.randperm(num_slots)[x.clamp(max=num_slots - 1)] for x in labels])
    masks = 0.1 / num_slots + 0.9 * one_hot(slots, num_slots).movedim(-1, 1)  # (N, K, H, W)
    means = torch.rand(num_scenes, num_slots, channels, 1, 1).expand(-1, -1, -1, size, size)
    image = (masks[:, :, None] * means).sum(1)
    return image, image, one_hot(labels, num_entities).movedim(-1, 1).bool(), masks, means


def steps(**sizes):
    """Arguments of `refinement`: the slots change their places after the first of three steps."""
    image, reconstruction, true, masks, means = scene(num_scenes=1, **sizes)
    trace = torch.cat([masks.flip(1), (masks.flip(1) + masks) / 2, masks])  # (T, K, H, W)
    return image[0], true[0], reconstruction.repeat(3, 1, 1, 1), trace, means.repeat(3, 1, 1, 1, 1)


BOXES = torch.tensor([[[5, 7, 20, 10], [30, -4, 20, 54], [torch.nan] * 4]])  # two steps, then none
GLANCES = torch.rand(1, 1, 40, 40), BOXES, torch.rand(1, 3, 1, 40, 40)
X = list(range(1, 11))
PANELS = {
    "ari_fg": {"a": (X, [*np.linspace(0, 0.97, 9), None], [0.02] * 9 + [None]), "b": (X, X, None)},
    "mse": {"a": (X, [0.05 / x for x in X], [0.02] * 10), "b": (torch.arange(9.0), X[:9], None)},
    "none": {"a": (X, [None] * 10, [None] * 10)}, "missing": {},
    "a $ in a title": {"b": (np.arange(0, 200_000, 200), -12_000 + np.arange(1000.0), None)},
}  # fmt: skip
LONG = "A long title, which says what the figure shows and which a narrow one has no room for: $x"
VALUES = {
    "enumerate": (None, None), "nvil": (3.21, 0.4), "vimco": (0.42, 0.5), "zero": (0.0, None),
    "reinforce": (12_345.6, 250), "$x$, of which there is a lot to say: $y$": (0.0031, None),
    "less": (-1500, 10), "awordwithoutanyspaceinitwhichisbroken": (float("nan"), 1.0),
}  # fmt: skip
CALLS = {
    "decomposition": ("decomposition", *scene(), LONG, torch.tensor([0.5, torch.nan]).bfloat16()),
    "grey": ("decomposition", *scene(1, 1, 1, 128, 1), "One scene, one slot"),
    "refinement": ("refinement", *steps(), LONG),
    "grid": ("grid", torch.rand(2, 3, 3, 16, 16), "Traversals", [-2, -0.0, 1], ["latent", LONG]),
    "samples": ("samples", torch.rand(9, 1, 12, 12), LONG, torch.rand(9, 5, 12, 12).softmax(1)),
    "curves": ("curves", PANELS, "test steps", LONG, {"trained": 5, "twice": 10}, ("mse",)),
    "attention": ("attention", *GLANCES, LONG, ["counts 2, has 3 of the $ that there are"]),
    "tracking": ("tracking", torch.rand(2, 3, 1, 40, 40), BOXES.nan_to_num(3).expand(2, 3, 3, 4),
                 torch.tensor([[0, 1, 2]]).expand(2, 3, 3), LONG, torch.rand(2, 3, 1, 40, 40)),
    "confusion": ("confusion", np.arange(60).reshape(5, 12) ** 4, LONG),
    "bars": ("bars", VALUES, LONG, LONG),
    "logarithmic bars": ("bars", VALUES, "Log", "variance $ / x", True),
    "negative bars": ("bars", {"a": (-120.5, 2), "b": (torch.tensor(-99.0), None)}, LONG, "elbo"),
    "no bar": ("bars", {"a": (None, None), "b": (0, 1)}, "None", "x", True),
}  # fmt: skip


@pytest.fixture
def draw(monkeypatch, tmp_path):
    """Calls a figure function: its figure, the rows of its panels, and the PNG (H, W, 3)."""

    def call(name, *args, **options):
        figure, rows, save, sheet = [], [], figures._save, figures._sheet
        with monkeypatch.context() as patch:
            patch.setattr(figures, "_save", lambda *a: figure.append(a[0]) or save(*a))
            patch.setattr(figures, "_sheet", lambda r, *a, **k: rows.extend(r) or sheet(r, *a, **k))
            path = getattr(figures, name)(str(tmp_path / "new" / "f.png"), *args, **options)
        assert list(path.parent.iterdir()) == [path]
        figure[0].draw_without_rendering()  # texts have their places
        return figure[0], rows, (matplotlib.image.imread(path)[..., :3] * 255).round().astype(int)

    return call


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("name", CALLS)
def test_images_are_sharp_and_no_text_collides_or_is_cut_off(name, draw):
    figure, rows, picture = draw(*CALLS[name])
    assert (picture[[15, -15]] == 255).all() and (picture[:, [15, -15]] == 255).all()  # the margin
    if rows:  # the panels stand in the PNG dot by dot, and no text on them
        canvas = (figure.axes[0].images[0].get_array() * 255).round()
        height, width = canvas.shape[:2]
        left, below = (20 - np.round(figure.get_tightbbox().p0 * figures.DPI)).astype(int)
        top = len(picture) - below - height
        assert abs(picture[top : top + height, left : left + width] - canvas).max() <= 1
        assert abs(canvas[3, 3] - rows[0][0].image[0, 0] * 255).max() <= 0.51
    boxes = [(text, text.get_window_extent()) for text in figure.findobj(Text) if in_view(text)]
    for (text, box), (other, second) in itertools.combinations(boxes, 2):
        x_apart = box.x1 <= second.x0 or second.x1 <= box.x0
        y_apart = box.y1 <= second.y0 or second.y1 <= box.y0
        assert x_apart or y_apart, f"{text} on {other}"


def in_view(text):
    """Tick labels beyond the ends of an axis exist but are not drawn."""
    for axis in (axis for axes in text.figure.axes for axis in (axes.xaxis, axes.yaxis)):
        low, high = sorted(axis.get_view_interval())
        for tick in axis.get_major_ticks():
            if text in (tick.label1, tick.label2) and not low <= tick.get_loc() <= high:
                return False
    return text.get_visible() and text.get_text()


SCRIPT = """
from data import figures
figures.samples(folder + "/samples.png", [[[[0.5, 0.7]]]], "Samples")
figures.curves(folder + "/curves.png", {"kl": {"": ([1, 2], [3, 20_000], [1, 2])}}, "step", "$")
figures.confusion(folder + "/confusion.png", [[1, 2], [3, 4]], "Confusion")
figures.bars(folder + "/bars.png", {"a": (3, 1), "b": (None, None)}, "Bars", "nats", log=True)
"""


def test_neither_backend_nor_matplotlibrc_of_the_user_matters(tmp_path):
    before = dict(matplotlib.rcParams)
    exec(SCRIPT, {"folder": str(tmp_path)})
    assert not plt.get_fignums() and dict(matplotlib.rcParams) == before
    rc = tmp_path / "matplotlibrc"
    rc.write_text("font.size: 20\nsavefig.dpi: 40\nfigure.facecolor: red\nsavefig.bbox: tight\n")
    variables = {**os.environ, "MPLBACKEND": "module://not_installed", "MATPLOTLIBRC": str(rc)}
    command = [sys.executable, "-c", f"folder = {str(tmp_path / 'other')!r}\n{SCRIPT}"]
    subprocess.run(command, env=variables, check=True)
    for file in (tmp_path / "other").iterdir():
        assert file.read_bytes() == (tmp_path / file.name).read_bytes()


def on_white(image, mask):
    return (mask * image + 1 - mask).permute(1, 2, 0).numpy()


def ordered(matched, slots):
    """The background's slot, the objects' by number, the rest."""
    return sorted(range(slots), key=lambda k: matched.index(k) if k in matched else slots + k)


@pytest.mark.parametrize(("entities", "slots"), [(4, 5), (4, 4), (5, 3), (12, 12), (1, 1)])
def test_a_slot_has_the_colour_of_its_entity(entities, slots, draw):
    *images, true, masks, means = scene(2, entities, slots)
    _, rows, _ = draw("decomposition", *images, true, masks, means, "Colours")
    for n, (_, _, truth, predicted, *shown) in enumerate(rows):
        matched = figures.metrics.match(true, masks)[n].tolist()
        order = ordered(matched, slots)
        for e, k in enumerate(matched):
            assert (truth.image[true[n, e].numpy()] == figures._color(e)).all()
            assert k < 0 or shown[order.index(k)].frame == figures._color(e)
        mixture = 0
        for k, panel in zip(order, shown, strict=True):
            assert abs(panel.image - on_white(means[n, k], masks[n, k])).max() < 1e-6
            mixture = mixture + masks[n, k, :, :, None].numpy() * np.array(panel.frame)
        assert abs(predicted.image - mixture).max() < 1e-6
        assert len({panel.frame for panel in shown}) == slots  # each has a colour of its own


def test_without_true_masks_slots_keep_their_order(draw):
    image, reconstruction, _, masks, means = scene()
    colors = [figures._color(k) for k in range(1, 6)]
    _, rows, _ = draw("decomposition", image, reconstruction, None, masks, means, "t")
    assert [[panel.frame for panel in row] for row in rows] == [[None] * 3 + colors] * 2
    image, _, *trace = steps()
    _, rows, _ = draw("refinement", image, None, *trace, "t")
    assert [panel.frame for panel in rows[1]] == [None] * 3 + colors


def test_one_colour_follows_one_slot_through_the_steps(draw):
    image, true, _, masks, means = args = steps(num_slots=4)
    slots = figures.metrics.match(true[None], masks[-1:])[0].tolist()  # at the last step
    _, rows, _ = draw("refinement", *args, "Steps")
    order = ordered(slots, 4)
    for t, (seen, _, _, _, *shown) in enumerate(rows):
        assert abs(seen.image - image.permute(1, 2, 0).numpy()).max() < 1e-6
        assert [panel.frame for panel in shown] == [panel.frame for panel in rows[0][4:]]
        for k, panel in zip(order, shown, strict=True):
            assert abs(panel.image - on_white(means[t, k], masks[t, k])).max() < 1e-6
    colors = [figures._color(slots.index(k)) for k in order if k in slots]
    assert [panel.frame for panel in rows[0][4:]][: len(colors)] == colors


def test_an_animation_ends_as_the_decomposition_with_its_order_throughout(draw, tmp_path):
    image, mean, true, masks, means = scene()
    trace = torch.stack([masks.flip(1), (masks.flip(1) + masks) / 2, masks])  # (T, N, K, H, W)
    args = mean.repeat(3, 1, 1, 1, 1), true, trace, means.repeat(3, 1, 1, 1, 1, 1)
    path = figures.animation(tmp_path / "steps.gif", image, *args, "Title")
    with PIL.Image.open(path) as file:
        frames, times = [], []
        for t in range(file.n_frames):
            file.seek(t)
            frames.append(np.asarray(file.convert("RGB")).astype(int))
            times.append(file.info["duration"])
    assert times == [500, 500, 2500] and file.info["loop"] == 0
    _, rows, last = draw("decomposition", image, mean, true, masks, means, "Title: step 3 of 3")
    assert abs(frames[2] - last).mean() < 1  # of 255; a GIF has 256 colours
    # The frame of a panel is its slot's colour at every step, and what it holds is not.
    rim = (last == np.array(rows[0][4].frame).reshape(3) * 255).all(2)
    assert rim.sum() > 1000
    for before in frames[:2]:
        assert abs(before - last)[rim].mean() < 6 and abs(before - last).mean() > 3


def test_a_film_of_tracked_objects_has_their_frames_in_their_colours(draw, tmp_path):
    image, boxes, numbers = torch.rand(2, 3, 1, 40, 40), BOXES[:, :2].expand(2, 3, 2, 4), [[2, 0]]
    args = image, boxes, torch.tensor([numbers * 3] * 2)
    _, rows, _ = draw("tracking", *args, "t")
    assert [len(row) for row in rows] == [3, 3]
    for panel in (panel for row in rows for panel in row):
        assert (panel.image[15, 21:51] == figures._color(2)).all()  # identity 2
        assert (panel.image[90] != figures._color(1)).any()  # the second is not there
    path = figures.tracking(tmp_path / "film.gif", *args, "t", image)
    with PIL.Image.open(path) as film:
        assert film.n_frames == 3


def test_the_largest_mask_of_a_sample_is_grey(draw):
    masks = torch.zeros(1, 3, 16, 16)
    masks[0, 1], masks[0, 2, :4, :4], masks[0, 1, :4, :4] = 1, 1, 0
    images = torch.linspace(-1, 2, 256).reshape(1, 1, 16, 16).requires_grad_()
    _, ((image,), (segments,)), _ = draw("samples", images.bfloat16(), "t", masks)
    assert abs(image.image[..., 0] - images.detach()[0, 0].clamp(0, 1).numpy()).max() < 0.006
    assert (segments.image[0, 0] == figures._color(3)).all()
    assert (segments.image[8, 8] == figures._color(0)).all()


def test_a_box_is_drawn_where_it_is_in_the_colour_of_its_step(draw):
    _, ((_, both, first, second),), _ = draw("attention", *GLANCES, "t")
    expected = np.kron(0.25 + 0.75 * GLANCES[0][0, 0, :, :, None].numpy(), np.ones((3, 3, 3)))
    inside = expected[18:72, 24:48].copy()
    expected[15:75, 21:51] = figures._color(1)
    expected[18:72, 24:48] = inside
    expected[90:93] = figures._color(2)  # the second box is beyond three of the edges
    assert abs(both.image - expected).max() < 1e-6
    assert (first.image[15, 21:51] == figures._color(1)).all() and first.frame == figures._color(1)
    assert (second.image[90] == figures._color(2)).all() and second.frame == figures._color(2)


def test_a_cell_is_as_dark_as_its_share_and_its_text_is_readable(draw):
    counts = [[share, 1000 - share] for share in range(0, 1001, 50)]
    (axes,) = draw("confusion", counts, "t")[0].axes
    cells = np.asarray(axes.collections[0].get_array())
    blue = np.array(matplotlib.colors.to_rgb(figures.SHADE))
    for i, (r, v) in enumerate(np.ndindex(21, 2)):
        number, share = axes.texts[i], counts[r][v] / 1000
        assert number.get_text() == f"{counts[r][v]:,}\n{share:.1%}"
        assert abs(cells[r, v] - 1 + share * (1 - blue)).max() < 1e-6
        pair = np.array([matplotlib.colors.to_rgb(number.get_color()), cells[r, v]])
        linear = np.where(pair <= 0.04045, pair / 12.92, ((pair + 0.055) / 1.055) ** 2.4)
        low, high = sorted(linear @ (0.2126, 0.7152, 0.0722))
        assert (high + 0.05) / (low + 0.05) > 4.5  # WCAG 2.1


@pytest.mark.parametrize("log", [False, True])
def test_a_bar_ends_at_its_value(log, draw):
    (axes,) = draw("bars", VALUES, "t", "variance", log=log)[0].axes
    printed = ["3.21", "0.42", *["0"] * (not log), "12,346", "0.0031", *["−1,500"] * (not log)]
    assert [text.get_text() for text in axes.texts] == printed
    texts = iter(axes.texts)
    for i, (bar, (value, stderr)) in enumerate(zip(axes.patches, VALUES.values(), strict=True)):
        absent = value is None or value != value or (log and value <= 0)
        assert bar.get_y() + bar.get_height() / 2 == pytest.approx(i)
        assert bar.get_width() == pytest.approx(np.nan if absent else value, nan_ok=True)
        if not absent:
            end = max(value + (stderr or 0), 0)
            assert next(texts).xy == pytest.approx((end, i))  # right of it


@pytest.mark.parametrize(("position", "value"), [
    (0, scene()[0][0]), (0, scene()[0] * np.nan), (0, scene()[0][:, :2]), (2, scene()[2][0]),
    (3, scene()[3][0]), (4, scene()[4][:, 1:]),
])  # fmt: skip
def test_what_does_not_fit_is_refused(position, value, tmp_path):
    arguments = list(scene())
    arguments[position] = value
    with pytest.raises(ValueError):
        figures.decomposition(tmp_path / "figure.png", *arguments, "t")
    assert not list(tmp_path.iterdir())
