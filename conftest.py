"""Where there is no NVIDIA device, Triton kernels are interpreted on the CPU.

Triton and OpenMP read their variables when they are imported, and torch.compile may import Triton
at any time: hence here, before anything else.
"""

import os

if "PYTEST_XDIST_WORKER" in os.environ:  # one of several processes, as are its notebooks' kernels:
    os.environ["OMP_NUM_THREADS"] = "1"  # the cores are theirs together

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
