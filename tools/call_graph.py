"""Count the library's function calls, and its switches between files, in one forward pass of an image classifier.

    python tools/call_graph.py            counts for a dense read and for the default one
    python tools/call_graph.py --list     every call, indented by its depth

The model has one read and one self-attend. Counted with `sys.setprofile` in the second call, on the CPU: frames of
perceiver_core, comprehensions left out. A switch is a call into another file than the call before it.
"""

from __future__ import annotations

import argparse
import sys
from functools import partial
from itertools import pairwise
from pathlib import Path
from types import FrameType
from typing import NamedTuple

if not __package__:  # run by its path, not with `python -m`
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
if __name__ == "__main__":
    from examples.common.command import exit_on_signals

    exit_on_signals()

import torch
from torch import Tensor, nn

import perceiver_core as pc
from examples.common.command import run_command

ROOT = Path(pc.__file__).parent
COMPREHENSIONS = ("<listcomp>", "<genexpr>", "<dictcomp>", "<setcomp>", "<lambda>")


class Call(NamedTuple):
    """A call of a function of the library."""

    depth: int
    file: str
    function: str


def calls_of(model: nn.Module, x: Tensor) -> list[Call]:
    """Return every library call of the second forward pass, in order."""
    model(x)
    calls: list[Call] = []
    depth = 0

    def profile(frame: FrameType, event: str, _: object) -> None:
        nonlocal depth
        code = frame.f_code
        if not code.co_filename.startswith(f"{ROOT}/") or code.co_name in COMPREHENSIONS:
            return
        if event == "call":
            name = getattr(code, "co_qualname", code.co_name)  # Python 3.11
            calls.append(Call(depth, code.co_filename.removeprefix(f"{ROOT}/"), name))
            depth += 1
        elif event == "return":
            depth -= 1

    sys.setprofile(profile)
    try:
        model(x)
    finally:
        sys.setprofile(None)
    return calls


def image_classifier(strategy: pc.reads.Strategy) -> pc.Perceiver:
    """Return a classifier of 48 x 64 images with one read and one self-attend."""
    positions = pc.positions.Fourier(num_axes=2, num_bands=16, max_resolution=(48, 64))
    image = pc.adapters.Image(3, positions=positions)
    read = partial(pc.CrossAttend, strategy=strategy)
    encoder = pc.Encoder(image.dim, num_latents=64, dim=128, depth=1, num_heads=4, cross_attention=read)
    return pc.Perceiver(image, encoder, pc.heads.Classification(128, num_classes=10)).eval()


def main() -> None:
    """Print the counts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--list", action="store_true", help="print every call")
    options = parser.parse_args()
    for name, strategy in (("dense", pc.reads.Dense()), ("default", pc.reads.Auto())):
        with torch.no_grad():
            calls = calls_of(image_classifier(strategy), torch.randn(2, 3, 48, 64))
        files = [call.file for call in calls]
        switches = sum(first != second for first, second in pairwise(files))
        print(f"{name} read: {len(calls)} calls, {len(set(files))} files, {switches} switches between files")
        if options.list:
            print("\n".join(f"{'  ' * call.depth}{call.function}  [{call.file}]" for call in calls))


if __name__ == "__main__":
    sys.exit(run_command(main))
