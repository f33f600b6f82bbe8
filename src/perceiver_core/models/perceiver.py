"""Perceiver model, composed of an adapter, an encoder and a head."""

from __future__ import annotations

from collections.abc import Mapping

from jaxtyping import Float
from torch import Tensor, nn

from perceiver_core.adapters.lengths import options
from perceiver_core.reads import AttentionCapture
from perceiver_core.registry import register


@register
class Perceiver(nn.Module):
    """Perceiver for any modality. The adapter determines the type of input, and the head the type of output.

        raw input --adapter--> tokens --encoder--> latents --head--> output

    Args:
        adapter: Module that maps the raw input to tokens; see `adapters`. Use `nn.Identity()` if the input is already a
            tensor `b n c` or `Tokens`. A mask is then passed inside the `Tokens`.
        encoder: Module that maps tokens to latents; see `Encoder`.
        head: Module that maps latents to the output; see `heads`.

    Raises:
        TypeError: If a component is not a module.
        ValueError: If `adapter.dim` differs from `encoder.input_dim`, or `encoder.dim` from `head.dim`. Components
            without these attributes are not checked.

    Example:
        >>> positions = pc.positions.Fourier(num_axes=2, num_bands=8, max_resolution=32)
        >>> image = pc.adapters.Image(num_channels=3, positions=positions)
        >>> encoder = pc.Encoder(image.dim, num_latents=16, dim=32, num_reads=2, depth=2, num_heads=4)
        >>> model = pc.Perceiver(image, encoder, pc.heads.Classification(encoder.dim, num_classes=10))
        >>> model(torch.rand(2, 3, 31, 23)).shape
        torch.Size([2, 10])

    Reference: Jaegle et al. 2021, "Perceiver: General Perception with Iterative Attention", figure 1.
    """

    def __init__(self, adapter: nn.Module, encoder: nn.Module, head: nn.Module) -> None:
        super().__init__()
        parts = {"adapter": adapter, "encoder": encoder, "head": head}
        check_parts(parts, {"adapter.dim": "encoder.input_dim", "encoder.dim": "head.dim"})
        self.adapter, self.encoder, self.head = adapter, encoder, head

    def forward(
        self,
        inputs: object,
        *,
        mask: object = None,
        lengths: object = None,
        capture: AttentionCapture | None = None,
    ) -> Float[Tensor, "b ..."]:
        """Return the output of the head.

        Args:
            inputs: Input of the adapter, such as images `b c h w`, audio `b s` or points `b n f`.
            mask: Mask of valid inputs, True = attend, in the shape that the adapter expects.
            lengths: Sizes of the inputs before padding, as the adapter expects them, such as numbers of samples, `b`.
            capture: Container for the attention weights of the encoder read (cross-attention) with index
                `capture.read` (default: the last). The encoder stops after this read, so the output is not the model's
                usual output.
        """
        tokens = self.adapter(inputs, **options(mask=mask, lengths=lengths))
        latents = self.encoder(tokens) if capture is None else self.encoder(tokens, capture=capture)
        return self.head(latents)


def check_parts(parts: Mapping[str, object], widths: Mapping[str, str]) -> None:
    """Check that all parts of a model are modules, and that the widths of connected parts match.

    `widths` is a dictionary from output widths to the input widths that they must equal, for example
    `{"adapter.dim": "encoder.input_dim"}`. Pairs with a missing attribute are skipped.
    """
    for name, part in parts.items():
        if not isinstance(part, nn.Module):
            raise TypeError(f"{name} must be a module; got {type(part).__name__}. Build it first")
    for names in widths.items():
        (source, output), (target, input_) = (name.split(".") for name in names)
        expected, actual = getattr(parts[source], output, None), getattr(parts[target], input_, None)
        if None not in (expected, actual) and expected != actual:
            raise ValueError(
                f"{target} must accept the output width of {source}, {expected}; got {actual}. "
                f"Build it with {source}.{output}"
            )
