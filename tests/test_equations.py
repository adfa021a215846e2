"""EQUATIONS.md: every numbered item of the papers stands there once, and what it points to exists.

`problems` reads such a text; small made-up ones show that it finds each kind of mistake.
"""

import ast
import contextlib
import dataclasses
import functools
import importlib
import io
import re
import shlex
import tokenize
from pathlib import Path

import pytest

import kernels
from data import options

ROOT = Path(__file__).parent.parent
PAPERS = {  # the papers' own lists
    "IODINE": ("eq. 1-4", "alg. 1", "table 1", "figs 1-40"),
    "AIR": ("eq. 1-34", "alg. 1", "figs 1-2"),
    "MVAE": ("figs 1-6",),
    "EfficientMORL": ("formulas 1-4", "tables 1-2"),
}


def expand(items: str) -> list[str]:
    """figs 1, 3-4 -> fig 1, fig 3, fig 4; none where it is no such list."""
    match = re.fullmatch(r"(eq|alg|fig|table|formula)[s.]* (\d[\d, -]*)", items)
    kind, numbers = match.groups() if match else ("", "")
    ends = [list(map(int, part.split("-"))) for part in numbers.split(", ") if part]
    return [f"{kind} {n}" for part in ends for n in range(part[0], part[-1] + 1)]


# -- what is in the code ---------------------------------------------------------------------------


def words(source: str) -> str:
    """Comments and strings, one blank between words."""
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    kinds = tokenize.COMMENT, tokenize.STRING
    return " ".join(" ".join(t.string for t in tokens if t.type in kinds).split())


@functools.cache
def definitions(path: Path) -> dict[str, str]:
    """Words of every class and function; of the whole file under the empty name."""
    source = path.read_text()
    lines, found = source.splitlines(), {"": words(source)}
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ClassDef | ast.FunctionDef):
            part = "\n".join(lines[node.lineno - 1 : node.end_lineno])
            part = re.sub(rf"^ {{{node.col_offset}}}", "", part, flags=re.M)
            found[node.name] = f"{found.get(node.name, '')} {words(part)}"
    return found


def has_tag(text: str, tag: str) -> bool:
    """As it is, or in other capitals, with no further digit behind it."""
    return bool(re.search(rf"{re.escape(tag)}(?!\.?\d)", text, re.I))


@functools.cache
def parse(command: str) -> tuple[str, str]:
    """Script and experiment of a command that its options allow; UserError, SystemExit."""
    python, script, *arguments = shlex.split(command)
    options.require(python == "python" and (ROOT / script).exists(), f"no script {script}")
    module = importlib.import_module(Path(script).stem)

    def load(path: str) -> dict:
        match = re.fullmatch(rf"runs/{module.__name__}-(\w+)-(\d+)", path)
        options.require(bool(match), f"{path} is no folder of {script}")
        return dict(config=dataclasses.asdict(module.make_config(match[1], seed=int(match[2]))))

    with kernels.use("auto"), contextlib.redirect_stderr(io.StringIO()):
        config = options.parse(module.Config, module.make_config, load, arguments)
        module.check(config)
    return script, config.experiment


@functools.cache
def written(script: str, experiment: str) -> set[str]:
    """Names of files in `train`, or in the experiment, and in the functions that these use."""
    module = importlib.import_module(Path(script).stem)
    tree = ast.parse((ROOT / script).read_text())
    functions = {node.name: node for node in tree.body if isinstance(node, ast.FunctionDef)}
    todo = [module.EXPERIMENTS[experiment].__name__ if experiment else "train"]
    seen, files = set(), {f"{experiment}.json"}
    while todo:
        seen.add(name := todo.pop())
        for node in ast.walk(functions[name]):
            if isinstance(node, ast.Name) and node.id in functions.keys() - seen:
                todo.append(node.id)
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                files.add(node.value)
    return files


# -- what is in the table --------------------------------------------------------------------------


def wrong(where: str) -> list[str]:
    """What is wrong with the third cell of a row.

    A file, then tags in it, or in the class or function that stands before them (up to a `;`); a
    command, then files that it writes.
    """
    if where.startswith("missing"):
        return [] if re.match(r"missing: \w", where) else ["missing, without a reason"]
    found, anchors, path, place, files = [], 0, None, "", set()
    for between, span in re.findall(r"([^`]*)`([^`]+)`", where):
        place = "" if ";" in between else place
        if span.startswith("python "):
            path, anchors = None, anchors + 1
            try:
                files = written(*parse(span))
            except (options.UserError, SystemExit) as error:
                return [f"{span}: {error}"]
        elif span.endswith(".py"):
            path, place, files = ROOT / span, "", set()
            if not path.exists():
                return [f"no file {span}"]
        elif path and re.fullmatch(r"\w+", span):
            place = span
            if place not in definitions(path):
                return [f"no {place} in {path.name}"]
        elif path:
            anchors += 1
            if not has_tag(definitions(path)[place], span):
                found.append(f"no {span} in {place or path.name}")
        elif span not in files:
            found.append(f"{span} is not written")
    return found if anchors else ["neither tag nor command"]


def problems(text: str, papers: dict[str, tuple[str, ...]] = PAPERS) -> list[str]:
    """What is wrong with such a file, one line each."""
    sections = {part.partition(":")[0]: part for part in re.split(r"^## ", text, flags=re.M)[1:]}
    found = [] if list(sections) == list(papers) else [f"papers: {', '.join(sections)}"]
    for paper, section in sections.items():
        complete = {item for part in papers.get(paper, ()) for item in expand(part)}
        listed, mapped = [], 0
        for row in re.findall(r"^\|(.*)\|$", section, re.M)[2:]:
            item, _, where = map(str.strip, re.split(r"(?<!\\)\|", row))
            listed += expand(item)
            mapped += 0 if where.startswith("missing") else len(expand(item))
            found += [f"{paper} {item}: {problem}" for problem in wrong(where)]
        for item in sorted(complete | set(listed)):
            if listed.count(item) != (item in complete):
                found.append(f"{paper} {item}: {listed.count(item)} rows")
        if not re.search(rf"\b{mapped} of {len(complete)} are\s+mapped", section):
            found.append(f"{paper}: {mapped} of {len(complete)} are mapped")
    return found


def test_every_row():
    assert problems((ROOT / "EQUATIONS.md").read_text()) == []


# -- the checks themselves -------------------------------------------------------------------------

RESUME = "--resume runs/iodine-quick-0 --experiment"
TABLE = f"""## IODINE: a paper

5 of 6 are mapped.

| item | what it says | where |
|---|---|---|
| eq. 1-3 | p(x\\|z) | `iodine.py`: `infer`, `eq. 2`; `eq. 4`, and words |
| fig. 1 | a scene | `python iodine.py`: `steps.png`, `evaluation.json` |
| fig. 2 | another | `python iodine.py {RESUME} ambiguity`: `ambiguity.png`, `ambiguity.json` |
| alg. 1 | steps | missing: time |
"""
MISTAKES = {  # what is replaced in the table, by what, and what is found
    "a wrong tag": ("eq. 2`", "eq. 7`", "no eq. 7 in infer"),
    "a tag of another place": ("eq. 2`", "eq. 4`", "no eq. 4 in infer"),
    "a tag with more digits": ("eq. 4`", "section 2`", "no section 2 in iodine.py"),
    "no function": ("`infer`", "`defer`", "no defer in iodine.py"),
    "no file": ("`iodine.py`", "`sodium.py`", "no file sodium.py"),
    "words alone": ("`iodine.py`: `infer`, `eq. 2`; `eq. 4`, and", "", "neither tag nor command"),
    "a missing item": ("eq. 1-3", "eq. 1, 3", "eq 2: 0 rows"),
    "a doubled item": ("fig. 2 ", "figs 1-2 ", "fig 1: 2 rows"),
    "an item of no paper": ("alg. 1", "alg. 1-2", "alg 2: 1 rows"),
    "no reason": ("missing: time", "missing", "without a reason"),
    "a wrong count": ("5 of 6", "6 of 6", "5 of 6 are mapped"),
    "another paper": ("IODINE:", "AIR:", "papers: AIR"),
    "an unknown option": ("iodine.py`: `steps", "iodine.py --mass 1`: `steps", "--mass 1: "),
    "an impossible value": ("iodine.py`: `steps", "iodine.py --steps 0`: `steps", "at least 1"),
    "no script": ("python iodine", "python sodium", "no script sodium.py"),
    "another model's run": ("runs/iodine", "runs/air", "is no folder of iodine.py"),
    "an unknown experiment": ("ambiguity`:", "doubt`:", "unknown experiment 'doubt'"),
    "a figure of nobody": ("steps.png", "stairs.png", "stairs.png is not written"),
    "a figure of another command": ("ambiguity.png", "steps.png", "steps.png is not written"),
}


@pytest.mark.parametrize("mistake", [None, *MISTAKES])
def test_mistakes_are_found_out(mistake):
    papers = {"IODINE": ("eq. 1-3", "figs 1-2", "alg. 1")}
    if mistake is None:
        assert problems(TABLE, papers) == []
    else:
        old, new, expected = MISTAKES[mistake]
        assert expected in "\n".join(problems(TABLE.replace(old, new, 1), papers))
