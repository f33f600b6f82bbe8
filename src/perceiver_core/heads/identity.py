"""Head that returns the latents, for feature extraction."""

from functools import partial

from jaxtyping import Float
from torch import Tensor, nn

from perceiver_core.registry import register


@partial(register, name="heads.Identity")
class Identity(nn.Module):
    """Head that returns the latents unchanged.

    Example:
        >>> pc.heads.Identity()(torch.randn(2, 7, 32)).shape
        torch.Size([2, 7, 32])
    """

    def forward(self, latents: Float[Tensor, "b m d"]) -> Float[Tensor, "b m d"]:
        """Return the latents."""
        return latents
