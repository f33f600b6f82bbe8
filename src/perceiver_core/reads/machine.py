"""Throughput of a machine at the operations of a read, from which costs are predicted.

Costs decide which strategy a read takes (`reads.Auto`), so ratios matter more than absolute values. They describe the
forward pass; the backward pass takes about two to three times as long, with every strategy.
"""

from __future__ import annotations

from dataclasses import dataclass

from perceiver_core.registry import register

SHORT_ROW = 64  # tokens in a row for which sums over the channels take twice as long as in long rows


@register
@dataclass(frozen=True)
class Machine:
    """Throughput of one CPU thread, or of a whole GPU.

    The defaults are those of one thread, measured on an AMD EPYC (Zen 5) with PyTorch 2.13. `python -m perceiver_core
    costs` measures and prints those of the machine at hand.

    Args:
        linear: Linear layers in float32, in GFLOP/s.
        matmul: Other products of large float32 matrices, in GFLOP/s.
        matmul_half: Products of large matrices in bfloat16 or float16, in GFLOP/s.
        attention: The two products of the default attention kernel in float32, in GFLOP/s.
        attention_half: The same in bfloat16 or float16.
        attention_wide: The same in bfloat16 or float16 for heads wider than 256, which no flash kernel takes on CUDA.
        softmax: The rest of the attention kernel, in nanoseconds per query and token.
        copy: Reading and writing large tensors, in GB/s.
        pair: A structured read, in nanoseconds per query and token.
        channel: Additional nanoseconds per query, token and content channel, in long rows.
        start: Fixed overhead of factored and structured reads, in microseconds of all threads together.
        blocks: Number of blocks of 32 queries that keep the machine busy with heads wider than 256, for which the CUDA
            kernel parallelizes over queries alone.

    Example:
        >>> read = pc.CrossAttend(32, 10, strategy=pc.reads.Auto(machine=pc.reads.Machine(linear=400.0)))
    """

    linear: float = 200.0
    matmul: float = 100.0
    matmul_half: float = 430.0
    attention: float = 88.0
    attention_half: float = 180.0
    attention_wide: float = 180.0
    softmax: float = 0.36
    copy: float = 10.0
    pair: float = 0.37
    channel: float = 0.036
    start: float = 1000.0
    blocks: float = 1.0


MEASURED_CPU = Machine()
# A GPU of the Hopper generation, estimated and not measured: products and copies from the vendor's peak rates, less the
# usual losses; structured reads from the instruction count of their loop; the overhead from the number of launches.
ESTIMATED_GPU = Machine(
    linear=45_000.0,
    matmul=45_000.0,
    matmul_half=600_000.0,
    attention=20_000.0,
    attention_half=400_000.0,
    attention_wide=120_000.0,
    softmax=0.0,
    copy=3_500.0,
    pair=0.0006,
    channel=0.0001,
    start=400.0,
    blocks=132.0,
)
DEFAULTS = {"cpu": MEASURED_CPU, "cuda": ESTIMATED_GPU}
"""Machine constants by device type."""
