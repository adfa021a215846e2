"""Compiles whatever the operations launch, for GPUs that are not there.

    python tests/compile_kernels.py                               # a table of the usual cases
    python tests/compile_kernels.py '{"90": [[35, 4, "float32", 3]]}'   # JSON of these, see `Case`

A compiler for NVIDIA GPUs needs no such GPU. Triton asks its driver for the target, so a stand-in
for the driver answers "80" or "90", and every launch compiles instead of running. What is compiled
is thus what the operations would launch on a GPU: Triton itself specialises the kernels on types,
alignment and divisibility of the arguments. The results are never computed.

Always a process of its own: how Triton treats kernels is settled when it is imported, and the
process of the tests has it interpret them. tests/test_compile.py and the benchmark start it.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[1]
BATCH = 32
HEAD = f"{'operation':24}{'direction':10}{'kernel':36}{'case':18}  sm  regs spill shared load store"


class Case(NamedTuple):
    """What can change the code of a kernel."""

    size: int  # H = W; 35² pixels are odd, 64² and 128² are divisible by 16
    slots: int
    dtype: str = "float32"  # of decoded
    colours: int = 3


# Two targets differ little: sm_80 has the cases that differ most. Slots are a loop, and registers
# do not depend on them.
CASES = {
    90: [Case(35, 4), Case(128, 7), Case(128, 7, "bfloat16"), Case(35, 6, "float32", 1)],
    80: [Case(35, 4, "bfloat16"), Case(128, 11), Case(64, 6, "float32", 1)],
}


def compile_in_child(cases: dict[int, list[Case]]) -> list[dict[str, Any]]:
    """What `compile_all` finds, in a process that does not interpret kernels."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    # Triton warns where a launch leaves it open whether multiply-adds are fused.
    command = [sys.executable, "-W", "error:TRITON_DEFAULT_FP_FUSION", __file__, json.dumps(cases)]
    child = subprocess.run(command, env=environment, capture_output=True, text=True)
    if child.returncode:
        raise RuntimeError(child.stderr)
    return json.loads(child.stdout)


def calls(case: Case) -> dict[str, Callable]:
    """Every operation that has kernels, on memory of this case that is never read."""
    import torch

    import kernels

    def images(*shape: int, dtype: str = "float32") -> torch.Tensor:  # channels-last
        memory = torch.empty(*shape[:-1], case.size, case.size, shape[-1])
        return memory.to(getattr(torch, dtype)).movedim(-1, -3)

    image = images(BATCH, case.colours)
    decoded = images(BATCH, case.slots, case.colours + 1, dtype=case.dtype).requires_grad_()
    affine = [torch.empty(case.colours + 3, requires_grad=True) for _ in range(2)]
    coordinates = torch.empty(2, case.size, case.size)
    return {
        "masks": lambda: kernels.masks(decoded[:, :, -1]),
        "mixture_log_likelihood": lambda: kernels.mixture_log_likelihood(image, decoded, 0.1),
        "leave_one_out": lambda: kernels.leave_one_out(image, decoded, 0.1),
        "refinement_inputs": lambda: kernels.refinement_inputs(
            image, decoded, *affine, coordinates, 0.1),
    }  # fmt: skip


def compile_all(cases: dict[int, list[Case]]) -> list[dict[str, Any]]:
    """Call all operations, forward and backward: an entry for each different compilation."""
    import baselines
    import torch

    import kernels
    from kernels.launch import jit, launch, tl, triton

    @jit
    def spilling(values, BLOCK: tl.constexpr):
        """32 numbers a thread that wait for their sum, and 16 registers: it has to be seen."""
        where = tl.arange(0, BLOCK)
        numbers = tl.load(values + where)
        tl.store(values + where, numbers / tl.sum(numbers))

    seen, found, at = set(), [], {}  # at: where in the loops below
    run = triton.JITFunction.run

    def compile_instead(kernel, *arguments, grid, warmup, **options):
        compiled = run(kernel, *arguments, grid=grid, warmup=True, **options)
        if (at["target"], id(compiled)) not in seen:  # the same object if it is cached
            seen.add((at["target"], id(compiled)))
            name = f"{kernel.fn.__module__}.{kernel.fn.__name__}".removeprefix("kernels.")
            moved = baselines.num_bytes(arguments)  # each read or written once, of BATCH images
            found.append(dict(**at, kernel=name, bytes=moved, **read(compiled)))

    triton.JITFunction.run = compile_instead
    kernels._triton_obstacle = lambda *_: None  # whatever hinders Triton from running here
    for target, some in cases.items():
        triton.runtime.driver.set_active(Driver(int(target)))
        with kernels.use("triton"):
            for case in some:
                for name, call in calls(Case(*case)).items():
                    at.update(target=int(target), case=list(case), operation=name)
                    at["direction"] = "forward"
                    outputs = call()
                    outputs = [outputs] if isinstance(outputs, torch.Tensor) else outputs
                    outputs = [output for output in outputs if output.requires_grad]
                    at["direction"] = "backward"
                    torch.autograd.backward(outputs, [torch.empty_like(out) for out in outputs])
        at.update(operation="none", direction="forward")
        launch(spilling, (1,), torch.empty(1024), BLOCK=1024, num_warps=1, maxnreg=16)
    return found


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


def read(compiled: Any) -> dict[str, int]:
    """registers of a thread; spilled bytes of a thread, shared bytes of a program; load and store,
    the most bytes that a thread moves at a time."""
    import triton

    tools = Path(triton.__file__).parent / "backends/nvidia/bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        command = [tools / "cuobjdump", "--dump-resource-usage", file.name]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    # "Function name: REG:40 STACK:0 SHARED:0 LOCAL:0 ...": what spills goes to the stack.
    numbers = {name: int(number) for name, number in re.findall(r"([A-Z]+):(\d+)", usage)}
    widest = {"ld": 0, "st": 0}
    access = r"\b(ld|st)\.global\S*?(?:\.v(\d))?\.[a-z]+(\d+)\b"
    for kind, count, bits in re.findall(access, compiled.asm["ptx"]):
        widest[kind] = max(widest[kind], int(count or 1) * int(bits) // 8)
    return dict(registers=numbers["REG"], spilled=numbers["STACK"] + numbers["LOCAL"],
                shared=compiled.metadata.shared, load=widest["ld"], store=widest["st"])


def line(entry: dict[str, Any]) -> str:
    """The entry's row of the table."""
    size, slots, dtype, colours = entry["case"]
    case = f"{size}² K{slots} C{colours} {'bf16' if dtype == 'bfloat16' else ''}"
    return (f"{entry['operation']:24}{entry['direction']:10}{entry['kernel']:36}{case:18}"
            f"{entry['target']:4}{entry['registers']:6}{entry['spilled']:6}{entry['shared']:7}"
            f"{entry['load']:5}{entry['store']:6}")


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    if sys.argv[1:]:
        print(json.dumps(compile_all(json.loads(sys.argv[1]))))
    else:
        print("\n".join([HEAD, *map(line, compile_in_child(CASES))]))
