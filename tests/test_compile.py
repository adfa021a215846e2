"""Every kernel, as the operations launch it, compiled for sm_80 and sm_90: registers and spills.

`python tests/compile_kernels.py` prints the numbers that are checked here.
"""

import importlib
from pathlib import Path
from typing import Any

import pytest
from compile_kernels import BATCH, CASES, Case, compile_in_child, line

import kernels
from kernels.launch import triton

pytestmark = pytest.mark.skipif(triton is None, reason="there is nothing to compile")

# Registers of a thread, at most. With 64, a multiprocessor of 65,536 has half of the threads that
# it could; with 128 a quarter, which still hides the latency of memory where a thread has several
# loads on the way.
REGISTERS = {"refinement_inputs": 128}
OTHERS = 64
MOVED = {  # numbers that a kernel reads and writes for each pixel, as docstrings say; C = 3, N = 2
    "masks.forward_kernel": lambda K: 2 * K,
    "masks.backward_kernel": lambda K: 3 * K,
    "mixture.forward_kernel": lambda K: 4 + 4 * K,
    "mixture.backward_kernel": lambda K: 4 + 8 * K,
    "leave_one_out.leave_one_out_kernel": lambda K: 3 + 5 * K,
    "refinement_inputs.terms_kernel": lambda K: 4 + 9 * K,
    "refinement_inputs.pack_kernel": lambda K: 6 + 26 * K,
    "refinement_inputs.backward_kernel": lambda K: 5 + 30 * K,
}


@pytest.fixture(scope="module")
def compiled() -> list[dict[str, Any]]:
    return compile_in_child(CASES)


def shipped(compiled: list[dict]) -> list[dict]:
    return [entry for entry in compiled if entry["operation"] != "none"]


def test_every_kernel_of_the_package_is_compiled_for_every_target(compiled):
    files = {path.stem for path in Path(kernels.__file__).parent.glob("*.py")}
    files -= {"__init__", "benchmark"}
    modules = [importlib.import_module(f"kernels.{name}") for name in files]
    # Kernels and device functions are decorated alike; the former are called by no other.
    functions = {f.fn for m in modules for f in vars(m).values() if hasattr(f, "arg_names")}
    called = {name for function in functions for name in function.__code__.co_names}
    names = {f"{f.__module__}.{f.__name__}".removeprefix("kernels.")
             for f in functions if f.__name__ not in called}  # fmt: skip
    assert names
    for target in CASES:
        assert {e["kernel"] for e in shipped(compiled) if e["target"] == target} == names


def test_nothing_spills(compiled):
    spilled = [line(entry) for entry in shipped(compiled) if entry["spilled"]]
    assert not spilled, "\n".join(["", *spilled])


def test_registers_leave_room_for_threads(compiled):
    wide = [line(entry) for entry in shipped(compiled)
            if entry["registers"] > REGISTERS.get(entry["operation"], OTHERS)]  # fmt: skip
    assert not wide, "\n".join(["", *wide])


def test_a_thread_loads_all_channels_of_a_pixel_at_once(compiled):
    """The masks, which read only the last channel, do not."""
    for entry in shipped(compiled):
        _, _, dtype, colours = entry["case"]
        wanted = (colours + 1) * {"float32": 4, "bfloat16": 2}[dtype]
        assert entry["operation"] == "masks" or entry["load"] >= wanted, line(entry)


def test_arguments_are_as_large_as_the_docstrings_say(compiled):
    side, slots, *_ = case = Case(128, 7)
    entries = [entry for entry in shipped(compiled) if entry["case"] == list(case)]
    found = {entry["kernel"]: entry["bytes"] / (4 * BATCH * side**2) for entry in entries}
    expected = {kernel: numbers(slots) for kernel, numbers in MOVED.items()}
    assert found == pytest.approx(expected, rel=0.015)  # coordinates are those of all images


def test_a_kernel_that_spills_is_seen(compiled):
    controls = [entry for entry in compiled if entry["operation"] == "none"]
    assert {entry["target"] for entry in controls} == set(CASES)
    for entry in controls:
        assert entry["spilled"] > 0 and entry["registers"] <= 24
        assert entry["load"] == entry["store"] == 16
