"""What every model's run shares: folder, log, checkpoints, resume, Ctrl-C, processes.

Tested once for all models, through IODINE at its smallest (and, what a loop over several processes
must do itself, through each model). Runs that must be killed or interrupted
are forked from a server that has imported iodine already, so that one starts in milliseconds.
"""

import functools
import json
import math
import multiprocessing
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import types
from multiprocessing import forkserver
from pathlib import Path

import pytest
import torch

import air
import iodine
import kernels
from data import options, runs

ROOT = Path(__file__).parent.parent
TINY = dict(
    num_slots=3, latent_size=4, decoder_channels=(4, 4), refinement_channels=(4, 4),
    mlp_sizes=(8,), num_steps=2, batch_size=4, steps=6, log_every=1, device="cpu", kernels="torch",
    lr_warmup=2, lr_horizon=5, lr_final=0.1,
)  # fmt: skip
TINY_AIR = dict(
    max_objects=2, latent_size=3, glimpse_size=6, lstm_size=8, head_sizes=(8,), encoder_sizes=(8,),
    decoder_sizes=(8,), batch_size=4, log_every=1, device="cpu", estimator="nvil",
)  # fmt: skip
CHECKPOINT_KEYS = {
    "format", "model_name", "config", "model", "optimizer", "step", "rng", "minutes",
    "skipped",
}  # fmt: skip
EVALUATION_KEYS = {
    "model", "preset", "variant", "command", "seed", "steps", "minutes", "device", "versions",
    "commit", "date", "metrics", "settings",
}  # fmt: skip
TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
SMALL_EVALUATION = functools.partial(iodine.evaluate, count=4)
AIR_EVALUATION = functools.partial(air.evaluate, count=4)
REAL_DRAW = iodine.draw


def no_figures(*_) -> None:
    """Instead of iodine.draw, which takes longer than everything else here."""


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Evaluates 4 scenes and draws nothing; no trace of torchrun, threads or kernel choice."""
    monkeypatch.setattr(iodine, "evaluate", SMALL_EVALUATION)
    monkeypatch.setattr(iodine, "draw", no_figures)
    for name in TORCHRUN:
        monkeypatch.delenv(name, raising=False)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with kernels.use("auto"):
        yield
    torch.set_num_threads(threads)


def tiny(out: Path | str = "", **changes) -> iodine.Config:
    return iodine.make_config("quick", **{**TINY, "out": str(out), **changes})


def resumed(path: Path, *arguments: object, model: types.ModuleType = iodine):
    """The config of `python iodine.py --resume path ARGUMENTS`, or of another model."""
    line = ["--resume", str(path), *map(str, arguments)]
    return options.parse(model.Config, model.make_config, model.load, line)


def strict(text: str):
    """JSON as other languages read it: no NaN, no Infinity."""

    def refuse(name):
        raise AssertionError(f"{name} is not JSON: {text[:300]}")

    return json.loads(text, parse_constant=refuse)


def checkpoint(folder: Path) -> dict:
    return torch.load(folder / "checkpoint.pt", weights_only=True)


def log(folder: Path) -> list[dict]:
    """metrics.jsonl without the one thing that may differ between two equal runs."""
    records = [strict(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in record.items() if k != "seconds"} for record in records]


def same(a, b) -> bool:
    """Equal to the last bit, all the way down."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


def assert_same_run(folder: Path, expected: Path) -> None:
    """Parameters, Adam's state, step, generator and log, bit for bit."""
    a, b = checkpoint(folder), checkpoint(expected)
    for name in ("step", "model", "optimizer", "rng"):
        assert same(a[name], b[name]), name
    assert log(folder) == log(expected)


# -- runs in processes of their own ----------------------------------------------------------------


@pytest.fixture(scope="module")
def context():
    """A server that has imported iodine, and forks."""
    before = os.environ.get("PYTHONPATH")
    paths = [str(ROOT), str(ROOT / "tests"), before]
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
    fork = multiprocessing.get_context("forkserver")
    fork.set_forkserver_preload(["iodine", "air", "torch._dynamo"])  # Adam imports it
    forkserver.ensure_running()
    del os.environ["PYTHONPATH"]
    if before is not None:
        os.environ["PYTHONPATH"] = before
    return fork


class Child:
    """`task(*arguments)` in a process of its own, in its own folder; its prints go to a file."""

    def __init__(self, context, folder: Path, task, *arguments, **environment: object):
        folder.mkdir(parents=True, exist_ok=True)
        self.printed = folder.with_name(folder.name + ".printed")
        environment = {k: str(v) for k, v in environment.items()}
        arguments = folder, self.printed, environment, task, arguments
        self.process = context.Process(target=child_main, args=arguments)
        self.process.start()

    def signal(self, number: int) -> None:
        os.kill(self.process.pid, number)

    def wait(self, seconds: float = 30.0) -> tuple[int | None, str]:
        """Exit status (negative: the signal that ended it; None: it hangs), and what it printed."""
        self.process.join(seconds)
        status = self.process.exitcode
        if status is None:
            self.process.kill()
            self.process.join()
        return status, self.printed.read_text()


def child_main(folder: Path, printed: Path, environment: dict, task, arguments: tuple) -> None:
    os.chdir(folder)
    os.environ.update(environment)
    with open(printed, "w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    # As in a terminal; what a shell starts in the background ignores the signal.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    torch.set_num_threads(1)
    iodine.evaluate, iodine.draw = SMALL_EVALUATION, no_figures
    air.evaluate = AIR_EVALUATION
    air.draw = no_figures
    task(*arguments)


def wait_for(condition, seconds: float = 30.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited for too long"
        time.sleep(0.001)


def num_lines(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0


def main_with(config: iodine.Config) -> None:
    """What `python iodine.py` does, for a config that is known."""
    sys.argv = ["iodine.py"]
    options.main(iodine.Config, lambda *_: config, iodine.load, iodine.train)


# -- resume ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("changes", [{}, dict(lstm_size=6)], ids=["quick", "lstm"])
def test_six_steps_are_three_and_three(tmp_path, monkeypatch, changes):
    """Across warm-up and decay, with an evaluation (and, once, figures) in between."""
    unbroken = iodine.train(tiny(tmp_path / "six", **changes))
    if not changes:
        monkeypatch.setattr(iodine, "draw", REAL_DRAW)
    half = iodine.train(tiny(tmp_path / "half", steps=3, **changes))
    assert checkpoint(tmp_path / "half")["step"] == 3
    monkeypatch.setattr(iodine, "draw", no_figures)
    whole = iodine.train(resumed(tmp_path / "half", "--steps", 6))
    assert_same_run(tmp_path / "half", tmp_path / "six")
    assert whole["metrics"] == unbroken["metrics"] != half["metrics"]
    rates = [record["lr"] for record in log(tmp_path / "six")]
    assert rates[0] < rates[1] > rates[2] > rates[4] > rates[5]  # it was worth testing
    assert [record["step"] for record in log(tmp_path / "six")] == [1, 2, 3, 4, 5, 6]


def test_resume_drops_what_the_checkpoint_has_not_seen(tmp_path):
    """A run that was killed after steps 4 and 5 were logged, and while 6 was being written."""
    iodine.train(tiny(tmp_path / "six"))
    iodine.train(tiny(tmp_path / "killed", steps=3))
    with open(tmp_path / "killed" / "metrics.jsonl", "a") as file:
        file.write('{"step": 4, "loss": 0.5}\n{"step": 5, "loss": 0.5}\n{"step": 6, "lo')
    (tmp_path / "killed" / "checkpoint.pt.tmp").write_bytes(b"half a checkpoint")
    (tmp_path / "killed" / "metrics.jsonl.tmp").write_text('{"st')
    iodine.train(resumed(tmp_path / "killed" / "checkpoint.pt", "--steps", 6))
    assert_same_run(tmp_path / "killed", tmp_path / "six")
    assert not list((tmp_path / "killed").rglob("*.tmp"))


def test_resume_into_another_folder_copies_the_log(tmp_path):
    iodine.train(tiny(tmp_path / "six"))
    iodine.train(tiny(tmp_path / "half", steps=3))
    files = {p: p.read_bytes() for p in (tmp_path / "half").rglob("*") if p.is_file()}
    iodine.train(resumed(tmp_path / "half", "--steps", 6, "--out", tmp_path / "new"))
    assert_same_run(tmp_path / "new", tmp_path / "six")
    assert all(path.read_bytes() == content for path, content in files.items())


def test_a_finished_run_that_is_resumed_only_evaluates(tmp_path):
    first = iodine.train(tiny(tmp_path / "run", steps=3))
    before = checkpoint(tmp_path / "run")
    again = iodine.train(resumed(tmp_path / "run"))
    assert again["metrics"] == first["metrics"]
    assert same(checkpoint(tmp_path / "run")["model"], before["model"])


def test_minutes_count_from_the_start(tmp_path):
    """Three steps took 0.05 minutes, says the checkpoint: so --minutes 0.05 has none left."""
    iodine.train(tiny(tmp_path / "run", steps=3))
    path = tmp_path / "run" / "checkpoint.pt"
    torch.save({**checkpoint(tmp_path / "run"), "minutes": 0.05}, path)
    iodine.train(resumed(path, "--steps", 10**6, "--minutes", 0.05))
    assert checkpoint(tmp_path / "run")["step"] == 3
    iodine.train(resumed(path, "--steps", 10**6, "--minutes", 0.055))
    assert checkpoint(tmp_path / "run")["step"] > 3


def test_evaluating_a_run_that_goes_on_leaves_its_log_alone(tmp_path):
    """Lines past the checkpoint belong to the process that is training there."""
    iodine.train(tiny(tmp_path / "run", steps=3))
    with open(tmp_path / "run" / "metrics.jsonl", "a") as file:
        file.write('{"step": 4, "loss": 0.5}\n')
    iodine.train(resumed(tmp_path / "run", "--eval-only"))
    assert [record["step"] for record in log(tmp_path / "run")] == [1, 2, 3, 4]


def test_same_seed_same_run_other_seed_not(tmp_path):
    results = [
        iodine.train(tiny(tmp_path / name, seed=seed, steps=3))
        for name, seed in (("a", 0), ("b", 0), ("c", 1))
    ]
    assert_same_run(tmp_path / "a", tmp_path / "b")
    assert results[0]["metrics"] == results[1]["metrics"] != results[2]["metrics"]
    assert results[0]["settings"] == results[1]["settings"]
    for mine, other in zip(log(tmp_path / "a"), log(tmp_path / "c"), strict=True):
        assert mine["loss"] != other["loss"]


# -- kill and interrupt ----------------------------------------------------------------------------


def test_twenty_kills(tmp_path, context):
    """SIGKILL up to three steps and 10 ms after the start; checkpoints are written all the time."""
    moments, steps = random.Random(0), 120
    config = tiny(tmp_path / "run", steps=steps, checkpoint_seconds=0.0)
    unbroken = Child(context, tmp_path / "a", iodine.train, tiny(tmp_path / "whole", steps=steps))
    lines, saved = tmp_path / "run" / "metrics.jsonl", tmp_path / "run" / "checkpoint.pt"
    reached = []
    for kill in range(20):
        child = Child(context, tmp_path / "b", iodine.train, config)
        wait_for(saved.exists)
        more = moments.randrange(4)
        if more:
            target = checkpoint(tmp_path / "run")["step"] + more
            # The process cuts the log to the checkpoint's length, then adds to it.
            wait_for(lambda target=target: num_lines(lines) >= target)
        time.sleep(moments.uniform(0, 0.01))
        child.signal(signal.SIGKILL)
        status, printed = child.wait()
        assert status == -signal.SIGKILL, f"kill {kill}: {status}\n{printed}"
        reached.append(checkpoint(tmp_path / "run")["step"])
        for json_file in (tmp_path / "run").glob("*.json"):
            strict(json_file.read_text())
        config = resumed(tmp_path / "run")
    assert reached == sorted(reached) and 10 <= reached[-1] < steps, reached
    assert len(set(reached)) > 8, reached
    assert unbroken.wait()[0] == 0
    status, printed = Child(context, tmp_path / "b", iodine.train, config).wait()
    assert status == 0, printed
    assert_same_run(tmp_path / "run", tmp_path / "whole")
    assert [record["step"] for record in log(tmp_path / "run")] == list(range(1, steps + 1))
    assert not list((tmp_path / "run").rglob("*.tmp"))
    strict((tmp_path / "run" / "evaluation.json").read_text())


def test_killed_before_the_first_checkpoint(tmp_path):
    """There is nothing to resume, so the same command must work again."""
    config = tiny(tmp_path / "run", steps=2)
    runs.open_folder(config, "iodine")
    iodine.train(config)
    assert checkpoint(tmp_path / "run")["step"] == 2


def test_ctrl_c_saves_and_says_how_to_go_on(tmp_path):
    """The real program: one line on how to go on, status 130, and going on works."""
    out = tmp_path / "run"
    line = ["--out", out, "--steps", 10**6]
    for name, value in TINY.items():
        value = value if isinstance(value, tuple) else (value,)
        line += [] if name == "steps" else [options.option(name), *value]
    command = [sys.executable, str(ROOT / "iodine.py"), *map(str, line)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    with subprocess.Popen(command, cwd=tmp_path, env=environment, **pipes) as process:
        try:
            printed = ""
            while not printed.startswith("step "):
                printed = process.stdout.readline()
                assert printed, process.stderr.read()
            process.send_signal(signal.SIGINT)
            rest, errors = process.communicate(timeout=30)
        finally:
            process.kill()
    assert process.returncode == 130
    assert "Traceback" not in rest + errors
    errors = errors.strip().splitlines()
    step = checkpoint(out)["step"]
    assert errors[-1] == f"iodine.py: stopped after step {step}; go on with --resume {out}"
    assert [line for line in errors if "--resume" in line] == errors[-1:]
    assert not (out / "evaluation.json").exists()
    assert len(log(out)) == step
    iodine.train(resumed(out, "--steps", step + 2))
    iodine.train(tiny(tmp_path / "whole", steps=step + 2))
    assert_same_run(out, tmp_path / "whole")


def endless_step(config: iodine.Config, name: str) -> None:
    """Trains, but `name`, a function of iodine, never returns."""

    def sleep(*_):
        print("asleep", flush=True)
        time.sleep(60)

    owner = iodine.IODINE if name == "loss" else iodine
    setattr(owner, name, sleep)
    main_with(config)


def test_a_second_ctrl_c_leaves_at_once(tmp_path, context):
    child = Child(context, tmp_path / "a", endless_step, tiny(tmp_path / "run"), "loss")
    wait_for(lambda: child.printed.exists() and "asleep" in child.printed.read_text())
    child.signal(signal.SIGINT)
    wait_for(lambda: "stopping" in child.printed.read_text())
    child.signal(signal.SIGINT)
    status, printed = child.wait(5)
    assert status == -signal.SIGINT
    assert "Traceback" not in printed
    iodine.load_model(tmp_path / "run")


def test_ctrl_c_outside_of_the_training_loop(tmp_path, context):
    """While it evaluates: at once, with a message, and the checkpoint has all that was trained."""
    child = Child(context, tmp_path / "a", endless_step, tiny(tmp_path / "run"), "evaluate")
    wait_for(lambda: child.printed.exists() and "asleep" in child.printed.read_text())
    child.signal(signal.SIGINT)
    status, printed = child.wait(20)
    assert status == 130
    assert "Traceback" not in printed
    assert checkpoint(tmp_path / "run")["step"] == 6
    assert not printed.rstrip().endswith("iodine.py:"), "says nothing"


def test_stop_flag_gives_the_handler_back(capsys):
    before = signal.getsignal(signal.SIGINT)
    with runs.StopFlag() as stop:
        assert not stop
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.01)
        assert stop
    assert signal.getsignal(signal.SIGINT) is before
    assert "stopping" in capsys.readouterr().err


def test_training_in_a_thread(tmp_path):
    """As a notebook might: no handler can be set there, and none is needed."""
    results = []
    config = tiny(tmp_path / "run", steps=1)
    thread = threading.Thread(target=lambda: results.append(iodine.train(config)))
    thread.start()
    thread.join(30)
    assert results and checkpoint(tmp_path / "run")["step"] == 1


# -- several processes -----------------------------------------------------------------------------


def start_ranks(context, folder: Path, task, *arguments, count: int = 2) -> list[Child]:
    """As torchrun starts them, each in a folder of its own."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = dict(WORLD_SIZE=count, MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
    if "lo" in (name for _, name in socket.if_nameindex()):
        common["GLOO_SOCKET_IFNAME"] = "lo"  # where this machine's own name cannot be resolved
    return [
        Child(context, folder / f"rank{r}", task, *arguments, RANK=r, LOCAL_RANK=r, **common)
        for r in range(count)
    ]


def recorded(config: options.RunConfig) -> None:
    """Trains; writes each step's loss and averaged gradients to seen.pt in the working folder."""
    losses, gradients = [], []
    module = sys.modules[type(config).__module__]
    model = getattr(module, module.__name__.upper())
    loss, clip = model.loss, torch.nn.utils.clip_grad_norm_

    def seen_loss(*arguments):
        parts = loss(*arguments)
        losses.append(parts["loss"].item())
        return parts

    def seen_gradients(parameters, limit):
        gradients.append([None if p.grad is None else p.grad.clone() for p in parameters])
        return clip(parameters, limit)

    model.loss, torch.nn.utils.clip_grad_norm_ = seen_loss, seen_gradients
    module.train(config)
    torch.save(dict(losses=losses, gradients=gradients), "seen.pt")


@pytest.fixture(scope="module", params=[(iodine, TINY), (air, TINY_AIR)], ids=["iodine", "air"])
def one_and_two(request, tmp_path_factory, context):
    """The folders of one process, and of two with half the scenes each; two steps."""
    folder, (model, small) = tmp_path_factory.mktemp("ranks"), request.param
    # Writes to runs/ in each process's own folder.
    config = model.make_config("quick", **small | dict(steps=2, batch_size=8))
    alone = Child(context, folder / "alone", recorded, config)
    ranks = start_ranks(context, folder, recorded, config)
    for child in (alone, *ranks):
        status, printed = child.wait()
        assert status == 0, printed
    return folder / "alone", folder / "rank0", folder / "rank1"


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a - b).abs().max() / b.abs().max().clamp(min=1e-30)).item()


def test_two_processes_are_one(one_and_two):
    """Loss, every gradient and the parameters after two steps of Adam."""
    alone, *ranks = (torch.load(folder / "seen.pt", weights_only=True) for folder in one_and_two)
    for step in range(2):
        halves = [rank["losses"][step] for rank in ranks]
        assert halves[0] != halves[1]  # each has its own scenes
        assert math.isclose(sum(halves) / 2, alone["losses"][step], rel_tol=1e-6)
        assert same(ranks[0]["gradients"], ranks[1]["gradients"])
        largest = max(g.abs().max() for g in alone["gradients"][step])
        for mine, expected in zip(
            ranks[0]["gradients"][step], alone["gradients"][step], strict=True
        ):
            assert (mine - expected).abs().max() <= 1e-6 * largest
    a, b = (checkpoint(only_run(folder)) for folder in one_and_two[:2])
    for name, value in a["model"].items():
        assert relative(b["model"][name], value) < 1e-4, name  # Adam divides small by small
    assert [strict(line)["lr"] for line in open_log(one_and_two[0])] == [
        strict(line)["lr"] for line in open_log(one_and_two[1])
    ]


def only_run(folder: Path) -> Path:
    (run,) = (folder / "runs").iterdir()
    return run


def open_log(folder: Path) -> list[str]:
    return (only_run(folder) / "metrics.jsonl").read_text().splitlines()


def test_the_log_of_two_processes_is_that_of_one(one_and_two):
    """What is logged is the mean over all scenes of the step, not over rank 0's."""
    for line, other in zip(open_log(one_and_two[0]), open_log(one_and_two[1]), strict=True):
        expected, logged = strict(line), strict(other)
        assert expected.keys() >= {"step", "loss", "nll", "kl", "elbo", "grad_norm", "lr"}
        for name in expected.keys() - {"seconds"}:
            assert math.isclose(logged[name], expected[name], rel_tol=1e-4, abs_tol=1e-4), name


def test_only_rank_0_writes(one_and_two):
    written = [{str(p.relative_to(f)) for p in f.rglob("*")} for f in one_and_two]
    assert written[0] == written[1]
    assert (only_run(one_and_two[1]) / "evaluation.json").exists()
    assert written[2] == {"seen.pt"}
    assert (one_and_two[2].with_name("rank1.printed")).read_text() == ""


def evaluate_only(folder: Path, experiment: str) -> None:
    model = sys.modules[folder.name.partition("-")[0]]
    model.EXPERIMENTS["nothing"] = lambda model, scenes, folder: (folder / "x").write_text("x")
    what = ["--experiment", experiment] if experiment else ["--eval-only"]
    model.train(resumed(folder, *what, "--out", "new", model=model))


@pytest.mark.parametrize("experiment", ["", "nothing"])
def test_only_rank_0_writes_an_evaluation(one_and_two, context, tmp_path, experiment):
    """Also where there is nothing to train."""
    trained = only_run(one_and_two[1])
    children = start_ranks(context, tmp_path, evaluate_only, trained, experiment)
    for child in children:
        status, printed = child.wait()
        assert status == 0, printed
    assert list((tmp_path / "rank0").iterdir())
    assert not list((tmp_path / "rank1").iterdir())


def test_processes_with_parameters_that_have_no_gradient(context, tmp_path):
    """The paper's ablation leaves a LayerNorm out of the graph."""
    config = tiny(steps=1, drop_inputs=("grad_posterior",))
    for child in start_ranks(context, tmp_path, iodine.train, config):
        status, printed = child.wait()
        assert status == 0, printed


def test_ctrl_c_in_one_process_stops_all(context, tmp_path):
    """At the same step, with a checkpoint, and every process says 130."""
    children = start_ranks(context, tmp_path, main_with, tiny(steps=10**6))
    folder = tmp_path / "rank0" / "runs" / "iodine-quick-0"
    wait_for(lambda: num_lines(folder / "metrics.jsonl") > 1)
    children[1].signal(signal.SIGINT)
    results = [child.wait(15) for child in children]
    assert [status for status, _ in results] == [130, 130], results
    assert "Traceback" not in results[0][1] + results[1][1]
    step = checkpoint(folder)["step"]
    assert f"stopped after step {step};" in results[0][1]
    assert f"stopped after step {step};" in results[1][1]
    assert len(log(folder)) == step


def fast_clock(config: iodine.Config) -> None:
    """Trains; rank 1 believes that time runs a hundred times as fast."""
    if runs.rank():
        iodine.time = types.SimpleNamespace(monotonic=lambda: 100 * time.monotonic())
    iodine.train(config)


def test_processes_agree_on_when_the_time_is_up(context, tmp_path):
    """Clocks differ; a process that went on alone would wait for the others for ever."""
    children = start_ranks(context, tmp_path, fast_clock, tiny(steps=10**6, minutes=0.5 / 60))
    for child in children:
        status, printed = child.wait(15)
        assert status == 0, printed
    assert (tmp_path / "rank0" / "runs" / "iodine-quick-0" / "evaluation.json").exists()


def test_a_batch_that_does_not_divide(monkeypatch, tmp_path):
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(options.UserError, match="--batch-size 4 does not divide among 3"):
        iodine.train(tiny(tmp_path / "run"))
    assert not list(tmp_path.iterdir())


def test_without_torchrun_there_is_nothing_to_share():
    tensors = [torch.tensor([1.0, 2.0]), torch.tensor(3.0)]
    runs.average(tensors)
    assert same(tensors, [torch.tensor([1.0, 2.0]), torch.tensor(3.0)])
    assert runs.any_process(True, torch.device("cpu")) is True
    assert runs.any_process(False, torch.device("cpu")) is False
    assert (runs.rank(), runs.world_size()) == (0, 1)
    assert not torch.distributed.is_initialized()


# -- gradients that are not finite -----------------------------------------------------------------


@pytest.fixture
def bad_steps(monkeypatch):
    """A set: the loss of the n-th call is NaN for every n in it."""
    numbers, calls, loss = set(), iter(range(10**6)), iodine.IODINE.loss

    def sometimes_nan(*arguments):
        parts = loss(*arguments)
        if next(calls) in numbers:
            parts["loss"] = parts["loss"] * math.nan
        return parts

    monkeypatch.setattr(iodine.IODINE, "loss", sometimes_nan)
    return numbers


def test_a_gradient_that_is_not_finite_changes_nothing(tmp_path, bad_steps):
    bad_steps |= {2}
    iodine.train(tiny(tmp_path / "bad", steps=3))
    bad_steps.clear()
    iodine.train(tiny(tmp_path / "good", steps=2))
    bad, good = checkpoint(tmp_path / "bad"), checkpoint(tmp_path / "good")
    assert same(bad["model"], good["model"])
    moments = [s["optimizer"]["state"] for s in (bad, good)]
    assert same(*moments)  # not even decayed
    assert (bad["step"], good["step"]) == (3, 2)


def test_the_log_and_the_figures_survive_it(tmp_path, bad_steps, monkeypatch):
    bad_steps |= {1}
    monkeypatch.setattr(iodine, "draw", REAL_DRAW)
    iodine.train(tiny(tmp_path / "run", steps=3))
    assert (tmp_path / "run" / "figures" / "training.png").exists()
    text = (tmp_path / "run" / "metrics.jsonl").read_text()
    assert [strict(line)["step"] for line in text.splitlines()] == [1, 2, 3]


def test_nine_in_a_row_are_forgiven(tmp_path, bad_steps):
    bad_steps |= {*range(1, 10), *range(11, 20)}
    iodine.train(tiny(tmp_path / "run", steps=20, log_every=100))
    assert checkpoint(tmp_path / "run")["step"] == 20


def test_ten_in_a_row_stop_the_run(tmp_path, bad_steps):
    bad_steps |= set(range(3, 100))
    with pytest.raises(options.UserError) as error:
        iodine.train(tiny(tmp_path / "run", steps=50, log_every=100, checkpoint_seconds=0.0))
    message = str(error.value)
    assert "\n" not in message
    assert "step 12" in message or "step 13" in message  # the tenth, counted from 0 or from 1
    assert "nan" in message and str(tmp_path / "run") in message
    bad_steps.clear()
    state = checkpoint(tmp_path / "run")
    assert all(value.isfinite().all() for value in state["model"].values())
    iodine.train(tiny(tmp_path / "good", steps=3))
    assert same(state["model"], checkpoint(tmp_path / "good")["model"])
    iodine.load_model(tmp_path / "run")


# -- the folder ------------------------------------------------------------------------------------


def test_default_folders_are_numbered(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = tiny(steps=1)
    for expected in ("iodine-quick-0", "iodine-quick-0-2", "iodine-quick-0-3"):
        iodine.train(config)
        assert checkpoint(tmp_path / "runs" / expected)["step"] == 1
    assert len(list((tmp_path / "runs").iterdir())) == 3
    assert runs.open_folder(tiny(seed=7), "iodine") == Path("runs/iodine-quick-7")


def test_out_is_used_as_it_is_and_never_shared(tmp_path):
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "notes.txt").write_text("something else may be there")
    iodine.train(tiny(folder, steps=1))
    before = {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    with pytest.raises(options.UserError, match=r"mine holds another run; .*--resume") as error:
        iodine.train(tiny(folder, steps=1))
    assert "\n" not in str(error.value)
    iodine.train(tiny(tmp_path / "other", steps=1))
    with pytest.raises(options.UserError, match="mine holds another run"):
        iodine.train(resumed(tmp_path / "other", "--steps", 2, "--out", folder))
    assert {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()} == before


def test_out_of_the_run_that_is_resumed(tmp_path):
    """Naming the run's own folder, in other words, is no conflict."""
    iodine.train(tiny(tmp_path / "run", steps=1))
    iodine.train(resumed(tmp_path / "run", "--steps", 2, "--out", tmp_path / "x" / ".." / "run"))
    assert [record["step"] for record in log(tmp_path / "run")] == [1, 2]


@pytest.mark.parametrize("where", ["file", "file/below", "/proc/none/run"])
def test_a_folder_that_cannot_be_written(tmp_path, where):
    if where.startswith("/proc") and not Path("/proc").is_dir():
        pytest.skip("no /proc here")
    (tmp_path / "file").write_text("a file")
    with pytest.raises(options.UserError, match="cannot write to") as error:
        iodine.train(tiny(tmp_path / where, steps=1))
    assert "\n" not in str(error.value) and "--out" in str(error.value)
    assert [p.name for p in tmp_path.iterdir()] == ["file"]
    assert (tmp_path / "file").read_text() == "a file"


def test_weights_in_a_folder_that_is_no_run(tmp_path):
    """Evaluating downloaded weights must not fill the folder they are in."""
    iodine.train(tiny(tmp_path / "run", steps=1))
    (tmp_path / "weights").mkdir()
    shutil.copy(tmp_path / "run" / "checkpoint.pt", tmp_path / "weights" / "mine.pt")
    iodine.train(resumed(tmp_path / "weights" / "mine.pt", "--eval-only", "--out", tmp_path / "o"))
    assert [p.name for p in (tmp_path / "weights").iterdir()] == ["mine.pt"]
    assert (tmp_path / "o" / "evaluation.json").exists()


def test_write_is_all_or_nothing(tmp_path):
    path = tmp_path / "x.json"
    runs.write(path, dict(a=1))
    assert strict(path.read_text()) == dict(a=1)
    for content in ({"a": 2, "b": object()}, [{"a": 2}, object()]):
        with pytest.raises(TypeError):
            runs.write(path, content)
        assert strict(path.read_text()) == dict(a=1)
    runs.write(path, [dict(a=1), dict(a=2)])
    assert path.read_text() == '{"a": 1}\n{"a": 2}\n'
    runs.write(path, [])
    assert path.read_text() == ""
    assert [p.name for p in tmp_path.iterdir()] == ["x.json"]


def test_write_fails_halfway(tmp_path, monkeypatch):
    """The disk is full after ten letters: the old file is still there, whole."""
    path = tmp_path / "x.json"
    runs.write(path, dict(a=1))
    write_text = Path.write_text

    def full(self, text, *arguments, **options):
        write_text(self, text[:10], *arguments, **options)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(OSError):
        runs.write(path, dict(a=list(range(100))))
    assert strict(path.read_text()) == dict(a=1)


def test_save_fails_halfway(tmp_path, monkeypatch):
    """The same for checkpoints, whatever torch.save raises."""
    config = tiny(tmp_path / "run", steps=1)
    iodine.train(config)
    before = (tmp_path / "run" / "checkpoint.pt").read_bytes()

    def full(content, path):
        Path(path).write_bytes(b"half")
        raise RuntimeError("unexpected pos 64 vs 0")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises((RuntimeError, OSError, options.UserError)):
        runs.save_checkpoint(tmp_path / "run", "iodine", config, step=9)
    assert (tmp_path / "run" / "checkpoint.pt").read_bytes() == before


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
@pytest.mark.parametrize("name", ["checkpoint.pt.tmp", "config.json.tmp", "metrics.jsonl.tmp"])
def test_a_full_disk_is_one_line(tmp_path, monkeypatch, capsys, name):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / name).symlink_to("/dev/full")
    monkeypatch.setattr(sys, "argv", ["iodine.py"])
    with pytest.raises(SystemExit) as stop:
        main_with(tiny(tmp_path / "run"))
    assert stop.value.code == 2
    assert len(capsys.readouterr().err.strip().splitlines()) == 1


def test_a_damaged_log(tmp_path):
    """What a kill leaves, at any length: whole lines are kept, and only those."""
    lines = ['{"step": 1, "loss": 1.5}\n', '{"step": 2, "loss": 1.25}\n']
    text, path = "".join(lines), tmp_path / "metrics.jsonl"
    for length in range(len(text) + 1):
        path.write_text(text[:length])
        whole = sum(length >= len("".join(lines[: n + 1])) - 1 for n in range(2))
        assert [record["step"] for record in runs.read_log(tmp_path)] == [1, 2][:whole]
        runs.read_log(tmp_path, last_step=2)
        assert path.read_text() == "".join(lines[:whole])
    runs.read_log(tmp_path, last_step=1)
    assert path.read_text() == lines[0]
    path.unlink()
    assert runs.read_log(tmp_path) == []


# -- checkpoints -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The folder of a run of one step, for reading only."""
    folder = tmp_path_factory.mktemp("trained") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(iodine, "evaluate", SMALL_EVALUATION)
        patch.setattr(iodine, "draw", no_figures)
        iodine.train(tiny(folder, steps=1))
    return folder


def test_what_a_checkpoint_holds(trained):
    content = checkpoint(trained)  # with weights_only=True
    assert content.keys() == CHECKPOINT_KEYS
    assert content["format"] == runs.FORMAT == 1
    assert content["model_name"] == "iodine"
    assert iodine.Config(**content["config"]) == tiny(trained, steps=1)
    assert content["step"] == 1 and content["minutes"] > 0
    assert content["rng"].dtype == torch.uint8
    model = iodine.load_model(trained)
    assert same(dict(model.state_dict()), dict(content["model"]))
    assert not model.training
    assert same(runs.load_checkpoint(trained, "iodine"), content)
    assert same(runs.load_checkpoint(str(trained / "checkpoint.pt"), "iodine"), content)


def bad_checkpoints(good: bytes, content: dict, path: Path) -> dict[str, tuple]:
    """name -> (how it is written, what the message must say)."""
    save = functools.partial(torch.save, f=path)
    cases = {
        "missing": (lambda: None, "no such checkpoint"),
        "empty": (lambda: path.write_bytes(b""), "not a readable checkpoint"),
        "text": (lambda: path.write_text("loss 1.0\n" * 99), "not a readable checkpoint"),
        "json": (lambda: path.write_text('{"format": 1}'), "not a readable checkpoint"),
        "object": (lambda: save(types.SimpleNamespace(a=1)), "not a readable checkpoint"),
        "tensor": (lambda: save(torch.ones(3)), "not a checkpoint of this repository"),
        "state_dict": (lambda: save(content["model"]), "not a checkpoint of this repository"),
        "list": (lambda: save([content]), "not a checkpoint of this repository"),
        "newer": (lambda: save({**content, "format": runs.FORMAT + 1}), "newer"),
        "other": (lambda: save({**content, "model_name": "air"}), "air.py, not iodine.py"),
        "folder": (path.mkdir, "no such checkpoint"),
    }
    for length in (1, 4, 100, len(good) // 2, len(good) - 1000, len(good) - 1):
        cases[f"cut{length}"] = (
            lambda length=length: path.write_bytes(good[:length]), "not a readable checkpoint"
        )  # fmt: skip
    return cases


def test_checkpoints_that_are_none(trained, tmp_path, recwarn):
    good = (trained / "checkpoint.pt").read_bytes()
    for name in bad_checkpoints(good, {"model": 0}, tmp_path):
        path = tmp_path / f"{name}.pt"
        write, message = bad_checkpoints(good, checkpoint(trained), path)[name]
        write()
        for load in (iodine.load, iodine.load_model, resumed):
            with pytest.raises(options.UserError) as error:
                load(path)
            assert message in str(error.value), name
            assert "\n" not in str(error.value) and str(path) in str(error.value), name
    assert not recwarn.list, [str(warning.message) for warning in recwarn]


# -- what a run says about itself ------------------------------------------------------------------


def test_evaluation_and_config_are_strict_json(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["iodine.py", "--out", "two words"])
    result = iodine.train(tiny(tmp_path / "run", steps=2))
    evaluation = strict((tmp_path / "run" / "evaluation.json").read_text())
    assert evaluation == strict(json.dumps(result))
    assert EVALUATION_KEYS - evaluation.keys() == set()
    assert evaluation["command"] == "python iodine.py --out 'two words'"
    assert (evaluation["model"], evaluation["preset"], evaluation["variant"]) == (
        "iodine", "quick", "paper"
    )  # fmt: skip
    assert evaluation["steps"] == 2 and 0 < evaluation["minutes"] < 1
    assert evaluation["versions"]["torch"] == torch.__version__
    for scores in (evaluation["metrics"], *(s["metrics"] for s in evaluation["settings"])):
        assert {"ari_fg", "ari", "miou", "mse", "elbo", "nll", "kl"} <= scores.keys()
        for score in scores.values():
            assert {"mean", "stderr", "n"} <= score.keys()
    config = strict((tmp_path / "run" / "config.json").read_text())
    config = {k: tuple(v) if isinstance(v, list) else v for k, v in config.items()}
    assert iodine.Config(**config) == tiny(tmp_path / "run", steps=2)
    for record in log(tmp_path / "run"):
        names = {"step", "loss", "nll", "kl", "elbo", "ari_fg", "grad_norm", "lr"}
        assert names <= record.keys()
        assert math.isclose(record["elbo"], -record["nll"] - record["kl"], rel_tol=1e-4)


def test_the_end_of_a_run_points_to_a_picture(tmp_path, capsys):
    iodine.train(tiny(tmp_path / "run", steps=2, log_every=2))
    printed = capsys.readouterr().out.splitlines()
    assert printed[0].startswith("IODINE, ")
    assert "preset" in printed[1] and "quick" in printed[1]
    assert sum(line.startswith("step ") for line in printed) == 1
    assert printed[-2].startswith("reached") and printed[-1].startswith("look at")
    assert str(tmp_path / "run") in printed[-1]


def test_a_bar_in_a_terminal(tmp_path, monkeypatch, capsys):
    """Then the log is the same, and nothing is printed line by line."""
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    monkeypatch.setattr(runs, "tqdm", functools.partial(runs.tqdm, mininterval=0))
    iodine.train(tiny(tmp_path / "run", steps=3))
    printed = capsys.readouterr()
    assert "step 1" not in printed.out
    assert "3/3" in printed.err and "loss" in printed.err
    assert [record["step"] for record in log(tmp_path / "run")] == [1, 2, 3]


def test_commit(tmp_path, monkeypatch):
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    monkeypatch.setattr(runs, "__file__", str(tmp_path / "runs.py"))
    assert runs.commit() is None  # not a repository
    if shutil.which("git"):
        names = [f"{option}=x" for option in ("user.name", "user.email")]
        git = ["git", "-C", str(tmp_path), *(part for name in names for part in ("-c", name))]
        subprocess.run([*git, "init", "-q"], check=True)
        (tmp_path / "runs.py").write_text("1")
        subprocess.run([*git, "add", "runs.py"], check=True)
        subprocess.run([*git, "commit", "-q", "-m", "x"], check=True)
        clean = runs.commit()
        assert clean and not clean.endswith("-dirty")
        (tmp_path / "runs.py").write_text("2")
        assert runs.commit() == f"{clean}-dirty"
    monkeypatch.setenv("PATH", "")
    assert runs.commit() is None  # no git at all


def test_number_formats_follow_precision():
    backends = torch.backends.cuda.matmul, torch.backends.cudnn
    before = [backend.allow_tf32 for backend in backends]
    try:
        for precision, allowed in (("tf32", True), ("float32", False), ("bfloat16", False)):
            assert runs.set_up(tiny(precision=precision)).type == "cpu"
            assert [backend.allow_tf32 for backend in backends] == [allowed, allowed]
    finally:
        for backend, allowed in zip(backends, before, strict=True):
            backend.allow_tf32 = allowed
