"""What computations make and keep, seen one operation of PyTorch at a time."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode


class Largest(TorchDispatchMode):
    """Remembers the size of the largest tensor that any operation made, views aside."""

    size = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        results = func(*args, **(kwargs or {}))
        for out in _tensors(results):
            if not func.is_view:
                self.size = max(self.size, out.numel())
        return results


class Kept(TorchDispatchMode):
    """Knows how much of what was made inside still lives, a graph's saved tensors included."""

    def __init__(self) -> None:
        super().__init__()
        self._made: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        results = func(*args, **(kwargs or {}))
        for out in _tensors(results):
            if not func.is_view:
                storage = out.untyped_storage()
                self._made[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        return results

    @property
    def bytes(self) -> int:
        """Of all storages that live."""
        return sum(size for storage, size in self._made.values() if not storage.expired())


def _tensors(results: object) -> Iterator[Tensor]:
    for out in results if isinstance(results, (list, tuple)) else [results]:
        if isinstance(out, Tensor):
            yield out
