"""A model file with a mistake in it, for the tests that must find the mistake."""

import sys
from pathlib import Path
from types import ModuleType


def mutated(original: ModuleType, old: str = "", new: str = "") -> ModuleType:
    """`original`, read again as a module of its own, with `new` in the place of `old`.

    AssertionError where `old` does not stand there exactly once.
    """
    path = Path(original.__file__)
    source = path.read_text()
    if old:
        count = source.count(old)
        assert count == 1, f"{path.name} has {old!r} {count} times, not once: adapt this mutant"
        source = source.replace(old, new)
    module = ModuleType(f"mutated_{original.__name__}")
    module.__file__ = original.__file__
    sys.modules[module.__name__] = module  # dataclasses look it up
    try:
        exec(compile(source, path, "exec"), module.__dict__)
    finally:
        del sys.modules[module.__name__]
    return module
