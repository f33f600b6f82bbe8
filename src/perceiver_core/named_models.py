"""Construction of models by name: models of the papers and other published sizes, with random weights."""

from __future__ import annotations

import difflib
import fnmatch
import inspect
import operator
from collections.abc import Callable
from typing import SupportsIndex

import numpy as np
from torch import Tensor, nn

from perceiver_core.argument_errors import checked
from perceiver_core.interop import presets as io_presets
from perceiver_core.models import presets
from perceiver_core.registry.keywords import refuse_unknown

_MODELS: dict[str, Callable[..., nn.Module]] = {
    "hip16": presets.hip16,
    "hip256": presets.hip256,
    "hip_mini": presets.hip_mini,
    "idefics2_resampler": presets.idefics2_resampler,
    "perceiver_ar": presets.perceiver_ar,
    "perceiver_audioset": presets.audioset,
    "perceiver_base": presets.base,
    "perceiver_imagenet": presets.imagenet,
    "perceiver_modelnet40": presets.modelnet40,
    "perceiver_small": presets.small,
    **{
        f"perceiver_io_{make.__name__}": make
        for make in (
            *(io_presets.language, io_presets.language_base, io_presets.language_large, io_presets.text),
            *(io_presets.imagenet, io_presets.imagenet_learned, io_presets.imagenet_conv),
            *(io_presets.flow, io_presets.multimodal),
        )
    },
}


def create(name: str, **options: object) -> nn.Module:
    """Build a model by name, with randomly initialized weights. `list_models` lists the names.

    Args:
        name: Name of the model.
        options: Arguments of the function that builds the model, such as `num_classes` of a classifier or `vocab_size`
            of a language model. `num_classes` sets the output size of the head. With `num_classes=0`, a classifier
            returns features `b d`, the input of its last linear layer.

    Raises:
        TypeError: If the model does not accept one of the options, or a required option is missing.
        ValueError: If there is no model with this name, or an option is invalid.

    Example:
        >>> with torch.device("meta"):  # allocates no memory
        ...     model, features = pc.create("perceiver_imagenet", num_classes=10), pc.create("hip_mini")
        >>> model.head.logits
        Linear(in_features=1024, out_features=10, bias=True)
    """
    if not isinstance(name, str) or name not in _MODELS:
        near = difflib.get_close_matches(str(name), _MODELS, n=3)
        raise ValueError(
            f"name must be one of list_models(); got {name!r}"
            + (f". Did you mean {' or '.join(map(repr, near))}?" if near else "")
        )
    refuse_unknown(f"create({name!r})", options, [*inspect.signature(_MODELS[name]).parameters])
    return _MODELS[name](**{option: _whole_number(option, value) for option, value in options.items()})


def _whole_number(name: str, value: object) -> object:
    """Convert NumPy integers. Check that a value is a whole number of at least 0."""
    if (
        isinstance(value, SupportsIndex)
        and not isinstance(value, (bool, np.bool_, Tensor))
        and operator.index(value) >= 0
    ):
        return operator.index(value)
    raise ValueError(f"{name} must be a whole number of at least 0; got {value!r:.80}")


@checked
def list_models(pattern: str = "*") -> list[str]:
    """Return the sorted names of the models that match a pattern; wildcards are those of `fnmatch`.

    Example:
        >>> pc.list_models("*io_imagenet*")
        ['perceiver_io_imagenet', 'perceiver_io_imagenet_conv', 'perceiver_io_imagenet_learned']
    """
    return sorted(fnmatch.filter(_MODELS, pattern))
