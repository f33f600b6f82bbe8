"""What the project is worked on with. `shapes` is imported here because jaxtyping imports only the package."""

from tools import shapes

__all__ = ["shapes"]
