"""Random draws from a user's generator that repeat under activation checkpointing.

Activation checkpointing restores the state of PyTorch's default generator before it runs a forward pass again, but not
the state of other generators: their draws would differ, and gradients would be silently wrong.
"""

from __future__ import annotations

import hashlib
import inspect
from collections import OrderedDict
from weakref import WeakKeyDictionary, ref

import torch
import torch.utils.checkpoint
from torch import Tensor

MAX_STATES = 1024  # forward passes that can be repeated where the checkpoint is not known


class RepeatableDraws:
    """Recorded states of a user's generator before the draws of one module, restored if a forward pass is recomputed.

    Non-reentrant checkpoints are identified by the frame that their hooks and functions hold. Other passes (reentrant
    checkpoints) are identified by the state of the default generator, which checkpointing restores; of several passes
    that start from the same state, the last one is repeated.
    """

    def __init__(self) -> None:
        self._frames: WeakKeyDictionary[object, _Frame] = WeakKeyDictionary()
        self._states: OrderedDict[bytes, Tensor] = OrderedDict()

    def __reduce__(self) -> tuple[type[RepeatableDraws], tuple[()]]:
        """Copy and pickle without the states: they belong to running forward passes."""
        return type(self), ()

    def generator(self, generator: torch.Generator | None) -> torch.Generator | None:
        """Return the generator to use in one forward pass; None stands for PyTorch's default generator.

        In an original pass it is `generator` itself. In a recomputed pass it is a copy with the state that `generator`
        had in the original pass.
        """
        if generator is None or torch.compiler.is_compiling():
            return generator
        task = torch._C._current_graph_task_id()  # of the backward pass that this call is in, or -1
        frame, key = _checkpoint_frame(), _default_state()
        if task == -1:
            state = generator.get_state()
            self._states[key] = state
            self._states.move_to_end(key)
            if len(self._states) > MAX_STATES:
                self._states.popitem(last=False)
            if frame is not None:
                self._frames.setdefault(frame, _Frame()).states.append(state)
            return generator
        known = None if frame is None else self._frames.get(frame)  # not of a checkpoint inside a repeated one
        repeated = self._states.get(key) if known is None else known.next_state(task)
        return generator if repeated is None else torch.Generator(generator.device).set_state(repeated)


class _Frame:
    """States of the draws in one checkpoint, in order, and the number repeated in each backward pass."""

    def __init__(self) -> None:
        self.states: list[Tensor] = []
        self._repeated: dict[int, int] = {}

    def next_state(self, task: int) -> Tensor | None:
        number = self._repeated.get(task, 0)
        self._repeated[task] = number + 1
        return self.states[number % len(self.states)]


_top_hooks = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", None)  # not in PyTorch 2.6


def _checkpoint_frame() -> object | None:
    """Return the frame of the innermost non-reentrant checkpoint, in an original pass and in a repeated one."""
    hooks = _top_hooks(True) if _top_hooks else ()
    if hooks is None:
        return None
    return (_frame_in(inspect.unwrap(hooks[0])) if hooks else None) or _frame_on_the_stack()


def _frame_on_the_stack() -> object | None:
    """Return the checkpoint's frame that its running functions hold, where other hooks cover its own."""
    call = inspect.currentframe()
    while call is not None:
        if call.f_code.co_filename == torch.utils.checkpoint.__file__:
            local = call.f_locals
            if "frame" in local:  # repeats the pass: `unpack_hook`
                return local["frame"]
            if inspect.isgenerator(local.get("gen")):  # original pass: `checkpoint`, with its suspended generator
                suspended = local["gen"].gi_frame
                return suspended and suspended.f_locals.get("new_frame")
        call = call.f_back
    return None


def _frame_in(hook: object) -> object | None:
    """Return the frame that the hook of a checkpoint holds in its closure, weakly in a repeated pass."""
    for cell in getattr(hook, "__closure__", None) or ():
        held = cell.cell_contents() if isinstance(cell.cell_contents, ref) else cell.cell_contents
        if type(held).__name__ == "_CheckpointFrame":
            return held
    return None


def _default_state() -> bytes:
    return hashlib.blake2b(torch.get_rng_state().numpy().tobytes(), digest_size=16).digest()
