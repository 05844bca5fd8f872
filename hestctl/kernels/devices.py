"""Where the project's own kernels can run, and in words why they cannot elsewhere. Imports no Triton."""

from __future__ import annotations

import importlib.util
import os

import torch

_LEAST_CAPABILITY = (8, 0)
_INT8_CAPABILITY = (7, 2)


def why_no_triton(device: torch.device) -> str | None:
    """Why the Triton kernels cannot run on this device; None where they can.

    Triton's interpreter (``TRITON_INTERPRET=1``, for tests) runs them on any device.
    """
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if os.environ.get("TRITON_INTERPRET") == "1":
        return None
    if device.type != "cuda" or torch.version.hip is not None:
        return f"Triton's kernels are for NVIDIA devices, and this one is {device.type}"
    capability = torch.cuda.get_device_capability(device)
    written = "compute capability {}.{}".format(*capability)
    if capability < _INT8_CAPABILITY:
        return f"{written} has no int8 tensor core path"
    if capability < _LEAST_CAPABILITY:
        return f"{written}: Triton's tensor core products need {{}}.{{}}".format(*_LEAST_CAPABILITY)
    return None


def multiprocessors(device: torch.device) -> int:
    """SMs of a CUDA device; 1 elsewhere."""
    if device.type != "cuda":
        return 1
    return int(torch.cuda.get_device_properties(device).multi_processor_count)
