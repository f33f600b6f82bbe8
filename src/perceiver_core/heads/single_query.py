"""Head for decoders with a single query."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor, nn

from perceiver_core.registry import register


@register
class SingleQuery(nn.Module):
    """Head for decoders with a single query: applies `head` (none by default) and removes the query axis.

    Use it for models with one output per sample, such as the class logits of an image.

    Example:
        >>> pc.heads.SingleQuery(pc.heads.Linear(32, out_dim=10))(torch.randn(2, 1, 32)).shape
        torch.Size([2, 10])

    Reference: deepmind-research/perceiver/perceiver.py, `ClassificationDecoder`.
    """

    def __init__(self, head: nn.Module | None = None) -> None:
        super().__init__()
        self.head = nn.Identity() if head is None else head
        self.dim = getattr(head, "dim", None)

    def forward(self, outputs: Float[Tensor, "b 1 d"]) -> Float[Tensor, "b values"]:
        """Return the output of the single query, without the query axis.

        Raises:
            ValueError: If `outputs` does not have shape `b 1 d`.
        """
        if outputs.ndim != 3 or outputs.shape[1] != 1:
            raise ValueError(f"outputs must be one per sample, b 1 d; got shape {tuple(outputs.shape)}")
        return self.head(outputs)[:, 0]
