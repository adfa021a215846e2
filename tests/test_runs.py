"""What every run promises, through the toy model: folders, checkpoints, exact resume, signals,
several processes, options. Runs that must be killed are forked from a server that has imported
torch already, so that one starts in milliseconds."""

import contextlib
import functools
import json
import math
import multiprocessing
import os
import random
import re
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

import numpy as np
import pytest
import torch
import toy
from checks import command_line

from data import checkpoints, processes, runs

ROOT = Path(__file__).parent.parent
TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    """Every test in a folder of its own, without a trace of torchrun."""
    monkeypatch.chdir(tmp_path)
    for name in TORCHRUN:
        monkeypatch.delenv(name, raising=False)


def tiny(out: Path | str = "", **changes) -> toy.Config:
    return toy.make_config("quick", out=out, **changes)


def parse(*arguments: object) -> toy.Config:
    return runs.parse("toy", toy.Config, toy.PRESETS, list(map(str, arguments)))


def resumed(path: Path, *arguments: object) -> toy.Config:
    return parse("--resume", path, *arguments)


def strict(text: str):
    """JSON as other languages read it: no NaN, no Infinity."""

    def refuse(name):
        raise AssertionError(f"{name} is not JSON: {text[:300]}")

    return json.loads(text, parse_constant=refuse)


def checkpoint(folder: Path) -> dict:
    return torch.load(folder / "checkpoint.pt", weights_only=True)


def log(folder: Path) -> list[dict]:
    """metrics.jsonl without what may differ between two equal runs."""
    records = [strict(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in record.items() if "seconds" not in k} for record in records]


def same(a, b) -> bool:
    """Equal to the last bit, all the way down."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


def assert_same_run(folder: Path, expected: Path) -> None:
    """Parameters, Adam's state, step and log, bit for bit."""
    a, b = checkpoint(folder), checkpoint(expected)
    for name in ("step", "model", "optimizer"):
        assert same(a[name], b[name]), name
    assert log(folder) == log(expected)


# -- runs in processes of their own ----------------------------------------------------------------


@pytest.fixture(scope="module")
def context():
    """A server that has imported the toy model, and forks."""
    before = os.environ.get("PYTHONPATH")
    paths = str(ROOT), str(ROOT / "tests"), before
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
    fork = multiprocessing.get_context("forkserver")
    fork.set_forkserver_preload(["toy", "torch._dynamo"])  # Adam imports the latter
    forkserver.ensure_running()
    del os.environ["PYTHONPATH"]
    if before is not None:
        os.environ["PYTHONPATH"] = before
    return fork


class Child:
    """`task(*arguments)` in a process of its own, in `folder`; its prints go to a file."""

    def __init__(self, context, folder: Path, task, *arguments, **environment: object):
        folder.mkdir(parents=True, exist_ok=True)
        self.printed = folder.with_name(folder.name + ".printed")
        environment = {k: str(v) for k, v in environment.items()}
        self.process = context.Process(
            target=child_main, args=(folder, self.printed, environment, task, arguments)
        )
        self.process.start()

    def signal(self, number: int) -> None:
        os.kill(self.process.pid, number)

    def wait(self, seconds: float = 60.0) -> tuple[int | None, str]:
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
    task(*arguments)


def main_with(config: toy.Config, name: str = "") -> None:
    """What `python toy.py` does, for a config that is known."""
    if name == "save always":
        runs.CHECKPOINT_SECONDS = 0.0
    sys.argv = ["toy.py", *runs.shlex.split(runs.typed("toy", config, tiny()))[2:]]
    runs.main("toy", toy.Config, toy.PRESETS, toy.train)


def wait_for(condition, seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited for too long"
        time.sleep(0.001)


def num_lines(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0


# -- resume ----------------------------------------------------------------------------------------


def test_six_steps_are_three_and_three(tmp_path):
    toy.train(tiny("whole", steps=6))
    toy.train(tiny("parts", steps=3))
    toy.train(resumed(Path("parts"), "--steps", 6))
    assert_same_run(tmp_path / "parts", tmp_path / "whole")


def test_resume_drops_what_the_checkpoint_has_not_seen():
    toy.train(tiny("run", steps=3))
    with open("run/metrics.jsonl", "a") as file:
        file.write('{"step": 4, "loss": 9}\n{"step": 5, "lo')
    toy.train(resumed(Path("run"), "--steps", 4))
    assert [record["step"] for record in log(Path("run"))] == [1, 2, 3, 4]
    assert log(Path("run"))[3]["loss"] != 9


def test_resume_into_another_folder_leaves_the_first_alone():
    toy.train(tiny("a", steps=2))
    files = [path for path in Path("a").iterdir() if path.is_file()]
    before = [path.read_bytes() for path in files]
    toy.train(resumed(Path("a"), "--steps", 4, "--out", "b"))
    assert before == [path.read_bytes() for path in files]
    assert [record["step"] for record in log(Path("b"))] == [1, 2, 3, 4]


def test_evaluating_a_run_leaves_its_log_and_checkpoint_alone():
    toy.train(tiny("run", steps=2))
    kept = [Path("run") / name for name in ("metrics.jsonl", "checkpoint.pt", "config.json")]
    before = [path.read_bytes() for path in kept]
    result = toy.train(resumed(Path("run"), "--eval-only"))
    assert result["steps"] == 2 and [path.read_bytes() for path in kept] == before


def test_minutes_count_from_the_start(monkeypatch):
    clock = iter(range(0, 10**6, 20))  # every look at the clock is 20 seconds later
    monkeypatch.setattr(runs.time, "monotonic", lambda: float(next(clock)))
    first = toy.train(tiny("run", steps=10**6, minutes=3, log_every=10**6))
    again = toy.train(resumed(Path("run"), "--minutes", 3))
    more = toy.train(resumed(Path("run"), "--minutes", 6))
    assert 0 < first["steps"] == again["steps"] < more["steps"] < 60


def test_same_seed_same_run_other_seed_not(tmp_path):
    for name, seed in dict(a=0, b=0, c=1).items():
        toy.train(tiny(name, seed=seed))
    assert_same_run(tmp_path / "a", tmp_path / "b")
    assert log(tmp_path / "a") != log(tmp_path / "c")


# -- kills, Ctrl-C and SIGTERM ---------------------------------------------------------------------


def test_twenty_kills(tmp_path, context):
    """SIGKILL up to three steps and 10 ms after the start; checkpoints are written all the time."""
    moments, steps, run = random.Random(0), 400, tmp_path / "run"
    config = tiny(run, steps=steps)
    unbroken = Child(context, tmp_path / "a", main_with, tiny(tmp_path / "whole", steps=steps))
    lines, saved = run / "metrics.jsonl", run / "checkpoint.pt"
    reached = []
    for kill in range(20):
        child = Child(context, tmp_path / "b", main_with, config, "save always")
        wait_for(saved.exists)
        if more := moments.randrange(4):
            target = checkpoint(run)["step"] + more
            # The process cuts the log to the checkpoint's length, then adds to it.
            wait_for(lambda target=target: num_lines(lines) >= target)
        time.sleep(moments.uniform(0, 0.01))
        child.signal(signal.SIGKILL)
        status, printed = child.wait()
        assert status == -signal.SIGKILL, f"kill {kill}: {status}\n{printed}"
        reached.append(checkpoint(run)["step"])
        strict((run / "config.json").read_text())
        config = tiny(resume=run, steps=steps)
    assert reached == sorted(reached) and 10 <= reached[-1] < steps, reached
    assert unbroken.wait()[0] == 0
    status, printed = Child(context, tmp_path / "b", main_with, config).wait()
    assert status == 0, printed
    assert_same_run(run, tmp_path / "whole")
    assert [record["step"] for record in log(run)] == list(range(1, steps + 1))
    assert not list(run.rglob("*.tmp"))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_and_says_how_to_continue(tmp_path, context, number):
    child = Child(context, tmp_path / "a", main_with, tiny(tmp_path / "run", steps=10**6))
    wait_for(lambda: num_lines(tmp_path / "run" / "metrics.jsonl") > 2)
    child.signal(number)
    status, printed = child.wait()
    step = checkpoint(tmp_path / "run")["step"]
    assert status == 130 and "Traceback" not in printed
    assert printed.endswith(
        f"toy.py: stopped after step {step}; continue with --resume {tmp_path / 'run'}\n"
    )
    assert len(log(tmp_path / "run")) == step
    toy.train(resumed(tmp_path / "run", "--steps", step + 1))
    assert len(log(tmp_path / "run")) == step + 1


def stuck_step(config: toy.Config) -> None:
    def loss(*_):
        Path("stuck").touch()
        while True:  # a signal just before a long sleep would wait for its end
            time.sleep(0.1)

    toy.Toy.loss = loss
    main_with(config)


def test_a_second_signal_acts_at_once(tmp_path, context):
    child = Child(context, tmp_path / "a", stuck_step, tiny(tmp_path / "run"))
    wait_for((tmp_path / "a" / "stuck").exists)
    child.signal(signal.SIGINT)
    wait_for(lambda: "stopping" in child.printed.read_text())
    child.signal(signal.SIGINT)
    status, printed = child.wait(20)
    assert status == 130 and "Traceback" not in printed, printed


def test_signal_handlers_are_given_back():
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    toy.train(tiny("run", steps=1))
    assert before == [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]


def test_training_in_a_thread(tmp_path):
    thread = threading.Thread(target=toy.train, args=[tiny(tmp_path / "run", steps=2)])
    thread.start()
    thread.join()
    assert checkpoint(tmp_path / "run")["step"] == 2


# -- one folder, one run ---------------------------------------------------------------------------


def test_default_folders_are_numbered(tmp_path):
    for expected in ("toy-quick-0", "toy-quick-0-2", "toy-quick-0-3"):
        toy.train(tiny(steps=1))
        assert checkpoint(tmp_path / "runs" / expected)["step"] == 1


def test_out_of_another_run_is_refused():
    toy.train(tiny("run", steps=1))
    with pytest.raises(runs.UserError, match="run holds another run; name another --out"):
        toy.train(tiny("run", steps=1))


def test_two_runs_at_once_get_two_folders(tmp_path, context):
    children = [Child(context, tmp_path, main_with, tiny(steps=40)) for _ in range(2)]
    assert [child.wait()[0] for child in children] == [0, 0]
    for name in ("toy-quick-0", "toy-quick-0-2"):
        assert [record["step"] for record in log(tmp_path / "runs" / name)] == list(range(1, 41))


def test_a_run_that_is_training_cannot_be_resumed(tmp_path, context):
    """But evaluated; and a killed one can be resumed: its lock died with it."""
    run = tmp_path / "run"
    child = Child(context, tmp_path / "a", main_with, tiny(run, steps=10**6))
    wait_for(lambda: num_lines(run / "metrics.jsonl") > 2)
    with pytest.raises(runs.UserError, match="another process is training this run"):
        toy.train(resumed(run))
    toy.train(resumed(run, "--eval-only"))
    child.signal(signal.SIGKILL)
    child.wait()
    step = checkpoint(run)["step"]
    assert toy.train(resumed(run, "--steps", step + 2))["steps"] == step + 2


def test_killed_before_the_first_checkpoint_the_same_command_works_again():
    checkpoints.open_folder(tiny("run"), "toy")[1].release()
    assert toy.train(tiny("run", steps=2))["steps"] == 2


@pytest.mark.parametrize("where", ["file", "file/below", "/proc/none/run"])
def test_a_folder_that_cannot_be_written(where):
    Path("file").touch()
    with pytest.raises(OSError, match=where.split("/")[0] or "proc"):
        toy.train(tiny(where))


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
@pytest.mark.parametrize("name", ["checkpoint.pt.tmp", "config.json.tmp", "metrics.jsonl"])
def test_a_full_disk_is_one_line(monkeypatch, capsys, name):
    Path("run").mkdir()
    Path("run", name).symlink_to("/dev/full")
    if name == "metrics.jsonl":  # the run makes its own at the start: full from then on
        monkeypatch.setattr(runs, "read_log", lambda *_, **__: [])
    status, _, error = command_line(monkeypatch, capsys, toy, "--out", "run")
    assert status == 2 and "no space left" in error.lower() and len(error.splitlines()) == 1
    assert name == "metrics.jsonl" or not Path("run", name).is_symlink()


def test_a_full_gpu_is_one_line(monkeypatch, capsys):
    def train(config):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")

    monkeypatch.setattr(toy, "train", train)
    status, _, error = command_line(monkeypatch, capsys, toy)
    assert status == 2 and error == "toy.py: CUDA out of memory. Tried to allocate 20.00 MiB.\n"


def test_writing_is_all_or_nothing(monkeypatch):
    path = Path("config.json")
    checkpoints.write(path, b"old")
    monkeypatch.setattr(Path, "replace", lambda *_: (_ for _ in ()).throw(OSError("no")))
    with pytest.raises(OSError):
        checkpoints.write(path, b"new")
    assert path.read_bytes() == b"old" and list(Path().iterdir()) == [path]


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


# -- checkpoints -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The folder of a run of one step, for reading only."""
    folder = tmp_path_factory.mktemp("trained") / "run"
    toy.train(tiny(folder, steps=1))
    return folder


def test_what_a_checkpoint_holds(trained):
    content = checkpoint(trained)  # with weights_only=True
    assert content.keys() == {"format", "model_name", "config", "model", "optimizer", "step",
                              "minutes", "skipped"}
    assert toy.Config(**content["config"]) == tiny(trained, steps=1)
    model = toy.load_model(trained)
    assert same(dict(model.state_dict()), dict(content["model"])) and not model.training


def test_fields_that_a_checkpoint_lacks_get_their_defaults(trained, tmp_path):
    content = checkpoint(trained)
    del content["config"]["bias"], content["minutes"]
    torch.save(content, tmp_path / "old.pt")
    assert resumed(tmp_path / "old.pt", "--eval-only").bias is True
    toy.train(resumed(tmp_path / "old.pt", "--eval-only"))
    content["config"]["novel"] = 1
    torch.save(content, tmp_path / "old.pt")
    with pytest.raises(runs.UserError, match=r"another version's \(novel\)"):
        resumed(tmp_path / "old.pt", "--eval-only")


def damaged(content: dict, good: bytes, path: Path) -> dict[str, tuple]:
    """name -> (how it is written, what the message must say)."""
    save = functools.partial(torch.save, f=path)
    cases = {
        "missing": (lambda: None, "no such checkpoint"),
        "text": (lambda: path.write_text("loss 1.0\n" * 99), "not a readable checkpoint"),
        "object": (lambda: save(types.SimpleNamespace(a=1)), "not a readable checkpoint"),
        "tensor": (lambda: save(torch.ones(3)), "not a readable checkpoint"),
        "state_dict": (lambda: save(content["model"]), "not a readable checkpoint"),
        "format": (lambda: save({**content, "format": "1"}), "not of toy.py in format 1"),
        "newer": (lambda: save({**content, "format": checkpoints.FORMAT + 1}), "in format 2, not"),
        "other": (lambda: save({**content, "model_name": "air"}), "a checkpoint of air.py"),
        "folder": (path.mkdir, "no such checkpoint"),
    }
    for length in (0, 4, len(good) // 2, len(good) - 1):
        cases[f"cut{length}"] = (
            lambda length=length: path.write_bytes(good[:length]), "not a readable checkpoint"
        )
    return cases


def test_checkpoints_that_are_none(trained, tmp_path, recwarn):
    good = (trained / "checkpoint.pt").read_bytes()
    for name in damaged({"model": 0}, good, tmp_path):
        path = tmp_path / f"{name}.pt"
        write, message = damaged(checkpoint(trained), good, path)[name]
        write()
        for load in (toy.load_model, resumed):
            with pytest.raises(runs.UserError) as error:
                load(path)
            assert message in str(error.value) and str(path) in str(error.value), name
            assert "\n" not in str(error.value), name
    assert not recwarn.list


def test_tensors_that_do_not_fit(trained, tmp_path):
    content = checkpoint(trained)
    content["model"].pop("free")
    torch.save(content, tmp_path / "a.pt")
    with pytest.raises(runs.UserError, match=r"do not fit this model .*free") as error:
        toy.load_model(tmp_path / "a.pt")
    assert "\n" not in str(error.value)


def test_weights_alone_are_for_evaluation(trained, tmp_path):
    content = checkpoint(trained)
    del content["optimizer"]
    torch.save(content, tmp_path / "weights.pt")
    result = toy.train(resumed(tmp_path / "weights.pt", "--eval-only"))
    assert result["metrics"] == toy.train(resumed(trained, "--eval-only"))["metrics"]
    assert Path("runs/toy-quick-0/evaluation.json").exists()  # not beside the weights
    with pytest.raises(runs.UserError, match="weights alone"):
        resumed(tmp_path / "weights.pt")


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


def test_two_processes_are_one(tmp_path, context):
    """Parameters after six steps of Adam, and the log, of half the scenes each; rank 0 writes."""
    config = tiny("run", batch_size=8)
    alone = Child(context, tmp_path / "alone", main_with, config)
    ranks = start_ranks(context, tmp_path, main_with, config)
    for child in (alone, *ranks):
        status, printed = child.wait()
        assert status == 0, printed
    a, b = (checkpoint(tmp_path / name / "run")["model"] for name in ("alone", "rank0"))
    for name, value in a.items():
        torch.testing.assert_close(b[name], value, rtol=1e-4, atol=1e-5, msg=name)
    for mine, other in zip(*(log(tmp_path / n / "run") for n in ("alone", "rank0")), strict=True):
        assert mine.keys() >= {"step", "loss", "mse", "brightness", "grad_norm", "lr"}
        for name, value in mine.items():
            assert math.isclose(other[name], value, rel_tol=1e-4), name
    assert not list((tmp_path / "rank1").iterdir()) and ranks[1].printed.read_text() == ""


def test_a_signal_in_one_process_stops_all(context, tmp_path):
    """At the same step, with a checkpoint; only the first process speaks."""
    children = start_ranks(context, tmp_path, main_with, tiny("run", steps=10**6))
    run = tmp_path / "rank0" / "run"
    wait_for(lambda: num_lines(run / "metrics.jsonl") > 1)
    children[1].signal(signal.SIGTERM)
    results = [child.wait(30) for child in children]
    assert [status for status, _ in results] == [130, 130], results
    step = checkpoint(run)["step"]
    assert f"stopped after step {step};" in results[0][1] and results[1][1] == ""
    assert len(log(run)) == step


def test_a_log_without_scores_has_nothing_to_average(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    processes.average([])


def fast_clock(config: toy.Config) -> None:
    """Trains; rank 1 believes that time runs a hundred times as fast."""
    if processes.rank():
        runs.time = types.SimpleNamespace(monotonic=lambda: 100 * time.monotonic())
    toy.train(config)


def test_the_process_group_ends_with_the_training(monkeypatch):
    ended = []
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "destroy_process_group", lambda: ended.append(True))
    toy.train(tiny())
    assert ended == [True]


def test_processes_agree_on_when_the_time_is_up(context, tmp_path):
    """A process that trained on alone would wait for the others forever."""
    children = start_ranks(context, tmp_path, fast_clock, tiny("run", steps=10**6, minutes=0.01))
    for child in children:
        status, printed = child.wait(30)
        assert status == 0, printed


def less_used(config: toy.Config) -> None:
    """Trains; in rank 1 no gradient reaches one of the parameters, as where no object is found."""
    total = toy.Toy.loss

    def loss(model, image, noise, weight):
        parts = total(model, image, noise, weight)
        return parts | (dict(loss=parts["mse"]) if processes.rank() else {})

    toy.Toy.loss = loss
    toy.train(config)


def test_processes_may_use_other_parameters(context, tmp_path):
    for child in start_ranks(context, tmp_path, less_used, tiny("run")):
        status, printed = child.wait(30)
        assert status == 0, printed
    content = checkpoint(tmp_path / "rank0" / "run")
    assert (content["model"]["free"] != 1).all()
    assert len(content["optimizer"]["state"]) == 7  # not of `unused`, which no process has used


# -- gradients that are not finite -----------------------------------------------------------------


def test_a_gradient_that_is_not_finite_changes_nothing():
    toy.train(tiny("bad", steps=3, nan_steps=(2,)))
    toy.train(tiny("good", steps=2))
    bad, good = checkpoint(Path("bad")), checkpoint(Path("good"))
    assert same(bad["model"], good["model"])
    assert same(bad["optimizer"]["state"], good["optimizer"]["state"])  # not even decayed
    assert (bad["step"], bad["skipped"], good["step"], good["skipped"]) == (3, 1, 2, 0)
    assert log(Path("bad"))[2]["loss"] is None  # strict JSON


def test_a_second_group_may_be_the_one(monkeypatch):
    def loss(model, image, noise, weight):
        parts = total(model, image, noise, torch.ones(()))
        return parts | dict(loss=parts["loss"] + (weight - 1) * model.free.sum())

    total = toy.Toy.loss
    monkeypatch.setattr(toy.Toy, "loss", loss)
    toy.train(tiny("bad", steps=3, nan_steps=(2,)))
    toy.train(tiny("good", steps=2))
    assert same(checkpoint(Path("bad"))["model"], checkpoint(Path("good"))["model"])


def test_finite_gradients_whose_norm_overflows_change_nothing(monkeypatch):
    def loss(model, image, noise, weight):
        parts = total(model, image, noise, torch.ones(()))
        huge = 1e30 if weight.isnan() else 0.0
        return parts | dict(loss=parts["loss"] + huge * model.layers[0].bias.sum())

    total = toy.Toy.loss
    monkeypatch.setattr(toy.Toy, "loss", loss)
    toy.train(tiny("bad", steps=3, nan_steps=(2,)))
    toy.train(tiny("good", steps=2))
    assert same(checkpoint(Path("bad"))["model"], checkpoint(Path("good"))["model"])


def test_ten_in_a_row_stop_the_run():
    toy.train(tiny("nine", steps=20, nan_steps=(*range(1, 10), *range(11, 20))))
    with pytest.raises(runs.UserError, match=r"step 13: 10 gradients in a row .*nan.*run"):
        toy.train(tiny("run", steps=50, nan_steps=tuple(range(3, 50))))


def test_the_warm_up_of_a_graph_leaves_no_trace(monkeypatch):
    """Here the capture runs, and stands for the first replay."""

    class Counter(toy.Toy):
        def loss(self, image):
            self.calls += 1
            return dict(loss=self.free.square().sum() + image.sum())

    stream = types.SimpleNamespace(wait_stream=lambda other: None)
    for name, value in dict(
        Stream=lambda: stream, current_stream=lambda: stream, stream=contextlib.nullcontext,
        graph=contextlib.nullcontext, CUDAGraph=lambda: types.SimpleNamespace(replay=lambda: None),
    ).items():
        monkeypatch.setattr(torch.cuda, name, value)
    model = Counter(tiny())
    model.register_buffer("calls", torch.zeros(()))
    optimizer = torch.optim.Adam(model.parameters())
    run = runs.Run("toy", tiny(cuda_graph=True), "", model, optimizer, torch.device("cpu"))
    run.update(model.loss, torch.ones(1), lr=0.1)
    assert model.calls == 1 and run.graph


# -- what a run says about itself ------------------------------------------------------------------


def test_evaluation_log_and_print(capsys):
    result = toy.train(tiny("two words", steps=2, lr=np.float32(0.25), sizes=[np.int32(5)],
                           bias=False))
    evaluation = strict(Path("two words/evaluation.json").read_text())
    assert evaluation == strict(json.dumps(result))
    assert evaluation.keys() == {"model", "preset", "command", "seed", "steps", "minutes",
                                 "skipped", "device", "versions", "commit", "date", "metrics"}
    assert evaluation["command"] == (
        "python toy.py --steps 2 --lr 0.25 --sizes 5 --no-bias"
    )
    again = toy.train(resumed(Path("two words"), "--eval-only"))
    assert again["command"] == evaluation["command"]  # the run's own, wherever it is kept
    printed = capsys.readouterr().out.splitlines()
    assert printed[0] == "Toy, 34 parameters" and printed[4].startswith("  kernels  none")
    assert printed[2] == f"  command  {evaluation['command']}"
    assert sum(line.startswith("step ") for line in printed) == 2
    assert printed[-2].startswith("reached  mse ") and printed[-1].startswith("look at  two words")
    record = strict(Path("two words/metrics.jsonl").read_text().splitlines()[1])
    assert record["lr"] == pytest.approx(0.225) and record["seconds_per_step"] > 0


def test_the_typed_command_is_the_run(monkeypatch, capsys):
    for config in (tiny(), tiny("a b", sizes=(2, 2), bias=False, nan_steps=()),
                   toy.make_config("long", seed=3)):
        command = runs.typed("toy", config, toy.make_config(config.preset))
        assert parse(*runs.shlex.split(command)[2:]) == config


def test_floors_are_printed_beside_the_score(monkeypatch, capsys):
    monkeypatch.setattr(runs, "RESULTS", Path())
    scores = dict(floors=dict(one_hue=dict(mse=dict(mean=0.5), other=dict(mean=1))))
    Path("floors-mini_sprites.json").write_text(json.dumps(scores))
    toy.train(tiny("run", steps=1))
    assert "floor    mse 0.5 (one hue)" in capsys.readouterr().out.splitlines()


def test_a_bar_in_a_terminal(monkeypatch, capsys):
    """Then the log is the same, and nothing is printed line by line."""
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    monkeypatch.setattr(runs, "tqdm", functools.partial(runs.tqdm, mininterval=0))
    toy.train(tiny("run", steps=3))
    printed = capsys.readouterr()
    assert "step 1" not in printed.out and "3/3" in printed.err and "loss" in printed.err
    assert [record["step"] for record in log(Path("run"))] == [1, 2, 3]


def test_a_closed_stream():
    """`2>&-`"""
    command = f"{sys.executable} {ROOT / 'tests' / 'toy.py'} --steps 1 --out a"
    environment = os.environ | dict(PYTHONPATH=str(ROOT), OMP_NUM_THREADS="1")
    done = subprocess.run(f"{command} 2>&-", shell=True, env=environment, capture_output=True)
    assert done.returncode == 0 and b"look at  a/" in done.stdout, done
    done = subprocess.run(f"{command} 2>&-", shell=True, env=environment, capture_output=True)
    assert done.returncode == 2 and b"holds another run" in done.stdout, done


@pytest.mark.skipif(not shutil.which("git"), reason="needs git")
def test_commit(tmp_path, monkeypatch):
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    monkeypatch.setattr(processes, "ROOT", tmp_path)
    assert processes.commit() is None  # not a repository
    names = [f"{option}=x" for option in ("user.name", "user.email")]
    git = ["git", "-C", str(tmp_path), *(part for name in names for part in ("-c", name))]
    subprocess.run([*git, "init", "-q"], check=True)
    (tmp_path / "file").write_text("1")
    subprocess.run([*git, "add", "file"], check=True)
    subprocess.run([*git, "commit", "-q", "-m", "x"], check=True)
    clean = processes.commit()
    assert clean and not clean.endswith("-dirty")
    (tmp_path / "file").write_text("2")
    assert processes.commit() == f"{clean}-dirty"
    (tmp_path / "copy").mkdir()
    monkeypatch.setattr(processes, "ROOT", tmp_path / "copy")  # in another project's repository
    assert processes.commit() is None
    monkeypatch.setenv("PATH", "")
    assert processes.commit() is None  # no git at all


# -- options ---------------------------------------------------------------------------------------

IMPOSSIBLE = {
    "--batch-size 0": "--batch-size must be at least 1, not 0",
    "--steps 0": "--steps must be at least 1, not 0",
    "--lr 0": "--lr must be larger than 0, not 0",
    "--lr nan": "--lr must be larger than 0, not nan",
    "--lr inf": "--lr must be larger than 0, not inf",
    "--minutes inf": "--minutes must be at least 0, not inf",
    "--minutes -1": "--minutes must be at least 0, not -1",
    "--seed 99999999999999999999": "--seed must fit into 64 bits",
    "--device nonsense": "--device nonsense: not available here",
    "--device cpu --cuda-graph": "--cuda-graph needs a CUDA device",
    "--eval-only": "--eval-only needs --resume",
    "--preset nonsense": "unknown preset 'nonsense': choose from quick, long",
    "--resume nowhere": "nowhere: no such checkpoint",
}


@pytest.mark.parametrize("line", IMPOSSIBLE)
def test_what_cannot_be_is_refused_in_one_line(monkeypatch, capsys, line):
    status, out, error = command_line(monkeypatch, capsys, toy, *line.split())
    assert status == 2 and out == "" and IMPOSSIBLE[line] in error
    assert len(error.splitlines()) == 1 and error.startswith("toy.py: ")
    assert not list(Path().iterdir())


def test_a_batch_that_does_not_divide(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(runs.UserError, match="--batch-size 4 does not divide among 3"):
        runs.check(tiny())


def test_resume_keeps_the_settings_of_the_checkpoint(trained):
    config = resumed(trained, "--steps", 9, "--log-every", 3, "--out", "~/x")
    assert (config.steps, config.log_every, config.lr) == (9, 3, 0.01)
    assert config.out == str(Path.home() / "x")
    for line in ("--lr 1", "--seed 1", "--no-bias", "--preset long"):
        with pytest.raises(runs.UserError, match="only a new run can change it"):
            resumed(trained, *line.split())


def test_a_run_begins_with_the_weights_of_another(trained, tmp_path, monkeypatch, capsys):
    """Not with its step, optimizer or settings; a second time with the run's own checkpoint."""
    config = parse("--init", trained, "--lr", 1e-30, "--steps", 2, "--seed", 5, "--out", "a")
    assert toy.train(config)["steps"] == 2
    before, after = checkpoint(trained)["model"], checkpoint(Path("a"))["model"]
    assert all(torch.allclose(before[name], after[name]) for name in before if name != "free")
    toy.train(resumed(Path("a"), "--steps", 3))
    assert checkpoint(Path("a"))["step"] == 3
    status, _, error = command_line(monkeypatch, capsys, toy, "--init", "nowhere")
    assert status == 2 and error == "toy.py: nowhere: no such checkpoint\n"
    with monkeypatch.context() as patch:  # a preset's `init` is in the repository, whatever is here
        patch.setattr(processes, "ROOT", trained.parent)
        toy.train(parse("--init", trained.name, "--lr", 1e-30, "--steps", 1, "--out", "b"))
    shutil.rmtree("b")
    status, _, error = command_line(monkeypatch, capsys, toy, "--init", trained, "--sizes", 3, 5)
    assert status == 2 and "its tensors do not fit this model" in error
    assert sorted(path.name for path in Path().iterdir()) == ["a"]


def test_bounds_of_numbers():
    config = types.SimpleNamespace(a_b=(2, 0), c=float("nan"), d=())
    for check, message in {
        lambda: runs.at_least(config, 1, "a_b"): "--a-b must be at least 1, not",
        lambda: runs.at_least(config, 0, "d"): "--d must be at least 0, not",
        lambda: runs.positive(config, "c"): "--c must be larger than 0, not nan",
    }.items():
        with pytest.raises(runs.UserError, match=message):
            check()
    runs.at_least(config, 0, "a_b")


def test_help_explains_every_field_and_every_preset(monkeypatch, capsys):
    status, out, _ = command_line(monkeypatch, capsys, toy, "--preset", "long", "--help")
    assert status == 0 and "no result in this repository yet" in " ".join(out.split())
    assert "default: 100" in out
    for field in runs.dataclasses.fields(toy.Config):
        assert re.search(rf"{runs.option(field.name)}[ ,]", out), field.name


def test_errors_that_are_ours_are_not_hidden(monkeypatch, capsys):
    def train(config):
        raise RuntimeError("a bug")

    monkeypatch.setattr(toy, "train", train)
    with pytest.raises(RuntimeError, match="a bug"):
        command_line(monkeypatch, capsys, toy)


def test_number_formats_follow_precision():
    backends = torch.backends.cuda.matmul, torch.backends.cudnn
    before = [backend.allow_tf32 for backend in backends]
    try:
        for precision, allowed in (("tf32", True), ("float32", False), ("bfloat16", False)):
            assert runs.set_up(tiny(precision=precision, device="cpu")).type == "cpu"
            assert [backend.allow_tf32 for backend in backends] == [allowed, allowed]
    finally:
        for backend, allowed in zip(backends, before, strict=True):
            backend.allow_tf32 = allowed
