"""Compiles the Triton kernels for a GPU that need not be present, and prints a line of JSON for each.

test_triton_kernels.py runs it in a process of its own, in which Triton does not interpret.
"""

from __future__ import annotations

import json
import os
import re
import sys

os.environ.pop("TRITON_INTERPRET", None)

from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile

try:
    from triton.backends.compiler import AttrsDescriptor  # Triton 3.2, which comes with PyTorch 2.6
except ImportError:
    AttrsDescriptor = None

from perceiver_core.kernels.grid import triton_kernels
from perceiver_core.kernels.grid.triton_launch import (
    QUERY_OPTIONS_MATRIX,
    QUERY_OPTIONS_REGISTERS,
    TOKEN_OPTIONS_MATRIX,
    TOKEN_OPTIONS_REGISTERS,
)

SIZES = {"heads", "queries", "height", "width", "padded_width", "stretches", "blocks", "splits", "groups", "pieces"}


def compile_kernel(name: str, capability: int, channels: int, *, masked: bool, dtype: str, **option: int):
    """Compiles a kernel for sizes that are multiples of 16, where it may know them."""
    kernel, padded = getattr(triton_kernels, name), 1 << (channels - 1).bit_length()
    constants = {
        "CHANNELS": channels,
        "PADDED": padded,
        "SHARED": True,
        "MASKED": masked,
        "PRECISION": "ieee" if dtype == "fp64" else "tf32x3",
        **{key: value for key, value in option.items() if key.isupper()},
    }
    signature = dict.fromkeys(kernel.arg_names, f"*{dtype}") | dict.fromkeys(SIZES & {*kernel.arg_names}, "i32")
    known = [i for i, p in enumerate(kernel.params) if p.name not in constants and not p.do_not_specialize]
    multiples = [i for i in known if kernel.arg_names[i] not in ("heads", "splits", "groups")]
    if AttrsDescriptor is None:
        signature |= dict.fromkeys(constants, "constexpr")
        source = ASTSource(kernel, signature, constants, {(i,): [["tt.divisibility", 16]] for i in multiples})
    else:
        signature = {key: value for key, value in signature.items() if key not in constants}
        source = ASTSource(kernel, signature, constants, AttrsDescriptor.from_hints(dict.fromkeys(multiples, 16)))
    options = {key: value for key, value in option.items() if key.islower()}
    return compile(source, target=GPUTarget("cuda", capability, 32), options=options)


def main() -> None:
    capability = int(sys.argv[1])
    for channels, dtype, masked in ((1, "fp32", True), (3, "fp32", False), (3, "fp64", True), (64, "fp32", True)):
        in_registers = channels < 16
        stretch, block = (16, 16) if in_registers else (32, 16)
        query_options = QUERY_OPTIONS_REGISTERS if in_registers else QUERY_OPTIONS_MATRIX
        token_options = TOKEN_OPTIONS_REGISTERS if in_registers else TOKEN_OPTIONS_MATRIX
        cases = [
            (name, {"STRETCH": stretch, **option})
            for name in ("forward", "backward_queries")
            for option in query_options[:2]
        ]
        cases += [("backward_tokens", {"BLOCK": block, **option}) for option in token_options[:1]]
        for name, option in cases:
            kernel = compile_kernel(name, capability, channels, masked=masked, dtype=dtype, **option)
            code = kernel.asm["ptx"]
            report = {
                "kernel": name,
                "channels": channels,
                "option": option,
                "shared": kernel.metadata.shared,
                "shuffles": len(re.findall(r"shfl\.", code)),
                "barriers": len(re.findall(r"bar(rier)?\.sync", code)),
            }
            print(json.dumps(report))


if __name__ == "__main__":
    main()
