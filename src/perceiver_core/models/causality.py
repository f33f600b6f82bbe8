"""Check that the parts of Perceiver AR are causal: no output may depend on a later token."""

from __future__ import annotations

from torch import nn

from perceiver_core.kernels.attention_weights import unwrapped


def check_causal(**parts: nn.Module) -> None:
    """Check the attention modules inside the parts of Perceiver AR, which are passed by name.

    Raises:
        ValueError: If a kernel takes the softmax over the queries, so that earlier queries depend on later ones.
        ValueError: If the rotary positions of `cross_attention` do not end at the last token. The queries are the last
            tokens, so queries and keys would count positions from different tokens.
    """
    for name, part in parts.items():
        for module in part.modules():
            kernel = unwrapped(getattr(module, "kernel", None))
            if getattr(kernel, "competes", False):
                raise ValueError(
                    f"{name} must have a kernel with a softmax over the keys, such as kernels.fastest; "
                    f"got {getattr(kernel, '__name__', kernel)}, with which a token depends on later tokens"
                )
            rotary = getattr(module, "rotary", None)
            if name == "cross_attention" and not getattr(rotary, "from_end", True):
                raise ValueError("cross_attention must have Rotary(from_end=True); got from_end=False")
