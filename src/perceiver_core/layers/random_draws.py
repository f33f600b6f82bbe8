"""Random draws from a user's generator that are the same when activation checkpointing recomputes a forward pass.

Before the recomputation, activation checkpointing restores the state of PyTorch's default generator, but not the states
of other generators. Without this module, the recomputed draws would differ, and gradients would be silently wrong.
"""

from __future__ import annotations

import hashlib
import inspect
from collections import OrderedDict
from weakref import WeakKeyDictionary, ref

import torch
import torch.utils.checkpoint
from torch import Tensor

MAX_STATES = 1024  # recorded forward passes that are identified by the state of the default generator


class RepeatableDraws:
    """Record of generator states that makes a module's random draws the same in a recomputed forward pass.

    A recomputed pass has to be matched to its original pass. In non-reentrant activation checkpointing, both passes
    have the same `_CheckpointFrame` object. In reentrant activation checkpointing, both start from the same state of
    the default generator. If several original passes started from this state, the draws of the last one are repeated.
    """

    def __init__(self) -> None:
        self._frames: WeakKeyDictionary[object, _Frame] = WeakKeyDictionary()
        self._states: OrderedDict[bytes, Tensor] = OrderedDict()

    def __reduce__(self) -> tuple[type[RepeatableDraws], tuple[()]]:
        """Leave out the recorded states in copies and pickles, because they belong to forward passes of this object."""
        return type(self), ()

    def generator(self, generator: torch.Generator | None) -> torch.Generator | None:
        """Return the generator to use in one forward pass. None stands for PyTorch's default generator.

        In an original pass, return `generator` itself. In a recomputed pass, return a new generator with the state that
        `generator` had in the original pass.
        """
        if generator is None or torch.compiler.is_compiling():
            return generator
        task = torch._C._current_graph_task_id()  # id of the backward pass in progress, or -1
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
        known = None if frame is None else self._frames.get(frame)  # None for a checkpoint inside a recomputed one
        repeated = self._states.get(key) if known is None else known.next_state(task)
        return generator if repeated is None else torch.Generator(generator.device).set_state(repeated)


class _Frame:
    """Generator states recorded in one activation checkpoint. Each backward pass repeats them in the same order."""

    def __init__(self) -> None:
        self.states: list[Tensor] = []
        self._repeated: dict[int, int] = {}

    def next_state(self, task: int) -> Tensor | None:
        number = self._repeated.get(task, 0)
        self._repeated[task] = number + 1
        return self.states[number % len(self.states)]


_top_hooks = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", None)  # not in PyTorch 2.6


def _checkpoint_frame() -> object | None:
    """Return the `_CheckpointFrame` of the innermost non-reentrant activation checkpoint, or None if there is none."""
    hooks = _top_hooks(True) if _top_hooks else ()
    if hooks is None:
        return None
    return (_frame_in(inspect.unwrap(hooks[0])) if hooks else None) or _frame_on_the_stack()


def _frame_on_the_stack() -> object | None:
    """Return the `_CheckpointFrame` found on the call stack, or None. Needed inside other saved-tensor hooks."""
    call = inspect.currentframe()
    while call is not None:
        if call.f_code.co_filename == torch.utils.checkpoint.__file__:
            local = call.f_locals
            if "frame" in local:  # recomputed pass: `unpack_hook`
                return local["frame"]
            if inspect.isgenerator(local.get("gen")):  # original pass: `checkpoint`, with its suspended generator
                suspended = local["gen"].gi_frame
                return suspended and suspended.f_locals.get("new_frame")
        call = call.f_back
    return None


def _frame_in(hook: object) -> object | None:
    """Return the `_CheckpointFrame` that a hook holds in its closure (also as a weak reference), or None."""
    for cell in getattr(hook, "__closure__", None) or ():
        held = cell.cell_contents() if isinstance(cell.cell_contents, ref) else cell.cell_contents
        if type(held).__name__ == "_CheckpointFrame":
            return held
    return None


def _default_state() -> bytes:
    return hashlib.blake2b(torch.get_rng_state().numpy().tobytes(), digest_size=16).digest()
