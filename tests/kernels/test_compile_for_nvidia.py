"""Every kernel compiles to machine code for the devices it is written for; no device is needed for that.

The interpreter runs Python and would never notice what Triton's compiler refuses.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="triton is not installed")

SHARED_BYTES = {"sm_80": 163 * 1024, "sm_90": 227 * 1024}
"""What one program may use on an A100 and an H100."""


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    script = Path(__file__).with_name("compile_for_nvidia.py")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path_factory.mktemp("triton"))
    environment["PYTHONPATH"] = os.pathsep.join(sys.path)
    done = subprocess.run([sys.executable, script], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout)


def test_every_kernel_compiles_and_fits(compiled):
    assert len(compiled) == 13
    for name, found in compiled.items():
        assert found["shared_bytes"] <= SHARED_BYTES[name[:5]], name
        if "quantise" not in name:
            assert found["tensor_cores"], name


def test_exact_arithmetic_stays_exact(compiled):
    for name, found in compiled.items():
        if "fill" in name or "decode" in name or name.endswith("quantise "):
            assert not found["contracts"], name
        if "quantise" in name or "factorised" in name:
            assert found["exact_division"], name


def test_joined_launches_have_their_barrier(compiled):
    for name, found in compiled.items():
        assert found["barrier"] == ("adapter factorised" in name or "adapter linear" in name), name
