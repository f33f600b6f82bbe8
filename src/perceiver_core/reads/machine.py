"""Machine constants of the cost model: throughput and overhead of the operations in a read.

`reads.Auto` ranks strategies by predicted cost, so the ratios of costs matter more than their absolute values. The
cost model covers the forward pass only. With every strategy, the backward pass takes about two to three times as long.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from perceiver_core import argument_types
from perceiver_core.registry import register

SHORT_ROW = 64  # length of the last grid axis at which the time per channel is twice as long as for a long axis

TIMES = ("softmax", "pair", "channel", "start")  # constants of `Machine` that may be 0; all others are divisors


class Cost(NamedTuple):
    """Predicted cost of one read (cross-attention): forward pass only, for the whole batch.

    Args:
        flops: Number of floating-point operations.
        bytes: Number of bytes read and written.
        seconds: Time in seconds, on a single CPU thread or on the whole GPU.
    """

    flops: float
    bytes: float
    seconds: float


@register
@dataclass(frozen=True)
class Machine:
    """Constants of the cost model, for a single CPU thread or for a whole GPU.

    The defaults are per thread, measured on an AMD EPYC (Zen 5) with PyTorch 2.13. `python -m perceiver_core costs`
    measures and prints the constants of the current machine.

    Args:
        linear: Throughput of linear layers in float32, in GFLOP/s.
        matmul: Throughput of other large matrix products in float32, in GFLOP/s.
        matmul_half: Throughput of large matrix products in bfloat16 or float16, in GFLOP/s.
        attention: Throughput of the two matrix products in the default attention kernel in float32, in GFLOP/s.
        attention_half: Like `attention`, but in bfloat16 or float16.
        attention_wide: Like `attention_half`, for head dimensions above 256, which CUDA flash kernels do not support.
        softmax: Time of the attention kernel without its matrix products, in nanoseconds per attention score.
        copy: Bandwidth of reading and writing large tensors, in GB/s.
        pair: Time of a structured read with zero content channels, in nanoseconds per attention score.
        channel: Additional time per content channel, in nanoseconds per attention score, if the last grid axis is long.
        start: Fixed overhead of factored and structured reads, in microseconds (CPU: times the number of threads).
        blocks: Number of blocks of 32 queries, over all heads and samples, that fully occupy the device. On a GPU, it
            is the number of streaming multiprocessors (SMs). It is used for head dimensions above 256, because their
            CUDA kernel does not parallelize over keys.

    Raises:
        ValueError: If a throughput, a bandwidth or `blocks` is not above 0, or a time is negative.

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

    def __post_init__(self) -> None:
        argument_types.check_fields(self)
        for name, value in vars(self).items():
            if value < 0 or (value == 0 and name not in TIMES):
                raise ValueError(f"{name} must be {'at least' if name in TIMES else 'above'} 0; got {value!r}")


MEASURED_CPU = Machine()
# Estimates (not measurements) for a Hopper GPU. Matrix products and copies: derived from the vendor's peak rates, minus
# typical losses. Structured reads: from the instruction count of the inner loop. Overhead: from the number of kernel
# launches.
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
"""Dictionary of default machine constants, keyed by device type."""
