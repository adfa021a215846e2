"""kernels/benchmark.py at tiny sizes: what it prints and writes, and what it refuses to time."""

import csv
import json

import pytest
import torch

import efficient_morl
import iodine
from kernels import benchmark
from kernels.mixture import mixture_reference

CPU = torch.device("cpu")
TINY = ["--sizes", "tetrominoes", "--batch", "1", "--repeats", "2"]


def run(folder, *arguments):
    return benchmark.main([*arguments, "--device", "cpu", "--out", str(folder)])


def read(folder, name):
    """The JSON, after a look at the other two files."""
    content = json.loads((folder / f"{name}.json").read_text())
    with open(folder / f"{name}.csv") as file:
        lines = file.read().splitlines()
    comments = [line for line in lines if line.startswith("#")]
    table = list(csv.DictReader(lines[len(comments) :]))
    assert len(table) == len(content["rows"])
    for key in ("device", "versions", "command", "date"):
        assert content[key] and any(line.startswith(f"# {key}: ") for line in comments)
    for written, row in zip(table, content["rows"], strict=True):
        assert {k: v for k, v in written.items() if v} == {k: str(v) for k, v in row.items()}
    picture = (folder / f"{name}.png").read_bytes()
    assert picture.startswith(b"\x89PNG") and content["date"].encode() in picture
    return content


def tiny_workload(part="", batch=2, **settings):
    config = iodine.make_config("tetrominoes", **dict(
        num_slots=3, latent_size=3, num_steps=3, decoder_channels=(4, 5), decoder_kernel=3,
        refinement_channels=(4, 5), refinement_kernel=3, mlp_sizes=(8,)) | settings)  # fmt: skip
    draw = torch.Generator().manual_seed(0)
    image = torch.rand(batch, 3, 9, 8, generator=draw)
    return config, [image, torch.randn(batch, 3, 3, 3, generator=draw)]


@pytest.fixture
def tiny(monkeypatch):
    monkeypatch.setattr(benchmark, "workload", tiny_workload)
    monkeypatch.setattr(benchmark, "fast_bfloat16", lambda device: True)


# -- the operations --------------------------------------------------------------------------------


def test_operations(tmp_path, capsys):
    assert run(tmp_path / "new" / "folder", *TINY) == 0
    printed = capsys.readouterr().out
    assert all(len(line) <= 100 for line in printed.splitlines() if "wrote" not in line)
    assert "no CUDA device in use" in printed and "WRONG" not in printed
    content = read(tmp_path / "new" / "folder", "ops")
    assert content["command"].startswith("python -m kernels.benchmark --sizes tetrominoes")
    rows = content["rows"]
    assert len(rows) == 6 * 2 * 3  # operations, directions, implementations
    for row in rows:
        assert row["error"] < 1e-5
        assert 0 < row["p20"] <= row["ms"] <= row["p80"]
        group = [r for r in rows if (r["op"], r["direction"]) == (row["op"], row["direction"])]
        for other in group:
            ratio = other["ms"] / row["ms"]
            assert row[f"vs {other['implementation']}"] == pytest.approx(ratio)
        # As many numbers of 4 bytes per pixel as the operation has to read and write at least.
        pixels, slots, num = 35 * 35, 4, {}
        num["mixture_log_likelihood"] = 3 + 4 * slots + 1, 3 + 4 * slots + 1 + 4 * slots
        num["mixture"] = 3 + 12 * slots + 1, 3 + 4 * slots + 1 + 3 * slots + 4 * slots
        num["refinement_inputs"] = 3 + 4 * slots + 2 + 17 * slots + 1 + 4 * slots, (
            3 + 4 * slots + 2 + 17 * slots + 1 + 4 * slots)
        num["masks"] = 2 * slots, 3 * slots
        num["bias_elu"] = 2 * 32 * slots, 3 * 32 * slots
        # In and out: the convolution's weights are few, 34 x 32 x 25 to a thousand pixels.
        num["broadcast_conv"] = 2 + 32 * slots + 22.2, 2 + 32 * slots + 44.4
        forward, backward = num[row["op"]]
        count = pixels * (forward + backward * (row["direction"] != "forward"))
        assert row["gb_per_s"] * row["ms"] * 1e6 == pytest.approx(4 * count, rel=1e-2)
        share = row["gb_per_s"] / content["copy_gb_per_s"]
        assert row["copy_share"] == pytest.approx(share, rel=0.1)
        assert 4 * pixels / 1e6 < row["peak_mb"] < 100


def shifted(*arguments):
    terms = mixture_reference(*arguments)
    return terms._replace(masks=terms.masks + 0.01)


def broken(*arguments):
    raise NotImplementedError("not here\nsecond line")


@pytest.mark.parametrize("wrong, reason", [(shifted, "error 1e-02"), (broken, "not here")])
def test_a_wrong_implementation_gets_no_number(tmp_path, capsys, monkeypatch, wrong, reason):
    ops = {"mixture": benchmark.OPS["mixture"]._replace(public=wrong)}
    monkeypatch.setattr(benchmark, "OPS", ops)
    assert run(tmp_path, *TINY) == 1
    printed = capsys.readouterr().out
    assert printed.count("WRONG") == 2 and reason in printed and "second line" not in printed
    for row in read(tmp_path, "ops")["rows"]:
        assert ("wrong" in row) == (row["implementation"] == "torch")
        assert ("ms" in row) == ("vs reference" in row) == ("wrong" not in row)
        assert "vs torch" not in row


def test_nan_is_wrong():
    truth = [torch.ones(3, dtype=torch.float64)]
    nearly = torch.tensor([1, 1, 1 + 1e-6])
    assert benchmark.check(lambda: [nearly], truth, 1e-5).keys() == {"error"}
    for values in ([1, 1, float("nan")], [1, 1, 2], [float("inf")] * 3):
        assert "wrong" in benchmark.check(lambda v=values: [torch.tensor(v)], truth, 1e-5)
    assert "wrong" in benchmark.check(lambda: [], truth, 1e-5)  # an output is missing


@pytest.mark.parametrize("dtype, tolerance", [("float64", 1e-12), ("bfloat16", 1e-2)])
@pytest.mark.parametrize("op", benchmark.OPS)
def test_eager_operations_are_right(op, dtype, tolerance, monkeypatch):
    monkeypatch.setitem(benchmark.SIZES, "tiny", (1, 1, 3, 6, 4, 5, 3))
    inputs = benchmark.make_inputs(op, "tiny", 2, dtype)
    if dtype == "float64":
        inputs = benchmark.double(inputs)
    op = benchmark.OPS[op]
    for backward in (False, True):
        truth = benchmark.make_call(op, op.reference, benchmark.double(inputs), backward)()
        for function in (op.eager, op.public):
            values = benchmark.make_call(op, function, inputs, backward)
            assert "wrong" not in benchmark.check(values, truth, tolerance)


@pytest.mark.slow
def test_torch_compile(tmp_path):
    assert run(tmp_path, *TINY, "--torch-compile") == 0
    assert len(read(tmp_path, "ops")["rows"]) == 6 * 2 * 4


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("arguments", [
    TINY, ["--models", "step", "compare", "presets", "--batch", "2"],
])  # fmt: skip
def test_on_a_gpu(tmp_path, arguments):
    assert benchmark.main([*arguments, "--device", "cuda", "--out", str(tmp_path)]) == 0


# -- measuring -------------------------------------------------------------------------------------


def test_candidates_take_turns(monkeypatch):
    order, clock = [], [0.0]

    def call(name, seconds):
        order.append(name)
        clock[0] += seconds * len(order)

    monkeypatch.setattr(benchmark.time, "perf_counter", lambda: clock[0])
    times = benchmark.interleave(dict(a=lambda: call("a", 1), b=lambda: call("b", 0)), 3, CPU)
    assert order == ["a", "b"] * 4  # the first two to warm up
    assert times["a"] == pytest.approx(dict(ms=5000, p20=3800, p80=6200))
    assert times["b"] == dict(ms=0, p20=0, p80=0)


def test_peak_allocated():
    def call():
        first = torch.ones(500, 1000)  # 2 MB
        second = first + 1
        del first
        return second.exp_() + second  # never more than two at a time

    for _ in range(2):
        assert benchmark.peak_allocated(call, CPU) == pytest.approx(4, abs=0.01)


# -- training steps --------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", [{}, dict(lstm_size=4, refinement_stride=2)])
@pytest.mark.parametrize("changes", range(benchmark.OURS))
def test_port_style_is_the_same_function(changes, settings):
    config, inputs = tiny_workload(**settings)
    inputs = [tensor.double() for tensor in inputs]
    port = benchmark.make_step(config, inputs, benchmark.Variant(changes))
    ours = benchmark.make_step(config, inputs, benchmark.Variant(benchmark.OURS))
    assert type(ours.model) is iodine.IODINE
    assert port.model.state_dict().keys() == ours.model.state_dict().keys()
    torch.testing.assert_close(port.backward(*inputs), ours.backward(*inputs), rtol=1e-9, atol=0)
    for (name, p), q in zip(port.model.named_parameters(), ours.parameters, strict=True):
        assert torch.equal(p, q), name
        assert (p.grad - q.grad).norm() <= 1e-9 * q.grad.norm(), name


@pytest.mark.parametrize("changes", range(benchmark.OURS + 1))
def test_every_row_does_what_it_says(changes, monkeypatch):
    config, inputs = tiny_workload()
    monkeypatch.setattr(iodine, "AVX512", True)  # else nothing is channels-last on a CPU
    called, layouts = set(), set()
    for owner, name in ((benchmark, "eager_refinement_inputs"), (benchmark, "convolve_image"),
                        (iodine.kernels, "conv_elu")):  # fmt: skip
        function = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda *a, f=function, n=name: called.add(n) or f(*a))
    step = benchmark.make_step(config, inputs, benchmark.Variant(changes))
    convolutions = [*step.model.decoder.hidden, step.model.decoder.last]
    for module in [*convolutions, *step.model.refinement.convs]:
        module.register_forward_hook(lambda _, x, y: layouts.add(y.is_contiguous()))
    step()
    assert ("eager_refinement_inputs" in called) == (changes < 2)
    assert ("convolve_image" in called) == (changes < 3)
    assert (False in layouts) == (changes >= 4)
    assert ("conv_elu" in called) == (changes >= benchmark.OURS)


class Here(benchmark.StepProcess):
    """Without the process, which takes seconds to start; 10 MB of memory per step of inference."""

    def __init__(self, make, config, threads):
        self.step, self.keeps_memory = make(), config is not None
        made.append(self)

    def __call__(self, method="__call__"):
        getattr(self.step, method)()

    def memory(self):
        return dict(first_mb=1.0, peak_mb=1.0 + 10 * self.step.inputs[1].shape[1])


made = []


@pytest.fixture
def here(tiny, monkeypatch):
    """What was started, in this process."""
    monkeypatch.setattr(benchmark, "StepProcess", Here)
    made.clear()
    return made


@pytest.mark.parametrize("config", [None, tiny_workload()[0]])
def test_the_allocator_is_as_it_comes_without_a_config(config, monkeypatch):
    seen = []
    monkeypatch.setattr(benchmark.runs, "set_up", seen.append)
    benchmark.prepare_process(object, config, 0)
    assert seen == [config] * (config is not None)


def test_steps(tmp_path, capsys, here, monkeypatch):
    monkeypatch.setattr(iodine, "AVX512", True)
    assert run(tmp_path, "--models", "step", "--repeats", "2") == 0
    rows = read(tmp_path, "step")["rows"]
    assert all(len(line) <= 100 for line in capsys.readouterr().out.splitlines()[:-1])
    ours, port = benchmark.CHANGES[benchmark.OURS], benchmark.CHANGES[0]
    assert [r["variant"] for r in rows] == [*benchmark.CHANGES[: benchmark.OURS + 1], port, ours]
    assert [r["precision"] for r in rows] == ["float32"] * 6 + ["bfloat16"] * 2
    for i, row in enumerate(rows):
        assert row["error"] < (1e-4 if row["precision"] == "float32" else 0.3)
        above = 0 if i in (0, 6) else i - 1
        assert row["vs eager"] == pytest.approx(rows[0]["ms"] / row["ms"])
        assert row["vs above"] == pytest.approx(rows[above]["ms"] / row["ms"])
    assert [process.keeps_memory for process in here] == [i not in (0, 6) for i in range(8)]


def test_a_wrong_step_gets_no_number(tmp_path, monkeypatch, here):
    right = benchmark.convolve_image
    monkeypatch.setattr(benchmark, "convolve_image", lambda *a: right(*a) * 1.01)
    monkeypatch.setattr(iodine, "AVX512", False)  # one row less
    arguments = "--models", "step", "--repeats", "1", "--dtypes", "float32"
    assert run(tmp_path, *arguments) == 1
    rows = read(tmp_path, "step")["rows"]
    assert ["ms" in row for row in rows] == [False, False, False, True, True]
    assert ["wrong" in row for row in rows] == [True, True, True, False, False]
    assert not any("vs eager" in row for row in rows)
    assert ["vs above" in row for row in rows] == [False, False, False, False, True]


def test_memory_is_that_of_a_process_of_its_own(tmp_path, monkeypatch, tiny):
    ballast = torch.ones(200_000_000)  # 800 MB, which no child may count as its own
    monkeypatch.setattr(benchmark, "convolve_image", None)  # leaves one row, hence one process
    assert run(tmp_path, "--models", "clevr", "--repeats", "1", "--dtypes", "float32") == 1
    port, ours = read(tmp_path, "clevr")["rows"]
    assert "first_mb" not in port
    assert 50 < ours["first_mb"] <= ours["peak_mb"] < benchmark.memory_so_far(CPU) - 200
    del ballast


def test_presets(tmp_path, monkeypatch):
    """A step of every model; two do not use the operations."""
    for model in benchmark.MODELS:
        monkeypatch.setattr(model, "PRESETS", {"quick": model.PRESETS["quick"]})
    assert run(tmp_path, "--models", "presets", "--repeats", "1", "--batch", "2") == 0
    rows = read(tmp_path, "presets")["rows"]
    assert [row["model"] for row in rows] == ["iodine", "efficient_morl", "air", "mvae"]
    assert [row["ops_share"] > 0 for row in rows] == [True, True, False, False]
    for row in rows:
        assert row["data_share"] == pytest.approx(row["data_ms"] / (row["ms"] + row["data_ms"]))


def test_the_workloads_are_the_papers():
    config, (image, noise) = benchmark.workload("step", 2)
    assert config == iodine.make_config("tetrominoes")
    assert image.shape == (2, 3, 35, 35) and noise.shape == (2, 5, 4, 32)
    config, (image, noise) = benchmark.workload("clevr", 1)
    assert image.shape == (1, 3, 128, 128) and noise.shape == (1, 5, 7, 64)
    model = iodine.IODINE(config, 3, 128, 128)
    shapes = [m.weight.shape for m in model.modules() if isinstance(m, torch.nn.Conv2d)]
    assert shapes == [
        (64, 66, 3, 3), *[(64, 64, 3, 3)] * 3, (4, 64, 3, 3), (64, 17, 3, 3), *[(64, 64, 3, 3)] * 3,
    ]  # fmt: skip


# -- one model beside another ----------------------------------------------------------------------

DECODES = {("IODINE", "T = 3"): 3} | {("EfficientMORL", f"I = {i}"): i + 1 for i in range(4)}
MODELS = [iodine.IODINE, efficient_morl.EfficientMORL]


@pytest.fixture
def tiny_rivals(here, monkeypatch):
    monkeypatch.setattr(efficient_morl, "CLEVR6", dict(
        num_slots=3, latent_size=3, num_layers=2, likelihood="mixture", decoder="iodine",
        decoder_channels=(4, 5), encoder_channels=(4, 5), prior_size=5, refinement_size=4,
    ))  # fmt: skip
    monkeypatch.setattr(benchmark, "PIXELS", (6, 9))


def test_compare(tmp_path, capsys, tiny_rivals):
    assert run(tmp_path, "--models", "compare", "--repeats", "2", "--batch", "2") == 0
    assert all(len(line) <= 100 for line in capsys.readouterr().out.splitlines()[:-1])
    rows = read(tmp_path, "compare")["rows"]
    names = [(*name, side) for side in (6, 9) for name in DECODES]
    assert [(row["model"], row["steps"], row["pixels"]) for row in rows] == names
    for i, row in enumerate(rows):
        base = rows[i - i % 5]
        assert row["error"] < 1e-4 and row["batch"] == 2
        for key in ("forward_ms", "backward_ms", "peak_mb"):
            assert row[f"vs IODINE {key}"] == pytest.approx(base[key] / row[key])
        for name in ("forward", "backward"):
            assert 0 < row[f"{name}_p20"] <= row[f"{name}_ms"] <= row[f"{name}_p80"]
        noises = 3 if row["model"] == "IODINE" else 4 + int(row["steps"][-1])  # T; 2 L + I
        assert row["peak_mb"] == pytest.approx(10 * noises)


def test_every_rival_takes_its_steps(tiny_rivals, monkeypatch):
    image, decodes = torch.rand(2, 3, 7, 6), []
    for model in MODELS:
        monkeypatch.setattr(model, "decode", lambda self, z, decode=model.decode: (
            decodes.append(z) or decode(self, z)))
    for rival in benchmark.rivals(2):
        step = benchmark.make_rival(rival, image)
        for name in benchmark.PASSES:
            decodes.clear()
            result = getattr(step, name)()
            assert len(decodes) == DECODES[rival.model, rival.steps] and not result.requires_grad
        gradients = [p.grad for p in step.parameters]
        step.model.zero_grad()
        parts = step.model.loss(*step.inputs)
        parts["loss"].backward()
        torch.testing.assert_close(result, parts["loss"].detach())
        for p, gradient in zip(step.parameters, gradients, strict=True):
            torch.testing.assert_close(p.grad, gradient)
        mean = (parts["decoded"][:, :, :3] * parts["decoded"][:, :, 3:].softmax(1)).sum(1)
        torch.testing.assert_close(step.forward(), mean)


@pytest.mark.parametrize("wrong", MODELS)
def test_a_wrong_model_gets_no_number(tmp_path, capsys, tiny_rivals, monkeypatch, wrong):
    decode = wrong.decode
    monkeypatch.setattr(wrong, "decode", lambda self, z: (
        decode(self, z) * (1.01 if z.dtype == torch.float32 else 1)))
    assert run(tmp_path, "--models", "compare", "--repeats", "1") == 1
    rows = read(tmp_path, "compare")["rows"]
    assert capsys.readouterr().out.count("WRONG") == sum("wrong" in row for row in rows)
    for row in rows:
        assert ("wrong" in row) == ("forward_ms" not in row) == (row["model"] == wrong.__name__)
        compared = row["model"] == "IODINE" != wrong.__name__  # with itself: nothing else is right
        assert ("vs IODINE forward_ms" in row) == ("vs IODINE peak_mb" in row) == compared


def test_the_rivals_have_the_papers_sizes():
    base, *others = benchmark.rivals(2)
    assert base.config == benchmark.workload("clevr", 2)[0] and base.noise.shape == (2, 5, 7, 64)
    for steps, rival in enumerate(others):
        assert rival.config == efficient_morl.Config(**efficient_morl.CLEVR6)
        assert rival.noise.shape == (2, 6 + steps, 7, 64)


def test_lines():
    """Every value at its place, from zero; the legend in the order of the lines."""
    info = dict(device="", versions={}, date="", command="")
    report, values = benchmark.Report("", [], info), dict(zip("abc", (9, 1, 4), strict=True))
    for x, (name, y) in ((x, item) for x in (3, 7) for item in values.items()):
        if (x, name) != (3, "b"):  # was wrong
            report.bar("panel", x, name, x * y, x * y - 1, x * y + 1)
    figure = report.draw_lines("pixels")
    (axes,) = figure.axes
    lines = {line.get_label(): line.get_xydata().tolist() for line in axes.lines}
    assert lines == dict(a=[[3, 27], [7, 63]], c=[[3, 12], [7, 28]], b=[[7, 7]])
    assert axes.get_ylim()[0] == 0 and axes.get_ylim()[1] >= 64
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["a", "b", "c"]


# -- command line ----------------------------------------------------------------------------------


@pytest.mark.parametrize("arguments, message", [
    (["--sizes", "huge"], "unknown size 'huge': choose from tetrominoes, tetrominoes_256"),
    (["--batch", "-1"], "--batch must be 0 or more"),
    (["--repeats", "-1"], "--repeats must be 0 or more"),
    (["--models", "--threads", "-1"], "--threads must be 0 or more"),
])  # fmt: skip
def test_options_that_cannot_be(tmp_path, capsys, arguments, message):
    assert run(tmp_path / "out", *arguments) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and message in error
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_missing_device(capsys):
    assert benchmark.main(["--device", "cuda"]) == 2
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize("arguments", [["--models", "tables"], ["--colour"], ["--dtypes", "int8"]])
def test_options_that_tyro_refuses(tmp_path, capsys, arguments):
    with pytest.raises(SystemExit) as exit:
        run(tmp_path / "out", *arguments)
    assert exit.value.code == 2 and capsys.readouterr().err
    assert not (tmp_path / "out").exists()
