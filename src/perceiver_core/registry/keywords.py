"""Errors for unknown keyword arguments, with a suggestion of the intended name."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Iterable, Sequence

# Names of our arguments in PyTorch, transformers, timm and other Perceiver libraries, if they are not similar to ours.
SYNONYMS = {
    "num_classes": ("num_labels", "n_classes"),
    "num_heads": ("nhead", "num_attention_heads", "num_self_attention_heads", "latent_heads", "heads", "n_heads"),
    "dim": ("d_model", "embed_dim", "hidden_size", "d_latents", "latent_dim", "num_latent_channels"),
    "input_dim": ("kdim", "in_features", "in_dim", "input_channels", "num_input_channels"),
    "out_dim": ("output_dim", "out_features"),
    "depth": ("num_layers", "n_layers", "layers", "num_blocks", "num_self_attends_per_block"),
    "num_reads": ("num_cross_attention_layers", "num_cross_attends"),
    "num_repeats": ("num_blocks",),
    "num_latents": ("num_queries",),
    "dropout": ("attention_probs_dropout_prob",),
    "share": ("weight_tie_layers",),
    "num_channels": ("in_channels", "in_chans"),
}


def check_keywords(function: Callable[..., object], keywords: Iterable[str]) -> None:
    """Check that a function or class accepts these keyword arguments.

    Functions that accept arbitrary keywords, themselves or through a decorator, are not checked.

    Args:
        function: Function to check, or class whose constructor is checked.
        keywords: Names of keyword arguments.

    Raises:
        TypeError: If a keyword is unknown. The message is Python's, followed by the most similar accepted name, or by
            all accepted names if none is similar.

    Example:
        >>> from perceiver_core.registry.keywords import check_keywords
        >>> check_keywords(pc.models.presets.imagenet, ["num_class"])
        Traceback (most recent call last):
        ...
        TypeError: imagenet() got an unexpected keyword argument 'num_class'. Did you mean 'num_classes'?
    """
    try:
        parameters = inspect.signature(function, follow_wrapped=False).parameters.values()
    except (TypeError, ValueError):  # some functions of C extensions have no signature
        return
    if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
        accepted = [p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
        refuse_unknown(f"{getattr(function, '__qualname__', function)}()", keywords, accepted)


def refuse_unknown(name: str, keywords: Iterable[str], accepted: Sequence[str]) -> None:
    """Raise a TypeError for the first keyword that is not accepted. `name` names the callable in the message."""
    for keyword in keywords:
        if keyword not in accepted:
            raise TypeError(f"{name} got an unexpected keyword argument {keyword!r}{_suggestion(keyword, accepted)}")


def _suggestion(keyword: str, accepted: Sequence[str]) -> str:
    near = [ours for ours in accepted if keyword in SYNONYMS.get(ours, ())]
    near = near or difflib.get_close_matches(keyword, accepted, n=1)
    if near:
        return f". Did you mean {near[0]!r}?"
    return f"; it accepts {', '.join(accepted)}" if accepted else "; it accepts no keywords"
