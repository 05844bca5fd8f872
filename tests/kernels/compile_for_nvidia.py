"""Compiles the kernels to machine code for an H100 and an A100, without a device; prints one JSON document.

A program of its own: Triton's interpreter and its compiler cannot be had in one process.
"""

from __future__ import annotations

import json

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from hestctl.kernels import adapter_triton, matmul_triton, quantise_triton

PRODUCT = {"q_x": "*i8", "q_w": "*i8", "s_x": "*fp32", "s_w": "*fp32", "bias": "*fp16", "out": "*fp16"}
ROW = {"x": "*fp16", "beside": "*fp16", "weight": "*fp16", "q": "*i8", "scale": "*fp32", "total": "*fp16"}
MODEL = ("h", "out", "down", "up", "scale", "controller")
FLOAT = ("mix", "threshold", "gap", "centre_spread", "part")
WHOLE = ("income", "purse", "seen", "counts", "arrivals", "held")


def machine_code(kernel, types, constants, capability, **options):
    """Bytes of shared memory and the assembly of one variant; every pointer is aligned to 16 bytes."""
    names = [parameter.name for parameter in kernel.params]
    source = ASTSource(
        fn=kernel,
        signature={name: types.get(name, "constexpr") for name in names},
        constexprs={(names.index(name),): value for name, value in constants.items()},
        attrs={
            (i,): [["tt.divisibility", 16]] for i, name in enumerate(names) if types.get(name, "")[:1] == "*"
        },
    )
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    assert compiled.asm["cubin"]
    return compiled.metadata.shared, compiled.asm["ptx"]


def product(kernel, capability, *, rows, blocks, **constants):
    """``rows`` None is any number; 1 is a variant of its own, as at launch."""
    names = ("BN", "BM", "BK")
    types = {**PRODUCT, "outputs": "i32", **({"rows": "i32"} if rows is None else {})}
    constants |= {"HAS_BIAS": True, **dict(zip(names, blocks[:3], strict=True))}
    if rows is not None:
        constants["rows"] = rows
    options = {"num_warps": blocks[3], "num_stages": blocks[4], "enable_fp_fusion": False}
    return machine_code(kernel, types, constants, capability, **options)


def adapter(gate, capability, *, rows, before, after):
    width = {"factorised": 32, "linear": 16, "static": 0}[gate]
    types = dict.fromkeys(MODEL, "*fp16") | dict.fromkeys(FLOAT, "*fp32") | dict.fromkeys(WHOLE, "*i64")
    types |= {"real": "*i1"} | ({} if rows == 1 else {"rows": "i32", "requests": "i32"})
    constants = {"D": 4096, "R": 16, "K": width, "BEAMS": 1 if rows == 1 else 4, "TILE": 16, "SLICES": 32}
    constants |= {"GATE": gate, "LEDGER": True, "BEFORE": before, "AFTER": after, "ROWS": 16, "BD": 128}
    constants |= {"BR": 16, "BK": max(16, width), "NORM": 1024, "UNROLL": 16}
    if rows == 1:
        constants |= {"rows": 1, "requests": 1}
    joined = {"launch_cooperative_grid": before and after}
    return machine_code(adapter_triton._adapter_kernel, types, constants, capability, num_warps=4, **joined)


def variants(capability):
    prefill, decode = matmul_triton._prefill_kernel, matmul_triton._decode_kernel
    yield "prefill", product(prefill, capability, rows=None, blocks=(128, 256, 128, 8, 3), K=4096, GROUP=8)
    yield "decode", product(decode, capability, rows=1, blocks=(16, 16, 512, 4, 4), K=4096)
    yield "adapter factorised", adapter("factorised", capability, rows=None, before=True, after=True)
    if capability == 80:
        return
    yield "prefill edge", product(prefill, capability, rows=None, blocks=(64, 128, 128, 4, 4), K=133, GROUP=8)
    yield "decode edge", product(decode, capability, rows=None, blocks=(16, 64, 256, 8, 3), K=520)
    for before in ("", "add_rms", "silu_mul"):
        types = {**ROW, "inputs": "i32", "stride": "i32", "epsilon": "fp32"}
        constants = {"BEFORE": before, "BLOCK": 16384}
        kernel = quantise_triton._quantise_kernel
        yield f"quantise {before}", machine_code(kernel, types, constants, capability, num_warps=32)
    yield "adapter, one row", adapter("factorised", capability, rows=1, before=False, after=True)
    yield "adapter linear", adapter("linear", capability, rows=1, before=True, after=True)


if __name__ == "__main__":
    found = {}
    for capability in (80, 90):
        for name, (shared, ptx) in variants(capability):
            found[f"sm_{capability} {name}"] = {
                "shared_bytes": shared,
                "tensor_cores": "mma" in ptx,
                "barrier": "atom.global.gpu.acq_rel" in ptx and "ld.global.gpu.acquire" in ptx,
                "exact_division": "div.rn" in ptx,
                "contracts": "fma.rn.f32" in ptx,
            }
    print(json.dumps(found))
