"""Compiles whatever the operations launch, for GPUs that are not there.

    python tests/test_compile.py            # a table: registers, spills, shared memory, accesses
    python tests/test_compile.py --full     # of every combination of the options: many minutes

A compiler for NVIDIA GPUs needs no such GPU. Triton asks its driver for the target, so a stand-in
for the driver answers "80" or "90", and every launch compiles instead of running. What is compiled
is thus what the operations would launch on a GPU: Triton itself specialises the kernels on types,
alignment and divisibility of the arguments. The results are never computed.

In child processes, one for each target: how Triton treats kernels is settled when it is imported,
and where there is no GPU the process of these tests has it interpret them.
"""

import argparse
import ast
import dataclasses
import functools
import importlib
import itertools
import json
import linecache
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    os.environ.pop("TRITON_INTERPRET", None)
    sys.path.insert(0, str(Path(__file__).parents[1]))

import pytest
import torch
from torch import Tensor

import kernels
from kernels.launch import jit, launch, tl, triton

if triton is None:
    pytest.skip("there is nothing to compile without triton", allow_module_level=True)

ROOT = Path(kernels.__file__).parents[1]
TARGETS = 80, 90  # compute capabilities: A100; H100 and H200


@dataclasses.dataclass(frozen=True)
class Case:
    """What can change the code of a kernel; an operation ignores what it has not."""

    size: int
    slots: int
    dtype: str = "float32"
    layout: str = "last"  # where the channels lie in memory, "first" or "last"
    component: str = "gaussian"
    log_ratio: bool = False
    activation: str = "elu"
    colours: int = 3
    coordinates: int = 2  # of refinement_inputs

    def __str__(self) -> str:
        """The size, and whatever is not as usual."""
        usual, words = Case(self.size, self.slots), [f"{self.size}² K{self.slots}"]
        short = {"bfloat16": "bf16", "first": "planes", True: "ratio"}
        letters = {"colours": "C", "coordinates": "N"}
        for name, value in vars(self).items():
            if value != getattr(usual, name):
                word = f"{letters[name]}{value}" if name in letters else short.get(value, value)
                words.append(word)
        return " ".join(words)


# 35² is odd, the others are divisible by 16, which is where Triton's specialisation differs.
SIZES = [(35, 4), (128, 7), (64, 6), (16, 5), (128, 11)]
OPTIONS: dict[str, list] = {  # the usual value comes first
    "dtype": ["float32", "bfloat16"],
    "layout": ["last", "first"],
    "component": ["gaussian", "logistic"],
    "log_ratio": [False, True],
    "activation": ["elu", "relu"],
    "colours": [3, 1],
    "coordinates": [2, 9],
}
BATCH = 32
DECODERS = {16: (32, 1), 35: (32, 5), 64: (32, 5), 128: (64, 3)}  # image -> channels, kernel size


def cases(target: int, full: bool) -> list[Case]:
    """Every combination of the options, or a few in which all pairs of their values occur."""
    if full:
        values = [dict(zip(OPTIONS, v, strict=True)) for v in itertools.product(*OPTIONS.values())]
        return [Case(*size, **options) for options in values for size in SIZES]
    # Every option is changed in three of five cases. Three of five and another three of five have a
    # case in common and each has one of its own; in the two before them, nothing is changed.
    changed: list[dict] = [{} for _ in SIZES]
    triples = itertools.combinations(range(5), 3)
    for (name, values), triple in zip(OPTIONS.items(), triples, strict=False):
        for i in triple:
            changed[i][name] = values[1]
    found = [Case(*SIZES[0]), Case(*SIZES[1])]
    found += [Case(*size, **options) for size, options in zip(SIZES, changed, strict=True)]
    # Compilation takes time, and the two targets differ little.
    return found if target == 90 else found[1::2]


# -- what the operations are called with -----------------------------------------------------------


def images(case: Case, *shape: int) -> Tensor:
    """Memory for (*shape, size, size), shape ending in the channels. Hardly any is ever touched."""
    (*rest, channels), dtype = shape, getattr(torch, case.dtype)
    if case.layout == "first":
        return torch.empty(*shape, case.size, case.size, dtype=dtype)
    return torch.empty(*rest, case.size, case.size, channels, dtype=dtype).movedim(-1, -3)


def decoded(case: Case) -> Tensor:
    return images(case, BATCH, case.slots, case.colours + 1).requires_grad_()


def mixture_arguments(case: Case) -> tuple:
    return images(case, BATCH, case.colours), decoded(case), 0.1, case.component


def call_refinement_inputs(case: Case, operation: Callable) -> Any:
    image, decoded, *options = mixture_arguments(case)
    affine = [torch.empty(case.colours + 3, requires_grad=True) for _ in range(2)]
    coordinates = torch.empty(case.coordinates, case.size, case.size)
    return operation(image, decoded, *affine, coordinates, *options, 1e-6, case.log_ratio)


def call_broadcast_conv(case: Case, operation: Callable) -> Any:
    channels, kernel = DECODERS[case.size]
    dtype, latent = getattr(torch, case.dtype), 16
    z = torch.empty(BATCH * case.slots, latent, dtype=dtype, requires_grad=True)
    weight = torch.empty(channels, latent + 2, kernel, kernel, dtype=dtype, requires_grad=True)
    bias = torch.empty(channels, dtype=dtype, requires_grad=True)
    coordinates = torch.empty(2, case.size, case.size, dtype=dtype)
    layout = torch.channels_last if case.layout == "last" else torch.contiguous_format
    return operation(z, weight, bias, coordinates, case.activation, layout)


def call_bias_elu(case: Case, operation: Callable) -> Any:
    channels, _ = DECODERS[case.size]
    x = images(case, BATCH * case.slots, channels).requires_grad_()
    return operation(x, torch.empty(channels, dtype=x.dtype, requires_grad=True))


CALLS: dict[str, Callable[[Case, Callable], Any]] = {
    "bias_elu": call_bias_elu,
    "broadcast_conv": call_broadcast_conv,
    "masks": lambda case, operation: operation(decoded(case)[:, :, -1]),
    "mixture": lambda case, operation: operation(*mixture_arguments(case)),
    "mixture_log_likelihood": lambda case, operation: operation(*mixture_arguments(case)),
    "refinement_inputs": call_refinement_inputs,
}


def call(name: str, case: Case) -> None:
    """The operation, then its gradients, with a cotangent for every output that may have one."""
    outputs = CALLS[name](case, getattr(kernels, name))
    outputs = [outputs] if isinstance(outputs, Tensor) else outputs
    outputs = [output for output in outputs if output.requires_grad]
    torch.autograd.backward(outputs, [torch.empty_like(output) for output in outputs])


def modules() -> list:
    """The files of kernels/ that have operations."""
    names = {path.stem for path in (ROOT / "kernels").glob("*.py")} - {"__init__", "benchmark"}
    return [importlib.import_module(f"kernels.{name}") for name in sorted(names)]


# -- the child: compile and read what was compiled -------------------------------------------------


@dataclasses.dataclass
class Compiled:
    """What one kernel became, for one signature and one target."""

    operation: str  # the first that led to it
    kernel: str
    case: Case  # the first that led to it
    target: int
    types: dict[str, str]  # of the arguments; "%16" if Triton knows that 16 divides it
    constants: dict[str, Any]  # of the arguments
    registers: int  # of a thread
    spilled: int  # bytes of a thread that found no place in registers
    shared: int  # bytes of a program
    loads: dict[str, list[int]]  # the kernel's statement -> bytes of a thread's reads at a time
    stores: dict[str, list[int]]

    def __str__(self) -> str:
        """The kernel with its signature, for messages."""
        arguments = self.types | {name: f"={value}" for name, value in self.constants.items()}
        arguments = ", ".join(f"{name} {value}" for name, value in arguments.items())
        return f"{self.kernel} of {self.operation}, {self.case}, sm_{self.target}: {arguments}"


class Driver:
    """As much of Triton's driver as compilation asks for."""

    def __init__(self, target: int):
        self.target = target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", self.target, 32)


@jit
def spilling(values, BLOCK: tl.constexpr):
    """32 numbers a thread that wait for their sum, and 16 registers: the tests have to see it."""
    where = tl.arange(0, BLOCK)
    numbers = tl.load(values + where)
    tl.store(values + where, numbers / tl.sum(numbers))


def compile_all(target: int, full: bool) -> list[Compiled]:
    """Call the operations with every case; one entry for each different compilation."""
    found: dict[int, tuple] = {}
    run = triton.JITFunction.run
    triton.runtime.driver.set_active(Driver(target))

    def compile_instead(kernel, *arguments, grid, warmup, **options):
        compiled = run(kernel, *arguments, grid=grid, warmup=True, **options)
        found.setdefault(id(compiled), (name, case, kernel, compiled))  # the same if cached

    triton.JITFunction.run = compile_instead
    kernels._triton_obstacle = lambda *_: None  # whatever hinders Triton from running here
    with kernels.use("triton"):
        for case, name in itertools.product(cases(target, full), kernels.TRITON):
            call(name, case)
    name, case = "none", Case(16, 1)
    launch(spilling, (1,), torch.empty(1024), BLOCK=1024, num_warps=1, maxnreg=16)
    return [read(*entry, target) for entry in found.values()]


def read(operation: str, case: Case, kernel, compiled, target: int) -> Compiled:
    """The numbers of a compiled kernel, from its machine code and its PTX."""
    source, tools = compiled.src, Path(triton.__file__).parent / "backends/nvidia/bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        command = [tools / "cuobjdump", "--dump-resource-usage", file.name]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    # "Function name: REG:40 STACK:0 SHARED:0 LOCAL:0 ...": what spills goes to the stack.
    numbers = {name: int(number) for name, number in re.findall(r"([A-Z]+):(\d+)", usage)}
    constants = {kernel.arg_names[i]: value for (i, *_), value in source.constants.items()}
    divisible = {kernel.arg_names[i] for (i, *_), value in source.attrs.items() if value}
    loads, stores = accesses(compiled.asm["ptx"])
    return Compiled(
        operation=operation,
        kernel=f"{kernel.fn.__module__}.{kernel.fn.__name__}".removeprefix("kernels."),
        case=case,
        target=target,
        types={
            name: kind + "%16" * (name in divisible)
            for name, kind in source.signature.items()
            if name not in constants
        },
        constants={name: str(value) for name, value in constants.items()},
        registers=numbers["REG"],
        spilled=numbers["STACK"] + numbers["LOCAL"],
        shared=compiled.metadata.shared,
        loads=loads,
        stores=stores,
    )


def accesses(ptx: str) -> tuple[dict, dict]:
    """Loads and stores of global memory: statement of the kernel -> bytes of each access."""
    files = dict(re.findall(r'^\s*\.file\s+(\d+) "(.*)"$', ptx, re.M))
    numbers = {Path(path).name: number for number, path in files.items()}
    place = r"(\d+) (\d+) (\d+)"
    location = re.compile(rf"\s*\.loc\s+{place}(?:, function_name \S+, inlined_at {place})?")
    outermost = re.compile(r".*@\[ (\S+):(\d+):(\d+)")
    access = re.compile(r"\b(ld|st)\.global\S*?(?:\.v(\d))?\.[a-z]+(\d+)\b")
    found: tuple[dict, dict] = {}, {}
    callers: dict[tuple, tuple] = {}
    for line in ptx.splitlines():
        if match := location.match(line):
            # The line in the kernel, not in what it calls. Triton 3.6 has it in a comment.
            here, caller = match.groups()[:3], match.groups()[3:]
            if caller[0] is not None:
                callers[here] = caller
            while here in callers:
                here = callers[here]
            if match := outermost.match(line):
                here = numbers[match[1]], match[2], match[3]
        elif match := access.search(line):
            kind, count, bits = match.groups()
            text = statement(files[here[0]], int(here[1]))
            found[kind == "st"].setdefault(text, []).append(int(count or 1) * int(bits) // 8)
    return found


@functools.cache
def statements(path: str) -> list[ast.stmt]:
    """All statements of a file, as it was when Triton read it."""
    tree = ast.parse("".join(linecache.getlines(path)))
    return [node for node in ast.walk(tree) if isinstance(node, ast.stmt)]


@functools.cache
def statement(path: str, line: int) -> str:
    """The innermost statement that has this line in it, on one line."""
    nodes = [node for node in statements(path) if node.lineno <= line <= node.end_lineno]
    # The compiler gives line 0 to code that it has merged from several places.
    return ast.unparse(min(nodes, key=lambda n: n.end_lineno - n.lineno)) if nodes else "?"


# -- the parent ------------------------------------------------------------------------------------


def compile_in_children(full: bool) -> list[Compiled]:
    """What the children of all targets found, operation by operation."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    options = ["--full"] if full else []

    def child(target: int) -> list[Compiled]:
        # Triton warns where a launch leaves it open whether multiply-adds are fused.
        command = [sys.executable, "-W", "error:TRITON_DEFAULT_FP_FUSION", __file__]
        command += ["--json", str(target), *options]
        run = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert run.returncode == 0, run.stderr
        return [
            Compiled(**entry | {"case": Case(**entry["case"])}) for entry in json.loads(run.stdout)
        ]

    with ThreadPoolExecutor() as pool:
        found = [*itertools.chain(*pool.map(child, TARGETS))]
    return sorted(found, key=lambda entry: (entry.operation, entry.kernel))


def widest(accesses: dict[str, list[int]]) -> int:
    return max(itertools.chain(*accesses.values()), default=0)


def table(entries: list[Compiled]) -> str:
    """A line for each, fewer than 100 columns wide, below a line for each operation."""
    lines = [f"{'kernel':18}{'case':44}sm  regs spill shared load store"]
    for operation, group in itertools.groupby(entries, key=lambda entry: entry.operation):
        lines += ["", operation]
        for entry in group:
            name = entry.kernel.split(".")[1].removesuffix("_kernel")
            name = name.removeprefix(f"{operation}_").strip("_")
            numbers = f"{entry.registers:6}{entry.spilled:6}{entry.shared:7}"
            numbers += f"{widest(entry.loads):5}{widest(entry.stores):6}"
            lines.append(f"{name:18}{entry.case!s:44}{entry.target}{numbers}")
    return "\n".join(lines)


@pytest.fixture(scope="module")
def compiled() -> list[Compiled]:
    return compile_in_children(full=False)


def shipped(entries: list[Compiled]) -> list[Compiled]:
    return [entry for entry in entries if entry.operation != "none"]


# Registers of a thread for channels-last tensors, at most. With 64, a multiprocessor of 65,536 has
# half of the threads that it could; with 128 a quarter, which still hides the latency of memory
# where a thread has several loads on the way. Planes are the layout of CPUs: they may not spill.
REGISTERS = {
    "bias_elu._forward_kernel": 64,
    "bias_elu._backward_kernel": 96,
    "broadcast_conv._forward_kernel": 96,
    "broadcast_conv._backward_kernel": 96,
    "broadcast_conv._classes_kernel": 64,
    "masks._forward_kernel": 64,
    "masks._backward_kernel": 64,
    "mixture.mixture_kernel": 64,
    "mixture.log_likelihood_kernel": 64,
    "mixture.mixture_backward_kernel": 64,
    "refinement_inputs.statistics_kernel": 72,
    "refinement_inputs.combine_kernel": 64,
    "refinement_inputs.pack_kernel": 128,
    "refinement_inputs.refinement_inputs_backward_kernel": 128,
}


def check(entries: list[Compiled]) -> None:
    """Nothing spills; channels-last, few registers, and all channels of a pixel in one access."""
    failures = [f"{entry.spilled} bytes spilled: {entry}" for entry in entries if entry.spilled]
    for entry in entries:
        if entry.case.layout == "last":
            failures += narrow_accesses(entry)
            limit = REGISTERS[entry.kernel]
            if entry.registers > limit:
                failures.append(f"{entry.registers} registers, more than {limit}: {entry}")
    assert not failures, "\n".join(["", *failures])


def narrow_accesses(entry: Compiled) -> list[str]:
    """Where a thread takes fewer bytes at a time than `pixel_bytes` says."""
    return [
        f"{sorted(set(sizes))} bytes at a time, not {wanted}, by `{text}`: {entry}"
        for name, wanted in pixel_bytes(entry).items()
        for text, sizes in [*entry.loads.items(), *entry.stores.items()]
        if re.search(rf"\b{name}\b", text) and min(sizes) < wanted
    ]


def pixel_bytes(entry: Compiled) -> dict[str, int]:
    """Of the arguments with the layout of the decoder's output: bytes of a pixel of a slot.

    And 16 of the refinement network's input, where its pixels are a multiple of that.
    """
    size, case = {"*fp32": 4, "*bf16": 2}, entry.case
    names = [name for name in entry.types if name.endswith("decoded")]
    wanted = {n: size[entry.types[n].removesuffix("%16")] * (case.colours + 1) for n in names}
    if "packed" in entry.types and (3 * case.colours + 6 + case.coordinates) % 4 == 0:
        wanted["packed"] = 16
    return wanted


def test_every_operation_and_every_kernel_is_compiled(compiled):
    """What is not called is neither seen by a test of this file nor launched by anything."""
    assert set(CALLS) == set(kernels.TRITON)
    functions = [f for m in modules() for f in vars(m).values() if hasattr(f, "arg_names")]
    called = {name for function in functions for name in function.fn.__code__.co_names}
    launched = {function.fn for function in functions if function.fn.__name__ not in called}
    names = {f"{function.__module__}.{function.__name__}" for function in launched}
    assert {f"kernels.{entry.kernel}" for entry in shipped(compiled)} == names
    assert {entry.kernel for entry in shipped(compiled)} == set(REGISTERS)
    assert {entry.target for entry in compiled} == set(TARGETS)


def test_registers_and_accesses(compiled):
    check(shipped(compiled))


@pytest.mark.slow
def test_every_combination():
    check(shipped(compile_in_children(full=True)))


def test_pixels_are_found_in_the_ptx(compiled):
    """Every kernel with an argument of the decoder's layout has statements that access it."""
    for entry in shipped(compiled):
        for name in pixel_bytes(entry):
            texts = [*entry.loads, *entry.stores]
            assert any(re.search(rf"\b{name}\b", text) for text in texts), f"{name}: {entry}"


def test_spills_would_be_seen(compiled):
    controls = [entry for entry in compiled if entry.operation == "none"]
    assert len(controls) == len(TARGETS)
    for entry in controls:
        assert entry.spilled > 0 and entry.registers <= 24
        assert widest(entry.loads) == widest(entry.stores) == 16


def test_accesses_are_read_from_ptx():
    """The line numbers are those of a statement of this file."""
    place = statements.__wrapped__.__code__.co_firstlineno + 3
    here = f"{Path(__file__).name}:{place}:8"
    ptx = f"""
        .loc 1 {place} 8 // {here}
        @%p1 ld.global.v4.b32 {{ %r1, %r2, %r3, %r4 }}, [ %rd1 + 0 ];
        @%p1 ld.global.L1::evict_last.b16 {{ %rs1 }}, [ %rd1 + 0 ];
        ld.param.b64 %rd1, [kernel_param_0];
        .loc 1 1 8, function_name $L__info_string0, inlined_at 1 {place} 3 // other.py:1:8
        st.global.v2.b64 [ %rd2 + 0 ], {{ %rd1, %rd3 }};
        .loc 1 2 9 // other.py:2:9 @[ other.py:7:3 @[ {here} ] ]
        st.global.b32 [ %rd2 + 0 ], {{ %rd1 }};
        .file 1 "{__file__}"
    """
    loads, stores = accesses(ptx)
    text = statement(__file__, place)
    assert text.startswith("tree =") and loads == {text: [16, 2]} and stores == {text: [16, 4]}


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--full", action="store_true", help="every combination of the options")
    parser.add_argument("--json", type=int, metavar="TARGET", help="for the children")
    options = parser.parse_args()
    if options.json:
        print(json.dumps([dataclasses.asdict(e) for e in compile_all(options.json, options.full)]))
    else:
        print(table(shipped(compile_in_children(options.full))))
