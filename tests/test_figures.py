"""Figures: colours that follow the matching, text that does not collide, files that are whole."""

import itertools
import os

import matplotlib
import numpy as np
import pytest
import torch
from matplotlib.text import Text

from data import figures


def scene(num_scenes=2, num_entities=4, num_slots=5, size=12, channels=3, seed=0):
    """Arguments of `decomposition`: squares, slots in random order. Of three or more entities the
    last is empty in scene 0; where slots are too few, the last entities share one."""
    rng = np.random.default_rng(seed)
    labels = np.zeros((num_scenes, size, size), int)
    for n, entity in itertools.product(range(num_scenes), range(1, num_entities)):
        if not (n == 0 and num_entities > 2 and entity == num_entities - 1):
            row, col = divmod(entity - 1, 4)  # a cell each, so that all are visible
            cell = size // 4
            labels[n, row * cell : (row + 1) * cell - 1, col * cell : (col + 1) * cell - 1] = entity
    true = labels[:, None] == np.arange(num_entities)[:, None, None]  # (N, E, H, W)
    order = np.stack([rng.permutation(num_slots) for _ in range(num_scenes)])  # slot of entity e
    masks = np.full((num_scenes, num_slots, size, size), 0.1 / num_slots)
    for n, entity in itertools.product(range(num_scenes), range(num_entities)):
        masks[n, order[n, min(entity, num_slots - 1)]] += 0.9 * true[n, entity]
    means = rng.random((num_scenes, num_slots, channels, 1, 1)) + np.zeros((size, size))
    image = (masks[:, :, None] * means).sum(1)
    floats = (torch.tensor(a, dtype=torch.float32) for a in (image, image, masks, means))
    image, reconstruction, masks, means = floats
    return image, reconstruction, torch.tensor(true), masks, means


def steps(**sizes):
    """Arguments of `refinement`."""
    image, reconstruction, true, masks, means = scene(num_scenes=1, **sizes)
    hidden = torch.full_like(masks, 1 / masks.shape[1])
    trace = torch.cat([hidden, (hidden + masks) / 2, masks])  # (T, K, H, W)
    return image[0], true[0], reconstruction.repeat(3, 1, 1, 1), trace, means.repeat(3, 1, 1, 1, 1)


def glances(num_steps=(0, 2, 3), size=50, channels=1):
    """Arguments of `attention`: as many steps of each scene, of which every one fills its box."""
    rng = np.random.default_rng(1)
    boxes = np.full((len(num_steps), max(num_steps), 4), np.nan)
    canvases = np.zeros((*boxes.shape[:2], channels, size, size))
    for n, taken in enumerate(num_steps):
        for s, (top, left) in enumerate(rng.integers(-5, size - 5, (taken, 2))):
            boxes[n, s] = top, left, 13.3, 13
            seen = ..., slice(max(top, 0), top + 13), slice(max(left, 0), left + 13)
            canvases[n, s:][seen] = rng.random((channels, 1, 1))
    image = torch.tensor(canvases[:, -1] if max(num_steps) else np.zeros((1, channels, size, size)))
    return image, torch.tensor(boxes), torch.tensor(canvases)


X = list(range(1, 11))
PANELS = {
    "ari_fg": {"a": (X, [*np.linspace(0, 0.97, 9), None], [0.02] * 9 + [None]), "b": (X, X, None)},
    "mse": {"a": (X, [0.05 / x for x in X], [0.02] * 10), "b": (torch.arange(9.0), X[:9], None)},
    "a $ in a title": {"b": (np.arange(0, 200_000, 200), -12_000 + np.arange(1000.0), None)},
}
LONG = "A long title, which says what the figure shows and which a narrow one has no room for: $x"
COUNTS = [[981, 19, 0, 0], [12, 600, 388, 0], [0, 61, 890, 49], [0, 0, 0, 0]]
VALUES = {
    "enumerate": (None, None), "nvil": (3.21, 0.4), "vimco": (0.42, 0.5), "zero": (0.0, None),
    "reinforce": (12_345.6, 250), "$x$, of which there is a lot to say: $y$": (0.0031, None),
    "less": (-1500, 10), "awordwithoutanyspaceinitwhichisbroken": (float("nan"), 1.0),
}  # fmt: skip
CALLS = {
    "decomposition": lambda path: figures.decomposition(
        path, *scene(), LONG, scores=[0.5, float("nan")]
    ),
    "one scene, one slot, grey": lambda path: figures.decomposition(
        path, *scene(1, 1, 1, channels=1), "Grey"
    ),
    "more entities than slots": lambda path: figures.decomposition(
        path, *scene(2, 6, 3), LONG, torch.tensor([-0.1, 1.0], dtype=torch.bfloat16)
    ),
    "twelve slots": lambda path: figures.decomposition(path, *scene(1, 12, 12, 128), "Twelve"),
    "refinement": lambda path: figures.refinement(path, *steps(), LONG),
    "refinement, few slots": lambda path: figures.refinement(
        path, *steps(num_entities=5, num_slots=2, size=35, channels=1), "Few slots"
    ),
    "traversals": lambda path: figures.traversals(
        path, torch.rand(2, 7, 3, 16, 16), ["latent 3", "x position of the orange cylinder"],
        torch.linspace(-2, 2, 7).tolist(), "Traversals",
    ),
    "one traversal": lambda path: figures.traversals(
        path, np.ones((1, 1, 1, 9, 9)), "z", [0.5], LONG
    ),
    "samples": lambda path: figures.samples(path, torch.rand(11, 3, 14, 14), "Eleven samples"),
    "samples and masks": lambda path: figures.samples(
        path, torch.rand(9, 1, 12, 12), LONG, torch.rand(9, 5, 12, 12).softmax(1)
    ),
    "one sample": lambda path: figures.samples(path, torch.rand(1, 3, 64, 64), LONG),
    "curves": lambda path: figures.curves(
        path, PANELS, "steps at test time", LONG, {"trained": 5, "twice": 10, "$": 7}, ("mse",)
    ),
    "one curve": lambda path: figures.curves(
        path, {"kl": {"": ([1, 2], [3.0, 2.0], None)}}, "step", LONG, {"trained": 1}
    ),
    "six panels": lambda path: figures.curves(
        path, {f"metric {i}": {"": (X, [10.0**-x * i for x in X], None)} for i in range(6)},
        "step", "Six panels", logy=("metric 0", "metric 1", "metric 2"),
    ),
    "attention": lambda path: figures.attention(
        path, *glances(), LONG, ["counts 0, has 0", "counts 2, has 3 of the $ that there are", "x"]
    ),
    "attention, many steps": lambda path: figures.attention(
        path, *glances((12, 1), 64, 3), "Twelve steps"
    ),
    "attention, one step": lambda path: figures.attention(path, *glances((1,), 9), LONG, [""]),
    "attention, no step": lambda path: figures.attention(
        path, torch.rand(2, 1, 28, 28), [np.zeros((0, 4))] * 2, torch.rand(2, 1, 1, 28, 28), "None"
    ),
    "confusion": lambda path: figures.confusion(path, COUNTS, LONG),
    "confusion, one": lambda path: figures.confusion(path, torch.tensor([[7]]), "One"),
    "confusion, large": lambda path: figures.confusion(
        path, np.arange(60).reshape(5, 12) ** 7, LONG, LONG, LONG + " " + LONG
    ),
    "confusion, tall": lambda path: figures.confusion(path, [[0], [1]] * 6, "", "$r", "$v"),
    "bars": lambda path: figures.bars(path, VALUES, LONG, LONG),
    "bars, logarithmic": lambda path: figures.bars(path, VALUES, "Log", "variance $ / x", log=True),
    "bars, negative": lambda path: figures.bars(
        path, {"a": (-120.5, 2), "second": (torch.tensor(-99.0), None)}, LONG, "elbo"
    ),
    "bars, close": lambda path: figures.bars(
        path, {"a": (2e-4, 1e-4), "b": (9.9e-4, 1e-2), "": (2e-2, 0)}, "Close", "x", log=True
    ),
    "one bar": lambda path: figures.bars(path, {"": (1e-5, None)}, "One", "", log=True),
    "no bar": lambda path: figures.bars(
        path, {"a": (None, None), "b": (0, 1), "c": (float("inf"), 1)}, "None", "x", log=True
    ),
    "nothing to plot": lambda path: figures.curves(
        path, {"ari_fg": {"": (X, [None] * 10, [None] * 10)}, "none": {}}, "step", "No values"
    ),
}  # fmt: skip


@pytest.fixture
def drawn(monkeypatch, tmp_path):
    """Calls a figure function and returns the figure instead of writing it."""

    def draw(function, *args, **options):
        caught = []
        monkeypatch.setattr(figures, "_save", lambda figure, path: caught.append(figure))
        function(tmp_path / "unused.png", *args, **options)
        return caught[0]

    return draw


def pixels(figure):
    """The pasted picture, (height, width, 3)."""
    return figure.images[0].get_array()


# -- files -----------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("name", CALLS)
def test_a_png_is_written_and_no_text_collides(name, tmp_path, monkeypatch):
    caught, save = [], figures._save
    monkeypatch.setattr(figures, "_save", lambda *args: [caught.append(args[0]), save(*args)][1])
    path = CALLS[name](str(tmp_path / "new folder" / "figure.png"))
    assert path == tmp_path / "new folder" / "figure.png"
    assert [file.name for file in path.parent.iterdir()] == ["figure.png"]
    assert path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n" and 1500 < path.stat().st_size < 500_000

    (figure,) = caught
    width, height = (round(side) for side in figure.bbox.size)
    assert width >= figures.MIN_WIDTH and height > 150
    if figure.images:  # nothing was resampled
        stored = (matplotlib.image.imread(path)[..., :3] * 255).round().astype(int)  # (H, W, 3)
        assert stored.shape == pixels(figure).shape == (height, width, 3)
        assert (abs(stored - pixels(figure).astype(int)).max(2) > 1).mean() < 0.2  # but the text

    renderer = figure.canvas.get_renderer()
    boxes = [
        (text.get_text(), text.get_window_extent(renderer))
        for text in figure.findobj(Text)
        if text.get_visible() and text.get_text() and in_view(text)
    ]
    assert len(boxes) > 2 or not figure.axes
    for text, box in boxes:
        assert box.x0 >= 0 and box.y0 >= 0 and box.x1 <= width and box.y1 <= height, text
    for (text, box), (other, second) in itertools.combinations(boxes, 2):
        apart = (
            box.x1 <= second.x0 or second.x1 <= box.x0 or box.y1 <= second.y0 or second.y1 <= box.y0
        )
        assert apart, f"{text!r} overlaps {other!r}"


def in_view(text):
    """Tick labels beyond the ends of an axis exist but are not drawn."""
    for axes in text.figure.axes:
        if not axes.axison and text in axes.findobj(Text):
            return False
        for axis, limits in ((axes.xaxis, axes.get_xlim()), (axes.yaxis, axes.get_ylim())):
            for tick in axis.get_major_ticks() + axis.get_minor_ticks():
                if text in (tick.label1, tick.label2):
                    return min(limits) <= tick.get_loc() <= max(limits)
    return True


def test_a_failed_write_leaves_nothing(tmp_path, monkeypatch):
    target = tmp_path / "figure.png"
    target.mkdir()  # the rename fails
    with pytest.raises(OSError):
        figures.samples(target, torch.rand(1, 3, 8, 8), "t")
    assert [file.name for file in tmp_path.iterdir()] == ["figure.png"]
    target.rmdir()
    target.write_text("old")
    with pytest.raises(OSError):
        figures.samples(target / "figure.png", torch.rand(1, 3, 8, 8), "t")

    def half_written(canvas, path, **options):
        path.write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(figures.FigureCanvasAgg, "print_png", half_written)
    with pytest.raises(KeyboardInterrupt):
        figures.samples(target, torch.rand(1, 3, 8, 8), "t")
    assert [file.name for file in tmp_path.iterdir()] == ["figure.png"]
    assert target.read_text() == "old"


def test_a_read_only_folder(tmp_path):
    tmp_path.chmod(0o555)
    try:
        if os.access(tmp_path, os.W_OK):
            pytest.skip("permissions do not bind this user")
        with pytest.raises(PermissionError):
            figures.samples(tmp_path / "figure.png", torch.rand(1, 3, 8, 8), "t")
        assert not list(tmp_path.iterdir())
    finally:
        tmp_path.chmod(0o755)


def test_matplotlibs_state_is_left_alone(tmp_path):
    import matplotlib.pyplot as plt

    plt.close("all")
    plt.switch_backend("agg")
    before = dict(matplotlib.rcParams)
    for name in ("one scene, one slot, grey", "one curve", "attention", "confusion", "bars"):
        call = CALLS[name]
        first = call(tmp_path / "first.png").read_bytes()
        with matplotlib.rc_context({"savefig.bbox": "tight", "savefig.dpi": 40, "figure.dpi": 40}):
            assert call(tmp_path / "second.png").read_bytes() == first  # nor does it matter
    assert not plt.get_fignums() and dict(matplotlib.rcParams) == before


# -- colours ---------------------------------------------------------------------------------------


def dots(figure, at, size, num_rows=1, columns_apart=(), rows_apart=(), left=figures.MARGIN):
    """The panel at (row, column) of a sheet as enlarged, and the colour of its frame. `left`: where
    the first frame begins."""
    canvas, scale = pixels(figure), -(-figures.PANEL // size)
    side = size * scale
    x = figures._starts(left, at[1] + 1, side, columns_apart)[-1]
    rows = figures._starts(0, num_rows, side, rows_apart)  # the last one ends at the lower margin
    y = canvas.shape[0] - figures.MARGIN - figures.FRAME - side - rows[-1] + rows[at[0]]
    return canvas[y : y + side, x : x + side].astype(int), canvas[y, x - figures.FRAME].astype(int)


def panel(figure, at, size, **sheet):
    """Likewise, but a value per pixel of the image (H, W, 3)."""
    block, frame = dots(figure, at, size, **sheet)
    scale = len(block) // size
    pixel = block[::scale, ::scale]
    assert (block == np.kron(pixel, np.ones((scale, scale, 1)))).all()  # crisp
    return pixel, frame


@pytest.mark.parametrize(("entities", "slots"), [(4, 5), (4, 4), (5, 3), (2, 7), (12, 12), (1, 1)])
def test_a_slot_has_the_colour_of_its_entity(entities, slots, drawn):
    size, number = 12, 2
    sheet = dict(size=size, num_rows=number, columns_apart=(2, 4))
    _, _, true, masks, means = args = scene(number, entities, slots, size)
    hard = (masks == masks.amax(1, keepdim=True)).float()
    figure = drawn(figures.decomposition, *args[:3], hard, means, "Colours")
    background = (figures._color(0) * 255).round()
    for n in range(number):
        truth, predicted = (panel(figure, (n, column), **sheet)[0] for column in (2, 3))
        matched = figures.metrics.match(true, hard)[n]
        for e, k in enumerate(matched.tolist()):
            inside = true[n, e].numpy()
            if inside.any():
                color = background if e == 0 else (figures._color(e) * 255).round()
                assert (truth[inside] == color).all()
                if k >= 0:
                    assert (predicted[inside & (hard[n, k] > 0).numpy()] == color).all()
        # Slots: the background's, the objects' by number, the rest; each has a colour of its own.
        order = [k for k in matched.tolist() if k >= 0]
        order += [k for k in range(slots) if k not in order]
        frames = []
        for column, k in enumerate(order):
            shown, frame = panel(figure, (n, 4 + column), **sheet)
            on_white = means[n, k] * hard[n, k] + 1 - hard[n, k]  # (C, H, W)
            assert abs(shown - on_white.permute(1, 2, 0).numpy() * 255).max() <= 0.51
            where = (hard[n, k] > 0).numpy()
            assert (predicted[where] == frame).all()
            frames.append(tuple(frame))
        assert len(set(frames)) == slots
        assert frames[0] == tuple(background)


def test_soft_masks_are_mixtures():
    masks = np.array([0.25, 0.75, 0.0]).reshape(3, 1, 1)
    colors = np.eye(3)
    assert figures._paint(masks, colors)[0, 0] == pytest.approx([0.25, 0.75, 0])
    assert figures._paint(masks * 0.4, colors)[0, 0] == pytest.approx([0.7, 0.9, 0.6])  # on white
    assert figures._paint(masks + 1, colors)[0, 0] == pytest.approx([1 / 3] * 3)


def test_one_colour_follows_one_slot_through_the_steps(drawn):
    image, true, reconstructions, masks, means = steps(num_entities=3, num_slots=4)
    # At the first step the slots stand for something else, which must not change their colours.
    swapped = torch.cat([masks[-1:].flip(1), masks[-1:]])
    args = image, true, reconstructions[:2], swapped, means[:2]
    slots = figures.metrics.match(true[None], masks[-1:])[0].tolist()
    _, colors, order = figures._colors(np.array(slots), 4)
    assert order[: sum(k >= 0 for k in slots)] == [k for k in slots if k >= 0]
    figure = drawn(figures.refinement, *args, "Steps")
    labels = max(map(figures._text_width, ("truth", "step 1")))
    left = figures.MARGIN + int(np.ceil(labels)) + 12
    sheet = dict(size=12, num_rows=3, columns_apart=(2,), rows_apart=(1,), left=left)
    for column, k in enumerate(order):
        seen = [panel(figure, (row, 2 + column), **sheet) for row in range(3)]
        for t in (0, 1):
            assert abs(seen[1 + t][1] / 255 - colors[k]).max() < 0.003
            white = swapped[t, k] * means[t, k] + 1 - swapped[t, k]
            assert abs(seen[1 + t][0] - white.permute(1, 2, 0).numpy() * 255).max() <= 0.51
        if k in slots:  # above it what it should show: its entity, cut out of the input
            mask = true[slots.index(k)].float()
            cut = (image * mask + 1 - mask).permute(1, 2, 0).numpy()
            assert abs(seen[0][0] - cut * 255).max() <= 0.51
        else:
            assert (seen[0][0] == 255).all()


@pytest.mark.parametrize("labels", [(), ("layer 1", "layer 2", "step 1")])
def test_the_steps_have_the_labels_that_they_are_given(labels, drawn, tmp_path):
    figure = drawn(figures.refinement, *steps(), "Steps", labels)
    expected = ["truth", *(labels or ("step 1", "step 2", "step 3"))]
    texts = [text.get_text() for text in figure.findobj(Text)]
    assert [text for text in texts if text in expected] == expected
    with pytest.raises(ValueError, match="labels must be 3, not "):
        figures.refinement(tmp_path / "unused.png", *steps(), "Steps", ("layer 1", "layer 2"))


def test_the_largest_mask_of_a_sample_is_grey(drawn):
    masks = torch.zeros(1, 3, 16, 16)
    masks[0, 1], masks[0, 2, :4, :4] = 1, 1
    masks[0, 1, :4, :4] = 0
    figure = drawn(figures.samples, torch.rand(1, 3, 16, 16), "t", masks)
    shown, _ = panel(figure, (1, 0), 16, num_rows=2)
    assert (shown[0, 0] == (figures._color(3) * 255).round()).all()
    assert (shown[8, 8] == (figures._color(0) * 255).round()).all()


def test_a_box_is_drawn_where_it_is_in_the_colour_of_its_step(drawn):
    size, scale = 40, 3
    image, canvases = torch.rand(2, 1, size, size), torch.rand(2, 3, 1, size, size)
    boxes = torch.full((2, 3, 4), float("nan"))
    boxes[0, 0] = torch.tensor([5, 7, 20, 10])
    boxes[0, 1] = torch.tensor([30, -4, 20, 54])  # beyond three of the edges
    boxes[1, 0] = torch.tensor([0, 0, size, size])  # all of the image
    figure = drawn(figures.attention, image, boxes, canvases, "t")
    sheet = dict(size=size, num_rows=2, columns_apart=(2,))

    def outlined(image, *boxes):
        """`boxes`: first and last + 1 of rows and columns, in dots, of outside and inside."""
        expected = np.kron(image[0, ..., None].numpy(), np.ones((scale, scale, 3))) * 255
        for step, (outer, inner) in enumerate(boxes):
            line = np.zeros(expected.shape[:2], bool)
            for value, (top, bottom, left, right) in ((True, outer), (False, inner)):
                line[top:bottom, left:right] = value
            expected[line] = (figures._rgb(figures.PALETTE[step]) * 255).round()
        return expected

    first = (15, 75, 21, 51), (18, 72, 24, 48)
    second = (90, 120, 0, 120), (93, 120, 0, 120)  # the upper line alone
    whole = (0, 120, 0, 120), (3, 117, 3, 117)
    light = 0.25 + 0.75 * image
    absent = (0, 0, 0, 0), (0, 0, 0, 0)
    for at, expected in {
        (0, 0): outlined(image[0]), (0, 1): outlined(light[0], first, second),
        (0, 2): outlined(canvases[0, 0], first), (0, 3): outlined(canvases[0, 1], absent, second),
        (1, 0): outlined(image[1]), (1, 1): outlined(light[1], whole),
        (1, 2): outlined(canvases[1, 0], whole), (1, 3): np.full((120, 120, 3), 255),
    }.items():  # fmt: skip
        shown, frame = dots(figure, at, **sheet)
        assert abs(shown - expected).max() <= 0.51, at
        if at[1] >= 2 and at != (1, 3):
            assert (frame == (figures._color(at[1] - 1) * 255).round()).all()
    heads = [text.get_text() for text in figure.texts]
    assert heads == ["t", "Input", "Attention", "Step 1", "Step 2"]  # no scene took a third

    ragged = drawn(figures.attention, image, [boxes[0, :2], boxes[1, :1].numpy()], canvases, "t")
    assert (pixels(ragged) == pixels(figure)).all()


def test_a_cell_is_as_dark_as_its_share_of_the_row(drawn):
    figure = drawn(figures.confusion, torch.tensor(COUNTS)[:, :3], "t")
    figure.canvas.draw()
    (axes,) = figure.axes
    picture = np.asarray(figure.canvas.buffer_rgba())[..., :3]
    texts = iter(axes.texts)
    for r, v in np.ndindex(4, 3):
        total = sum(COUNTS[r][:3])
        share = COUNTS[r][v] / max(total, 1)
        x, y = axes.transData.transform((v + 0.15, r + 0.5)).round().astype(int)
        color = picture[picture.shape[0] - y, x] / 255
        white_to_blue = 1 - share * (1 - figures._rgb(figures.SHADE))
        assert abs(color - white_to_blue).max() < 0.01
        number, percent = next(texts), next(texts)
        assert number.get_text() == str(COUNTS[r][v])
        assert percent.get_text() == (f"{100 * share:.1f}%" if total else "–")
        for text in (number, percent):
            position = axes.transData.inverted().transform(text.get_window_extent().corners())
            assert (position.min(0) > (v, r)).all() and (position.max(0) < (v + 1, r + 1)).all()
            assert contrast(matplotlib.colors.to_rgb(text.get_color()), color) > 4.5
    assert [patch.get_bbox().bounds for patch in axes.patches] == [(i, i, 1, 1) for i in range(3)]
    assert [text.get_text() for text in axes.get_yticklabels()] == ["0", "1", "2", "3"]
    assert [text.get_text() for text in axes.get_xticklabels()] == ["0", "1", "2"]
    assert axes.get_ylabel() == "true count" and axes.get_xlabel() == "predicted count"


def contrast(first, second):
    """Of two colours in sRGB, 1 to 21 (WCAG 2.1), by L* of CIE Lab."""
    lightness = lab(np.stack([first, second]).astype(float), np.eye(3))[:, 0]
    low, high = sorted(np.where(lightness > 8, ((lightness + 16) / 116) ** 3, lightness / 903.3))
    return (high + 0.05) / (low + 0.05)


def test_text_is_readable_on_every_shade():
    seen = set()
    for share in np.linspace(0, 1, 101):
        cell = 1 - share * (1 - figures._rgb(figures.SHADE))
        text = figures._readable(cell)
        assert contrast(matplotlib.colors.to_rgb(text), cell) > 4.5
        seen.add(text)
    assert seen == {"black", "white"}


@pytest.mark.parametrize("log", [False, True])
def test_a_bar_ends_at_its_value(log, drawn):
    figure = drawn(figures.bars, VALUES, "t", "variance", log=log)
    figure.canvas.draw()
    (axes,) = figure.axes
    assert axes.get_xlabel() == "variance" and axes.get_xscale() == ("log" if log else "linear")
    printed = ["–", "3.21", "0.42", "0", "12,346", "0.0031", "−1,500", "–"]
    assert [text.get_text() for text in axes.texts] == printed
    names = [text.get_text().replace("\n", "") for text in axes.get_yticklabels()]
    assert [name.replace(" ", "") for name in names] == [name.replace(" ", "") for name in VALUES]
    assert axes.get_ylim()[0] > axes.get_ylim()[1]  # the first on top
    start = 0.001 if log else 0
    assert axes.get_xlim()[0] == (start if log else -1510)
    assert axes.get_xlim()[1] == pytest.approx(12_595.6)
    (lines,) = axes.collections
    whiskers = [segment[:, 0] for segment in lines.get_segments()]
    for i, (bar, (value, stderr)) in enumerate(zip(axes.patches, VALUES.values(), strict=True)):
        absent = value is None or value != value or (log and value <= 0)
        ends = [start] * 2 if absent else [value - (stderr or 0), value + (stderr or 0)]
        if log and ends[0] <= 0:
            ends[0] = value
        assert bar.get_y() + bar.get_height() / 2 == pytest.approx(i)
        assert bar.get_x() == start
        assert bar.get_x() + bar.get_width() == pytest.approx(start if absent else value)
        assert whiskers[i] == pytest.approx(ends)
        assert axes.texts[i].xy == pytest.approx((max(ends[1], start), i))  # right of all that


def lab(rgb, vision):
    """CIE Lab (D65) of sRGB (N, 3), as seen with linear RGB multiplied by `vision`."""
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4) @ vision.T
    to_xyz = [[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]]
    xyz = linear.clip(0, 1) @ np.array(to_xyz).T / (0.9505, 1, 1.089)
    x, y, z = np.where(xyz > 0.008856, np.cbrt(xyz), 7.787 * xyz + 16 / 116).T
    return np.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)], 1)


@pytest.mark.parametrize(
    "vision",
    [  # Machado et al. 2009, severity 1
        np.eye(3),
        [[0.1523, 1.0526, -0.2049], [0.1145, 0.7863, 0.0992], [-0.0039, -0.0481, 1.0520]],
        [[0.3673, 0.8606, -0.2280], [0.2801, 0.6725, 0.0474], [-0.0118, 0.0429, 0.9689]],
        [[1.2555, -0.0767, -0.1788], [-0.0784, 0.9308, 0.1476], [0.0047, 0.6914, 0.3039]],
    ],
    ids=["normal", "protanopia", "deuteranopia", "tritanopia"],
)
def test_colours_can_be_told_apart(vision):
    colors = np.stack([np.ones(3), *(figures._color(e) for e in range(25))])
    seen = lab(colors, np.array(vision))
    distance = np.linalg.norm(seen[:, None] - seen, axis=2) + 999 * np.eye(len(seen))
    assert distance.min() > 15


# -- arguments -------------------------------------------------------------------------------------


def test_images_are_clipped_and_of_any_type(drawn):
    images = torch.linspace(-1, 2, 64).reshape(1, 1, 8, 8).requires_grad_()
    expected = images.detach()[0, 0].clamp(0, 1).numpy()[..., None] * 255
    for given in (images, images.bfloat16(), images.double(), images.detach().numpy()):
        shown, _ = panel(drawn(figures.samples, given, "t"), (0, 0), 8)
        assert abs(shown - expected).max() < 1.6  # bfloat16 has 8 bits


def test_tick_labels():
    ticks, log = figures.Ticks(), figures.Ticks(log=True)
    assert ticks.format_ticks([0, 0.2 * 1, 0.2 * 3]) == ["0.0", "0.2", "0.6"]
    assert ticks.format_ticks([-15000, -10000, -5000, 0]) == ["−15k", "−10k", "−5k", "0"]
    assert ticks.format_ticks([0, 5e5, 1e6]) == ["0", "500k", "1000k"]
    assert ticks.format_ticks([0, 2.5e7, 5e7]) == ["0", "25M", "50M"]
    assert ticks.format_ticks([-0.1 + 0.1, 1e-4, 3e-4]) == ["0.0000", "0.0001", "0.0003"]
    assert ticks.format_ticks([12345, 12350]) == ["12.345k", "12.350k"]
    assert ticks.format_ticks([]) == [] and ticks(2.5) == "2.5"
    assert log.format_ticks([1e-5, 0.002, 0.05, 1, 1e6]) == ["1e-5", "0.002", "0.05", "1", "1e6"]


def test_numbers_in_print():
    written = {
        0.0: "0", 0.01234: "0.0123", 12.34: "12.3", 123.4: "123", 999.9: "1,000", 12345.6: "12,346",
        999_999: "999,999", 999_999.9: "1e6", 1.234e6: "1.23e6", 1e12: "1e12", 1.5e-5: "1.5e-5",
        1e-10: "1e-10", -0.5: "−0.5", -1234.0: "−1,234", -2e-5: "−2e-5",
    }  # fmt: skip
    assert {value: figures._number(value) for value in written} == written


def test_traversals_name_their_values(drawn):
    def heads(values):
        figure = drawn(figures.traversals, torch.rand(1, len(values), 3, 8, 8), ["z"], values, "t")
        return [text.get_text() for text in figure.texts][1:-1]

    assert heads([-2, -1, 0, 1, 2]) == ["−2", "−1", "0", "1", "2"]
    assert heads(torch.linspace(-2, 2, 7)) == ["−2.0", "−1.3", "−0.7", "0.0", "0.7", "1.3", "2.0"]
    assert heads([-0.01, 0.02]) == ["−0.01", "0.02"]


def test_what_does_not_fit_is_refused(tmp_path):
    path = tmp_path / "figure.png"
    image, reconstruction, true, masks, means = scene()
    good = dict(
        image=image, reconstruction=reconstruction, true_masks=true, masks=masks, means=means
    )
    for name, value, message in (
        ("image", image[:1], "differ"),
        ("image", image.byte(), "floats"),
        ("image", image[:, :2], "1 or 3 channels"),
        ("reconstruction", reconstruction * float("nan"), "reconstruction holds NaN"),
        ("true_masks", true.byte() * 255, "bool"),
        ("true_masks", true | True, "exactly one"),
        ("masks", masks[0], "4 axes"),
        ("masks", masks.log(), r"in \[0, 1\]"),
        ("means", means[:, 1:], "differ"),
        ("scores", [1.0], "scores"),
    ):
        with pytest.raises(ValueError, match=message):
            figures.decomposition(path, **{**good, name: value}, title="t")
    image, boxes, canvases = glances((1, 3))
    good = dict(image=image, boxes=boxes, canvases=canvases, labels=["a", "b"])
    gap, half, flat, infinite = (boxes.clone() for _ in range(4))
    gap[1, 1], half[1, 1, 2], flat[1, 1, 3], infinite[1, 1, 0] = np.nan, np.nan, 0, np.inf
    for name, value, message in (
        ("image", image[:1], "differ"),
        ("image", image[..., 1:], "differ"),
        ("canvases", canvases[:, 0], "5 axes"),
        ("canvases", canvases * np.nan, "canvases holds NaN"),
        ("canvases", canvases[:, :2], "at most 2"),
        ("boxes", boxes[:1], "2 scenes"),
        ("boxes", boxes[..., :3], r"\(n, 4\)"),
        ("boxes", boxes[:, 0], r"\(n, 4\)"),
        ("boxes", gap, "NaN rows at the end"),
        ("boxes", half, "finite"),
        ("boxes", flat, "sizes above 0"),
        ("boxes", infinite, "finite"),
        ("labels", ["a"], "2 scenes"),
    ):
        with pytest.raises(ValueError, match=message):
            figures.attention(path, **{**good, name: value}, title="t")
    for matrix in ([1, 2], [[]], [[1.0]], [[True]], [[1, -1]], [["1"]]):
        with pytest.raises(ValueError, match="counts"):
            figures.confusion(path, matrix, "t")
    image = scene()[0]
    for call in (
        lambda: figures.bars(path, {}, "t", "y"),
        lambda: figures.bars(path, {"a": (1, 2, 3)}, "t", "y"),
        lambda: figures.traversals(path, torch.rand(2, 3, 3, 8, 8), ["a"], [1, 2, 3], "t"),
        lambda: figures.traversals(path, torch.rand(1, 3, 3, 8, 8), ["a"], [1, 2], "t"),
        lambda: figures.samples(path, torch.rand(2, 3, 8, 8), "t", torch.rand(1, 4, 8, 8)),
        lambda: figures.samples(path, torch.rand(0, 3, 8, 8), "t"),
        lambda: figures.curves(path, {}, "x", "t"),
        lambda: figures.curves(path, {"a": {"": ([1, 2], [1, 2, 3], None)}}, "x", "t"),
        lambda: figures.refinement(path, image[0], true[0], image, masks[:1], means[:1], "t"),
    ):
        with pytest.raises(ValueError):
            call()
    assert not list(tmp_path.iterdir())
