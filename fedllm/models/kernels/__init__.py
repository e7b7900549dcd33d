"""Kernels in C for models in bfloat16 or float32 on a CPU: what PyTorch does in many small passes, in one.

They are compiled on first use by the machine's C compiler. Where there is none, PyTorch's operations compute the same.
`build` finds, compiles and loads; `ops` and `matmul` are the functions, on tensors.
"""

from __future__ import annotations
