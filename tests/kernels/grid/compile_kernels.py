"""Compiles the Triton kernels for a GPU that need not be there, and prints a line of JSON for each.

Run by test_triton.py in a process of its own, where Triton does not interpret.
"""

from __future__ import annotations

import json
import os
import re
import sys

os.environ.pop("TRITON_INTERPRET", None)

from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile

from perceiver_core.kernels.grid import gpu, kernels

SIZES = {"heads", "queries", "height", "width", "wide", "stretches", "blocks", "splits", "groups", "pieces"}


def compiled(name: str, capability: int, channels: int, *, masked: bool, dtype: str, **option: int):
    """A kernel as it is compiled for sizes that are multiples of 16, where it may know them."""
    kernel, padded = getattr(kernels, name), 1 << (channels - 1).bit_length()
    constants = {
        "CHANNELS": channels,
        "PADDED": padded,
        "SHARED": True,
        "MASKED": masked,
        "PRECISION": "ieee" if dtype == "fp64" else "tf32x3",
        **{key: value for key, value in option.items() if key.isupper()},
    }
    numbers = dict.fromkeys(kernel.arg_names, f"*{dtype}") | dict.fromkeys(SIZES & {*kernel.arg_names}, "i32")
    told = [i for i, p in enumerate(kernel.params) if p.name not in constants and not p.do_not_specialize]
    source = ASTSource(
        kernel,
        numbers | dict.fromkeys(constants, "constexpr"),
        constants,
        {(i,): [["tt.divisibility", 16]] for i in told if kernel.arg_names[i] not in ("heads", "splits", "groups")},
    )
    options = {key: value for key, value in option.items() if key.islower()}
    return compile(source, target=GPUTarget("cuda", capability, 32), options=options)


def main() -> None:
    capability = int(sys.argv[1])
    for channels, dtype, masked in ((1, "fp32", True), (3, "fp32", False), (3, "fp64", True), (64, "fp32", True)):
        few = channels < 16
        stretch, block = (16, 16) if few else (32, 16)
        cases = [
            (name, {"STRETCH": stretch, **o})
            for name in ("forward", "backward_queries")
            for o in (gpu.FEW if few else gpu.MANY)[:2]
        ]
        cases += [("backward_tokens", {"BLOCK": block, **o}) for o in (gpu.FEW_TOKENS if few else gpu.MANY_TOKENS)[:1]]
        for name, option in cases:
            made = compiled(name, capability, channels, masked=masked, dtype=dtype, **option)
            code = made.asm["ptx"]
            found = {
                "kernel": name,
                "channels": channels,
                "option": option,
                "shared": made.metadata.shared,
                "shuffles": len(re.findall(r"shfl\.", code)),
                "barriers": len(re.findall(r"bar(rier)?\.sync", code)),
            }
            print(json.dumps(found))


if __name__ == "__main__":
    main()
