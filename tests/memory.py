"""Memory that computations allocate and keep, measured at each operation of PyTorch."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode


class Largest(TorchDispatchMode):
    """Records the size of the largest tensor that any operation allocates, views excluded."""

    size = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        results = func(*args, **(kwargs or {}))
        for out in _tensors(results):
            if not func.is_view:
                self.size = max(self.size, out.numel())
        return results


class Kept(TorchDispatchMode):
    """Tracks the storages allocated inside the context that are still alive, saved tensors of a graph included."""

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
        """Total size in bytes of all storages that are alive."""
        return sum(size for storage, size in self._made.values() if not storage.expired())


def _tensors(results: object) -> Iterator[Tensor]:
    for out in results if isinstance(results, (list, tuple)) else [results]:
        if isinstance(out, Tensor):
            yield out
