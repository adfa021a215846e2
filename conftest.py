"""Where there is no NVIDIA device, Triton kernels are interpreted on the CPU.

Triton reads the variable when it is imported, and torch.compile may import it at any time: hence
here, before anything else.
"""

import os

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
if "PYTEST_XDIST_WORKER" in os.environ:  # one of several processes: the cores are theirs together
    torch.set_num_threads(1)
