"""Random draws from a generator of the user's that repeat under activation checkpointing.

Activation checkpointing restores the state of PyTorch's default generator before it runs a forward pass again, but not
that of other generators: draws from these would differ, and gradients would be silently wrong.
"""

from __future__ import annotations

from collections import OrderedDict

import torch

REMEMBERED = 4096  # forward passes whose draws can be repeated


class RepeatableDraws:
    """Random draws of one module.

    Each forward pass draws a seed from the user's generator, and remembers it under a number drawn from the default
    generator. When activation checkpointing runs the pass again, inside a backward pass, the default generator gives
    the same number, which finds the seed.
    """

    def __init__(self) -> None:
        self._seeds: OrderedDict[int, int] = OrderedDict()

    def generator(self, generator: torch.Generator | None) -> torch.Generator | None:
        """Return the generator for the draws of one forward pass: None, the default generator, for None."""
        if generator is None or torch.compiler.is_compiling():
            return generator
        number = int(torch.randint(2**62, ()))
        recomputing = torch._C._current_graph_task_id() != -1
        seed = self._seeds.get(number) if recomputing else None
        if seed is None:
            seed = int(torch.randint(2**62, (), generator=generator, device=generator.device))
            self._seeds[number] = seed
            while len(self._seeds) > REMEMBERED:
                self._seeds.popitem(last=False)
        return torch.Generator(generator.device).manual_seed(seed)
