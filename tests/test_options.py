"""The command line: what is refused, and how; what overrides what; what --help says.

Everything goes through `options.main`, as `python iodine.py` does, in this process.
"""

import contextlib
import dataclasses
import functools
import re
import sys
import typing
from pathlib import Path

import pytest
import torch

import iodine
import kernels
from data import options, runs

TINY = [
    *["--num-slots", "3", "--latent-size", "4", "--decoder-channels", "4", "4", "--num-steps", "2"],
    *["--refinement-channels", "4", "4", "--mlp-sizes", "8", "--batch-size", "4", "--steps", "1"],
    *["--log-every", "1", "--device", "cpu", "--kernels", "torch"],
]
COMMON = {
    "preset", "variant", "seed", "steps", "minutes", "batch_size", "lr", "device", "precision",
    "compile", "cuda_graph", "kernels", "out", "resume", "eval_only", "experiment", "log_every",
}  # fmt: skip
CUDA = torch.cuda.is_available()
CHOICES = [(preset, variant) for preset in iodine.PRESETS for variant in ("paper", "released")]


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    """An empty working folder; no torchrun, no Triton interpreter, no slow evaluation."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    for name in ("TRITON_INTERPRET", "RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.setattr(iodine, "evaluate", functools.partial(iodine.evaluate, count=4))
    monkeypatch.setattr(iodine, "draw", lambda *_: None)
    with kernels.use("auto"):
        yield tmp_path / "here"


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The folder of a run of one step, for reading only."""
    folder = tmp_path_factory.mktemp("trained") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(iodine, "evaluate", functools.partial(iodine.evaluate, count=4))
        patch.setattr(iodine, "draw", lambda *_: None)
        iodine.train(parse(*TINY, "--out", folder))
    return folder


def parse(*arguments: object) -> iodine.Config:
    line = [str(argument) for argument in arguments]
    return options.parse(iodine.Config, iodine.make_config, iodine.load, line)


def refused(monkeypatch, capsys, *arguments: object, train: bool = False) -> str:
    """What `python iodine.py ARGUMENTS` prints before it ends with status 2, having done nothing.

    With `train` it may go as far as opening its folder; else that it asks for a device is too far.
    """
    if not train:
        monkeypatch.setattr(runs, "set_up", lambda config: pytest.fail("this would have trained"))
    monkeypatch.setattr(sys, "argv", ["/some/where/iodine.py", *map(str, arguments)])
    before = {path: path.read_bytes() for path in Path().rglob("*") if path.is_file()}
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        options.main(iodine.Config, iodine.make_config, iodine.load, iodine.train)
    printed = capsys.readouterr()
    assert stop.value.code == 2
    assert "Traceback" not in printed.out + printed.err
    assert {path: path.read_bytes() for path in Path().rglob("*") if path.is_file()} == before
    assert printed.out == ""
    return printed.err


def refused_in_one_line(monkeypatch, capsys, *arguments: object, train: bool = False) -> str:
    printed = refused(monkeypatch, capsys, *arguments, train=train)
    assert printed.count("\n") == 1 and printed.startswith("iodine.py: "), printed
    return printed.removeprefix("iodine.py: ").strip()


# -- what is refused -------------------------------------------------------------------------------

# The command line -> what its one line says.
IMPOSSIBLE = {
    "--preset nonsense": "unknown preset 'nonsense': choose from quick, tetrominoes",
    "--preset=nonsense --lr 1e-3": "unknown preset 'nonsense'",
    "--variant nonsense": "unknown variant 'nonsense': choose",
    "--dataset nonsense": "unknown dataset 'nonsense'; choose from mini_sprites",
    "--num-slots 0": "--num-slots must be at least 1, not 0",
    "--num-steps 0": "--num-steps must be at least 1, not 0",
    "--batch-size 0": "--batch-size must be at least 1, not 0",
    "--steps 0": "--steps must be at least 1, not 0",
    "--log-every 0": "--log-every must be at least 1, not 0",
    "--latent-size -1": "--latent-size must be at least 1, not -1",
    "--decoder-channels 8 0": "--decoder-channels must be at least 1, not (8, 0)",
    "--decoder-channels": "--decoder-channels must be at least 1",
    "--refinement-stride 0": "--refinement-stride must be at least 1, not 0",
    "--lr-horizon 0": "--lr-horizon must be at least 1, not 0",
    "--sigma 0": "--sigma must be larger than 0, not 0",
    "--sigma nan": "--sigma must be",
    "--prior-variance inf": "--prior-variance must be",
    "--clip -1": "--clip must be larger than 0, not -1",
    "--lr 0": "--lr must be larger than 0, not 0",
    "--lr -1e-3": "--lr must be larger than 0, not -0.001",
    "--minutes -1": "--minutes must be 0 or more, not -1",
    "--minutes nan": "--minutes must be",
    "--decoder-kernel 4": "--decoder-kernel must be odd, not 4",
    "--refinement-kernel 2": "--refinement-kernel must be odd, not 2",
    "--decoder-kernel 17": "--decoder-kernel 17: images are 16 pixels",
    "--preset shapes --decoder-kernel 29": "--decoder-kernel 29: images are 28 pixels",
    "--drop-inputs nonsense": "--drop-inputs nonsense: choose from image, means",
    "--drop-inputs image nonsense": "--drop-inputs nonsense: choose",
    "--device nonsense": "--device nonsense: not available here",
    "--device cpu --cuda-graph": "--cuda-graph needs a CUDA device",
    "--eval-only": "--eval-only needs --resume",
    "--experiment factors": "--experiment needs --resume",
    "--experiment nonsense": "--experiment",
    "--resume nowhere": "nowhere: no such checkpoint",
    "--resume nowhere/checkpoint.pt --lr 1": "nowhere/checkpoint.pt: no such checkpoint",
    "--resume .": "no such checkpoint",
}
# Unchecked, these end in a traceback deep inside, or train what is no model, or write what is no
# JSON. The line names the option.
IMPOSSIBLE |= {
    "--lstm-size -1": "--lstm-size",
    "--initial-std -1": "--initial-std",
    "--kl-weight nan": "--kl-weight",
    "--kl-weight -1": "--kl-weight",
    "--beta1 1": "--beta1",
    "--beta1 -0.5": "--beta1",
    "--lr-warmup -1": "--lr-warmup",
    "--lr-reference-batch -1": "--lr-reference-batch",
    "--posterior-epsilon -1": "--posterior-epsilon",
    "--coordinate-gain inf": "--coordinate-gain",
    "--forget-bias nan": "--forget-bias",
    "--checkpoint-seconds nan": "--checkpoint-seconds",
    "--minutes inf": "--minutes",
    "--seed 99999999999999999999": "--seed",
}


@pytest.mark.parametrize("line", IMPOSSIBLE)
def test_what_cannot_be_is_refused_in_one_line(monkeypatch, capsys, line):
    assert IMPOSSIBLE[line] in refused_in_one_line(monkeypatch, capsys, *line.split())


@pytest.mark.skipif(CUDA, reason="there is a CUDA device here")
@pytest.mark.parametrize("line", ["--device cuda", "--device cuda:1", "--cuda-graph"])
def test_cuda_where_there_is_none(monkeypatch, capsys, line):
    assert line.split()[0] in refused_in_one_line(monkeypatch, capsys, *line.split())


@pytest.mark.skipif(CUDA, reason="there is a CUDA device here")
def test_triton_where_it_cannot_run(monkeypatch, capsys):
    message = refused_in_one_line(monkeypatch, capsys, "--kernels", "triton")
    assert "triton" in message
    assert kernels.backend() == "torch"


@pytest.mark.parametrize(
    "line",
    ["--nonsense 1", "--lr", "--lr fast", "--steps 1.5", "--precision float8", "--preset",
     "--kernels none", "--compile maybe", "quick", "--learning-rate 1"],
)  # fmt: skip
def test_what_does_not_parse(monkeypatch, capsys, line):
    """tyro says what is wrong with it, in a box."""
    printed = refused(monkeypatch, capsys, *line.split())
    assert line.split()[-1] in printed or line.split()[0] in printed


def test_wrong_batch_for_torchrun(monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "3")
    message = refused_in_one_line(monkeypatch, capsys, "--batch-size", 4)
    assert message == "--batch-size 4 does not divide among 3 processes"


def test_out_of_another_run(monkeypatch, capsys, trained):
    before = {p: p.read_bytes() for p in trained.rglob("*") if p.is_file()}
    line = [*TINY, "--out", trained]
    message = refused_in_one_line(monkeypatch, capsys, *line, train=True)
    assert f"{trained} holds another run" in message
    assert {p: p.read_bytes() for p in trained.rglob("*") if p.is_file()} == before


def test_out_that_cannot_be_written(monkeypatch, capsys):
    Path("file").write_text("in the way")
    line = [*TINY, "--out", "file/run"]
    message = refused_in_one_line(monkeypatch, capsys, *line, train=True)
    assert "cannot write to file/run" in message


def test_no_traceback_on_ctrl_c(monkeypatch, capsys):
    def interrupted(config):
        raise KeyboardInterrupt("stopped after step 3")

    monkeypatch.setattr(sys, "argv", ["iodine.py"])
    with pytest.raises(SystemExit) as stop:
        options.main(iodine.Config, iodine.make_config, iodine.load, interrupted)
    assert stop.value.code == 130
    assert capsys.readouterr().err == "iodine.py: stopped after step 3\n"


def test_other_errors_are_not_hidden(monkeypatch):
    """A defect of ours keeps its traceback."""

    def broken(config):
        raise ZeroDivisionError

    monkeypatch.setattr(sys, "argv", ["iodine.py"])
    with pytest.raises(ZeroDivisionError):
        options.main(iodine.Config, iodine.make_config, iodine.load, broken)


# -- resume ----------------------------------------------------------------------------------------


def damaged(trained: Path, how: str) -> Path:
    """A file in the working folder that is no good checkpoint."""
    path, good = Path("bad.pt"), trained / "checkpoint.pt"
    content = torch.load(good, weights_only=True)
    if how == "truncated":
        path.write_bytes(good.read_bytes()[:-2000])
    elif how == "text":
        path.write_text("no checkpoint")
    elif how == "foreign":
        torch.save(content["model"], path)
    elif how == "newer":
        torch.save({**content, "format": content["format"] + 1}, path)
    elif how == "other model":
        torch.save({**content, "model_name": "air"}, path)
    elif how == "other fields":
        config = {k: v for k, v in content["config"].items() if k != "sigma"} | dict(tau=1)
        torch.save({**content, "config": config}, path)
    return path


@pytest.mark.parametrize(
    ("how", "message"),
    [("truncated", "not a readable checkpoint"), ("text", "not a readable checkpoint"),
     ("foreign", "not a checkpoint of this repository"), ("newer", "newer than this code"),
     ("other model", "a checkpoint of air.py, not iodine.py"),
     ("other fields", "its settings are another version's (sigma, tau)")],
)  # fmt: skip
def test_resume_what_is_no_checkpoint(monkeypatch, capsys, trained, how, message):
    path = damaged(trained, how)
    printed = refused_in_one_line(monkeypatch, capsys, "--resume", path)
    assert message in printed and str(path) in printed


@pytest.mark.parametrize(
    ("option", "value", "saved"),
    [("--lr", 0.5, 0.003), ("--batch-size", 8, 4), ("--num-slots", 4, 3), ("--seed", 1, 0),
     ("--preset", "shapes", "quick"), ("--variant", "released", "paper"),
     ("--dataset", "shapes", "mini_sprites"), ("--precision", "bfloat16", "float32"),
     ("--sigma", 0.5, 0.4)],
)  # fmt: skip
def test_resume_with_other_settings(monkeypatch, capsys, trained, option, value, saved):
    """The line names the option and both values."""
    for line in (["--resume", trained, option, value], [f"{option}={value}", "--resume", trained]):
        message = refused_in_one_line(monkeypatch, capsys, *line)
        assert message.startswith(f"{option} {value}") and str(saved) in message


def test_resume_with_an_unknown_experiment(monkeypatch, capsys, trained):
    line = ["--resume", trained, "--experiment", "nonsense"]
    message = refused_in_one_line(monkeypatch, capsys, *line)
    assert message.startswith("unknown experiment 'nonsense'")
    assert all(name in message for name in iodine.EXPERIMENTS)


def test_resume_takes_the_settings_of_the_checkpoint(trained):
    saved = torch.load(trained / "checkpoint.pt", weights_only=True)["config"]
    expected = saved | dict(out="", resume=str(trained))
    assert dataclasses.asdict(parse("--resume", trained)) == expected
    for line in (["--resume", trained, "--steps", 9], ["--steps", 9, f"--resume={trained}"]):
        assert dataclasses.asdict(parse(*line)) == expected | dict(steps=9)
    assert parse("--resume", trained / "checkpoint.pt").latent_size == 4
    assert parse("--resume", trained, "--lr", saved["lr"]).lr == saved["lr"]  # no change: fine


def test_what_may_change_on_resume(trained):
    changes = dict(
        steps=9, minutes=2.0, out="new", device="auto", kernels="auto", log_every=7,
        checkpoint_seconds=3.0, experiment="factors",
    )  # fmt: skip
    line = [part for k, v in changes.items() for part in (options.option(k), v)]
    switches = ("compile", "cuda_graph", "eval_only")
    config = parse("--resume", trained, *line, *map(options.option, switches))
    for name, value in (changes | dict.fromkeys(switches, True)).items():
        assert getattr(config, name) == value
    assert {*changes, *switches, "resume"} == options.RUN_CONTROL


def test_resume_does_not_repeat_what_was_done_once(here, trained):
    """--out, --eval-only and --experiment of the run that is resumed are not inherited."""
    content = torch.load(trained / "checkpoint.pt", weights_only=True)
    once = dict(out="x", resume="y", eval_only=True, experiment="factors")
    torch.save({**content, "config": content["config"] | once}, here / "again.pt")
    config = parse("--resume", here / "again.pt")
    assert (config.out, config.eval_only, config.experiment) == ("", False, "")


# -- what overrides what ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    "line",
    ["--preset tetrominoes --lr 1e-3 --num-slots 9", "--lr 1e-3 --num-slots 9 --preset tetrominoes",
     "--lr 1e-3 --preset tetrominoes --num-slots 9", "--preset=tetrominoes --lr=1e-3 --num-slots=9",
     "--lr=1e-3 --num_slots=9 --preset=tetrominoes", "--preset quick --preset tetrominoes "
     "--num-slots 1 --num-slots 9 --lr 1e-3"],
)  # fmt: skip
def test_the_preset_comes_first_wherever_it_stands(line):
    assert parse(*line.split()) == iodine.make_config("tetrominoes", lr=1e-3, num_slots=9)


def test_overrides_of_every_kind():
    assert parse() == iodine.make_config("quick") == iodine.make_config()
    assert parse("--preset=shapes") == iodine.make_config("shapes")
    config = parse(
        "--decoder-channels", 4, 8, "--drop-inputs", "image", "mask", "--compile", "--eval-only",
        "--component", "logistic", "--out", "a b", "--minutes", "0.5",
    )  # fmt: skip
    assert config == iodine.make_config(
        decoder_channels=(4, 8), drop_inputs=("image", "mask"), compile=True, eval_only=True,
        component="logistic", out="a b", minutes=0.5,
    )  # fmt: skip
    assert parse("--no-compile").compile is False
    released = parse("--variant", "released", "--sigma", 0.5)
    assert released == iodine.make_config("quick", "released", sigma=0.5)


@pytest.mark.parametrize(("preset", "variant"), CHOICES)
def test_every_preset_and_variant_is_possible(preset, variant):
    config = parse("--preset", preset, "--variant", variant, "--device", "cpu")
    assert (config.preset, config.variant) == (preset, variant)
    iodine.check(config)
    assert config == iodine.make_config(preset, variant, device="cpu")
    if variant == "paper":
        assert all(getattr(config, k) == v for k, v in iodine.PRESETS[preset].items())
    else:
        assert all(getattr(config, k) == v for k, v in iodine.RELEASED.items())


# -- help ------------------------------------------------------------------------------------------


def test_help_explains_every_field(monkeypatch, capsys):
    """tyro makes the help of a field of the comment behind it: no comment, no help."""
    monkeypatch.setattr(sys, "argv", ["iodine.py", "--help"])
    monkeypatch.setenv("COLUMNS", "200")
    with pytest.raises(SystemExit) as stop:
        options.main(iodine.Config, iodine.make_config, iodine.load, iodine.train)
    assert stop.value.code == 0
    printed = re.sub(r"\x1b\[[0-9;]*m", "", capsys.readouterr().out)
    lines = [line.strip(" │|") for line in printed.splitlines()]
    entries = {}  # option -> its help
    for line in lines:
        if match := re.match(r"--([a-z0-9-]+)", line):
            entries[current := match[1]] = line
        elif entries:
            entries[current] += " " + line
    for field in dataclasses.fields(iodine.Config):
        entry = entries[options.option(field.name)[2:]]
        words = re.sub(r"\((default|repeatable|required|optional)[^)]*\)|\S*--\S+", "", entry)
        words = re.sub(r"\{.*?\}|\[.*?\]|[A-Z]{3,}", "", words)
        assert re.search(r"[a-z]{2,}|\b[A-Z]\b", words), entry
    assert not list(Path().iterdir())


def test_help_shows_the_preset_that_was_chosen(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["iodine.py", "--preset", "shapes", "--help"])
    with pytest.raises(SystemExit) as stop:
        options.main(iodine.Config, iodine.make_config, iodine.load, iodine.train)
    assert stop.value.code == 0
    printed = re.sub(r"\s+", " ", re.sub(r"[│|]", " ", capsys.readouterr().out))
    assert "--dataset STR" in printed and "default: shapes" in printed


def test_every_model_has_the_common_options():
    common = typing.get_type_hints(options.RunConfig)
    types = typing.get_type_hints(iodine.Config)
    defaults = {field.name: field.default for field in dataclasses.fields(iodine.Config)}
    for field in dataclasses.fields(options.RunConfig):
        assert types[field.name] == common[field.name]
        assert type(defaults[field.name]) is type(field.default)
    assert set(common) >= COMMON
    assert set(common) >= options.RUN_CONTROL


# -- the small functions ---------------------------------------------------------------------------


def test_devices():
    assert options.pick_device("cpu") == torch.device("cpu")
    assert options.pick_device("auto").type == ("cuda" if CUDA else "cpu")
    for name in ("nonsense", "", "cpu:x", "0", "cuda:99"):
        with pytest.raises(options.UserError) as error:
            options.pick_device(name)
        assert "\n" not in str(error.value) and "--device" in str(error.value)


@pytest.mark.gpu
@pytest.mark.skipif(not CUDA, reason="needs a CUDA device")
def test_torchrun_gives_each_process_its_gpu(monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "0")
    assert options.pick_device("auto") == torch.device("cuda", 0)
    assert options.pick_device("cpu") == torch.device("cpu")


def test_checks_of_numbers():
    config = dataclasses.make_dataclass("C", ["a_b", "c"])(a_b=(2, 1), c=0.5)
    options.at_least_one(config, "a_b")
    options.positive(config, "c")
    config.a_b, config.c = (2, 0), float("nan")
    with pytest.raises(options.UserError, match="--a-b must be at least 1"):
        options.at_least_one(config, "a_b")
    with pytest.raises(options.UserError, match="--c must be larger than 0, not nan"):
        options.positive(config, "c")


def test_nothing_is_printed_or_written_by_parsing(here, capsys):
    for line in ([], ["--preset", "shapes"], ["--lr", "1"]):
        with contextlib.suppress(options.UserError):
            parse(*line)
    assert capsys.readouterr() == ("", "")
    assert not list(here.iterdir())
