"""kernels/benchmark.py at tiny sizes: what it counts, prints and writes, and refuses to time."""

import csv
import json

import baselines
import pytest
import torch

import efficient_morl
import iodine
import kernels
import slot_attention
from kernels import benchmark

CPU = torch.device("cpu")
TINY = ["--sizes", "tetrominoes", "--batch", "1", "--repeats", "2"]
CALLS = [(op, both) for op in baselines.GRADIENTS for both in (False, True)
         if not both or op != "leave_one_out"]  # fmt: skip


@pytest.fixture(autouse=True)
def compiled(monkeypatch):
    """Two kernels in place of the compiler's work, which test_compile.py looks at."""
    entry = dict(case=[35, 4, "float32", 3], registers=40, spilled=0, shared=8, target=90,
                 bytes=3e6, direction="backward", kernel="masks.some_kernel")  # fmt: skip
    entries = [entry | dict(operation="masks"), entry | dict(operation="none")]
    monkeypatch.setattr(benchmark.compile_kernels, "compile_in_child", lambda cases: entries)


def run(folder, *arguments):
    return benchmark.main([*arguments, "--device", "cpu", "--out", str(folder)])


def read(folder, name, picture=True):
    """The JSON's content, after a look at the other files."""
    content = json.loads((folder / f"{name}.json").read_text())
    lines = (folder / f"{name}.csv").read_text().splitlines()
    comments = {line.split(":")[0] for line in lines if line.startswith("#")}
    assert {"# device", "# versions", "# command", "# date"} <= comments
    table = csv.DictReader(line for line in lines if not line.startswith("#"))
    for written, row in zip(table, content["rows"], strict=True):
        assert {k: v for k, v in written.items() if v} == {k: str(v) for k, v in row.items()}
    assert (folder / f"{name}.png").exists() == picture
    return content


@pytest.mark.parametrize(("op", "backward"), CALLS)
def test_baselines_and_operations_agree_in_float64(op, backward):
    inputs = benchmark.move(baselines.make_inputs(op, 2, 3, 6, 4, 5, 3), torch.float64)
    truth = baselines.make_call(op, getattr(baselines, op), inputs, backward)()
    values = baselines.make_call(op, getattr(kernels, op), inputs, backward)
    assert "wrong" not in benchmark.check(values, lambda: truth, 1e-11)


def test_masks_are_timed_on_the_view_that_models_have():
    inputs, seen = baselines.make_inputs("masks", 2, 3, 6, 4, 5, 3), []
    for backward in (False, True):
        call = baselines.make_call("masks", lambda x: seen.append(x.stride()) or x.exp(), inputs,
                                   backward)  # fmt: skip
        call()
    assert seen == [inputs[0].stride()] * 2 and seen[0][-1] == 4


def test_operations_without_a_gpu(tmp_path, capsys):
    assert run(tmp_path / "new", *TINY) == 0
    printed = capsys.readouterr().out
    assert all(len(line) <= 100 for line in printed.splitlines() if "wrote" not in line)
    assert "kernels: torch (the device is cpu)" in printed and "WRONG" not in printed
    assert "\nnot measured: the Triton kernels, compiled for sm_90" in printed
    (row,) = (content := read(tmp_path / "new", "not_measured", picture=False))["rows"]
    assert row["kernel"] == "masks.some" and (row["regs"], row["spilled"]) == (40, 0)
    eager = 32 * 35 * 35 * 4 * 3 * 4  # B, H W, K: masks and their cotangents in, cotangents out
    assert row["fused MB"] == 3 and row["eager MB"] == pytest.approx(eager / 1e6)
    assert row["bound us"] == pytest.approx(3e12 / content["bytes_per_second"])
    content = read(tmp_path / "new", "ops")
    rows = {(r["op"], r["direction"], r["implementation"]): r for r in content["rows"]}
    assert rows.keys() == {(op, "forward+backward" if both else "forward", name)
                           for op, both in CALLS for name in ("eager", "fallback")}  # fmt: skip
    for (op, direction, _), row in rows.items():
        assert row["error"] < 1e-5 and row["p20"] <= row["ms"] <= row["p80"]
        assert row["x eager"] == pytest.approx(rows[op, direction, "eager"]["ms"] / row["ms"])
        assert row["copy"] == pytest.approx(row["GB/s"] / content["copy_gb_per_s"])
        # As many numbers of 4 bytes for each pixel as the operation reads and writes at least.
        pixels, slots = 35 * 35, 4
        forward, backward = {
            "masks": (2 * slots, 3 * slots),
            "mixture_log_likelihood": (3 + 4 * slots + 1, 3 + 8 * slots + 1),
            "leave_one_out": (3 + 5 * slots, 0),
            "refinement_inputs": (3 + 2 + 1 + 25 * slots,) * 2,
            "broadcast_conv": (32 * slots + 32 + 21, 32 * slots + 2 * (32 + 21)),  # 21: weights
        }[op]
        count = pixels * (forward + backward * (direction != "forward"))
        assert row["GB/s"] * row["ms"] * 1e6 == pytest.approx(4 * count, rel=2e-2)
        assert 4 * pixels / 1e6 < row["MB"] < 100


def test_bytes_of_eager_torch():
    with baselines.Traffic() as traffic:
        a = torch.zeros(10, 3)  # writes 30 numbers
        (a.T + a[0, 0].expand(3, 10)).exp_()  # 30 and 1 in, 30 out; in place: 30
    assert traffic.num_bytes == 4 * (30 + 61 + 30)
    for backward in (False, True):
        fused, eager = baselines.bytes_moved(
            "mixture_log_likelihood", 2, 4, 8, 0, 0, 0, backward=backward)
        assert fused == 2 * 4 * 64 * (3 + 16 + 1 + 16 * backward) and eager > 5 * fused


@pytest.mark.parametrize("reason", ["error 1e-02", "not here"])
def test_a_wrong_implementation_gets_no_number(tmp_path, capsys, monkeypatch, reason):
    def wrong(logits):
        if reason == "not here":
            raise NotImplementedError("not here\nsecond line")
        return logits.softmax(1) + 0.01

    monkeypatch.setattr(kernels, "masks", wrong)
    monkeypatch.setattr(baselines, "GRADIENTS", dict(masks=slice(0, 1), leave_one_out=slice(0, 0)))
    assert run(tmp_path, *TINY) == 1
    printed = capsys.readouterr().out
    assert printed.count("WRONG") == 2 and reason in printed and "second line" not in printed
    for row in read(tmp_path, "ops")["rows"]:
        red = row["op"] == "masks" and row["implementation"] == "fallback"
        assert ("wrong" in row) == red
        assert ("ms" in row) == ("x eager" in row) == (not red)


def test_nan_is_wrong():
    truth = lambda: [torch.ones(2, dtype=torch.float64)]  # noqa: E731
    nearly = [torch.tensor([1, 1 + 1e-6])]
    assert benchmark.check(lambda: nearly, truth, 1e-5).keys() == {"error"}
    for values in ([1, float("nan")], [1, 2], [float("inf"), 1]):
        assert "wrong" in benchmark.check(lambda v=values: [torch.tensor(v)], truth, 1e-5)
    assert "wrong" in benchmark.check(lambda: [], truth, 1e-5)  # an output is missing


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("arguments", [TINY, ["--models", "--batch", "2", "--repeats", "1"]])
def test_on_a_gpu(tmp_path, arguments):
    assert benchmark.main([*arguments, "--device", "cuda", "--out", str(tmp_path)]) == 0


def test_candidates_take_turns(monkeypatch):
    order, calls = [], dict(a=lambda: order.append(1), b=lambda: order.append(0))
    monkeypatch.setattr(benchmark.time, "process_time", lambda: sum(order) * len(order))
    times = benchmark.interleave(calls, 3, CPU)
    assert order == [1, 0] * 4  # the first two to warm up
    assert times["a"] == pytest.approx(dict(ms=7000, p20=5200, p80=8800))  # of 4, 7 and 10 s


def test_peak_allocated():
    def call():
        first = torch.ones(500, 1000)  # 2 MB
        first = first + 1
        return first.exp_() + first  # never more than two at a time

    assert benchmark.peak_allocated(call, CPU) == pytest.approx(4, abs=0.01)


def test_a_step_of_every_model(tmp_path, capsys):
    arguments = "--models", "step", "--presets", "quick", "--repeats", "1", "--batch", "2"
    assert run(tmp_path, *arguments) == 0
    assert all(len(line) <= 100 for line in capsys.readouterr().out.splitlines()[:-1])
    rows = read(tmp_path, "step")["rows"]
    names = [module.__name__ for module in benchmark.MODELS]
    assert [row["group"] for row in rows] == [f"{name} quick, batch 2" for name in names]
    for row in rows:
        assert row["setting"] == "torch" and row["error"] < 1e-3 and row["x ms"] == 1
        assert row["fwd ms"] > 0 and row["p20"] <= row["ms"] <= row["p80"] and row["MB"] > 0.1


def test_compare_takes_the_papers_steps_and_does_not_time_what_is_wrong(
    tmp_path, capsys, monkeypatch
):
    """EfficientMORL is wrong at 5 pixels."""
    monkeypatch.setattr(benchmark, "PIXELS", (4, 5))
    decodes = []
    emorl = efficient_morl.EfficientMORL
    for model in (iodine.IODINE, emorl, slot_attention.SlotAutoencoder):
        def decode(self, z, *pool, original=model.decode, wrong=1 + (model is emorl) / 100):
            decodes.append(z)
            decoded = original(self, z, *pool)
            return decoded * (wrong if (z.dtype, decoded.shape[-1]) == (torch.float32, 5) else 1)

        monkeypatch.setattr(model, "decode", decode)
    names = ["IODINE, T = 5", *(f"EfficientMORL, I = {i}" for i in range(4)),
             "Slot Attention, T = 3"]  # fmt: skip
    _, group = next(benchmark.rivals(benchmark.Options(batch=2), CPU))
    for name, number in zip(names, (5, 1, 2, 3, 4, 1), strict=True):
        decodes.clear()
        group[name]().loss()
        assert len(decodes) == number and decodes[0].shape == (2, 7, 64)
    assert run(tmp_path, "--models", "compare", "--repeats", "1") == 1
    assert capsys.readouterr().out.count("WRONG") == 4
    rows = read(tmp_path, "compare")["rows"]
    assert [(r["group"], r["setting"]) for r in rows] == [
        (f"{side} pixels, batch 1", name) for side in (4, 5) for name in names]
    for key in ("ms", "wrong"):
        right, wrong = key == "ms", key == "wrong"
        assert [key in row for row in rows] == [right] * 7 + [wrong] * 4 + [right]
    for row in rows[:6]:
        for key in benchmark.COMPARED:
            assert row[f"x {key}"] == pytest.approx(rows[0][key] / row[key])


def test_training_keeps_every_slot_of_every_decode_and_inference_one_decode(tmp_path, monkeypatch):
    """IODINE's appendix A.2: linear in K and in T; in a test T is eliminated."""
    monkeypatch.setattr(benchmark, "DECODES", (2, 3, 4))
    monkeypatch.setattr(benchmark, "SLOTS", (2, 4))
    assert run(tmp_path, "--models", "scale", "--repeats", "1") == 0
    rows = {(row["group"], row["setting"]): row for row in read(tmp_path, "scale")["rows"]}
    groups = [f"T = {steps}, batch 1" for steps in benchmark.DECODES]
    assert list(rows) == [(group, f"K = {slots}, {kind}") for group in groups for slots in (2, 4)
                          for kind in ("training", "inference")]  # fmt: skip
    memory = {kind: torch.tensor([[rows[group, f"K = {k}, {kind}"]["MB"] for group in groups]
                                  for k in (2, 4)]) for kind in ("training", "inference")}
    per_decode = memory["training"].diff()  # (K, T - 1)
    assert torch.allclose(per_decode[:, 0], per_decode[:, 1], rtol=0.05)
    assert torch.allclose(per_decode[1], 2 * per_decode[0], rtol=0.1)
    decoded = torch.tensor([[2], [4]]) * 4 * 35 * 35 * 4 / 1e6  # what a decode returns, in float32
    assert torch.allclose(memory["inference"].diff(), decoded, rtol=0.05)
    assert (memory["training"] > memory["inference"]).all()
    assert all(row["error"] < 1e-4 and row["fwd ms"] > 0 for row in rows.values())


def test_options_that_cannot_be(tmp_path, capsys):
    assert run(tmp_path / "out", "--batch", "-1") == 2 and not (tmp_path / "out").exists()
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "--batch must be at least 0" in error
    assert run(tmp_path / "out", "--sizes") == 2 and not (tmp_path / "out").exists()
    assert capsys.readouterr().err == "kernels.benchmark: --sizes needs a name\n"
