"""Module that holds learned vectors and returns them by name."""

from __future__ import annotations

from collections.abc import Mapping

from jaxtyping import Float
from torch import Tensor, nn

from perceiver_core.layers import init


class NamedVectors(nn.Module):
    """Learned vectors, one per name. The names are also the keys of the state dict.

    Calling the module with a name returns a vector. An `nn.ParameterDict` has the same state dict, but is never called,
    so hooks that load the weights of a module when it runs (offloading, sharding) would not load its vectors.

    Args:
        widths: Mapping from names to widths.

    Example:
        >>> from perceiver_core.layers.named_vectors import NamedVectors
        >>> vectors = NamedVectors({"image": 5, "label": 7})
        >>> vectors("label").shape, list(vectors.state_dict())
        (torch.Size([7]), ['image', 'label'])
    """

    def __init__(self, widths: Mapping[str, int]) -> None:
        super().__init__()
        for name, width in widths.items():
            self.register_parameter(name, init.embedding(width))

    def __getitem__(self, name: str) -> nn.Parameter:
        parameter: nn.Parameter = getattr(self, name)
        return parameter

    def forward(self, name: str) -> Float[Tensor, " width"]:
        """Return a copy of the vector `name`, because FSDP frees the memory of a parameter after its module has run."""
        vector: Tensor = getattr(self, name)  # a plain tensor, not a parameter, in replicas of DataParallel
        return vector.clone()
