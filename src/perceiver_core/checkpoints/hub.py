"""Models on the Hugging Face hub: the folders that `save` writes, with a model card.

Functions and not methods: a folder says itself what model it holds, and they take any model of registered parts.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import nn

from perceiver_core.checkpoints.card import card
from perceiver_core.checkpoints.folder import CONFIG, WEIGHTS
from perceiver_core.checkpoints.loading import load
from perceiver_core.checkpoints.saving import save

CARD = "README.md"


def save_pretrained(model: nn.Module, folder: str | PathLike[str]) -> Path:
    """Write a model to a folder as `save` does, and a model card beside it.

    Args:
        model: made of registered parts (all of the library's are).
        folder: where to, made if it is not there. A README.md that is there stays as it is.

    Returns:
        The folder.

    Raises:
        ValueError: what `save` refuses. Nothing is written then.

    Example:
        >>> import tempfile
        >>> import perceiver_core as pc
        >>> from perceiver_core.checkpoints import save_pretrained
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     written = save_pretrained(pc.Encoder(10, num_latents=7, dim=32, depth=1, num_heads=4), folder)
        ...     sorted(path.name for path in written.iterdir())
        ['README.md', 'config.json', 'model.safetensors']
    """
    folder = save(model, folder)
    if not (folder / CARD).exists():
        (folder / CARD).write_text(card(model, f"path/to/{folder.resolve().name}"), encoding="utf-8")
    return folder


def from_pretrained(
    name_or_folder: str | PathLike[str],
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | PathLike[str] | None = None,
    local_files_only: bool = False,
    device: str | torch.device = "cpu",
) -> Any:
    """A model from a folder that `save` wrote, or from the hub; in evaluation mode.

    What comes from the hub is loaded as `load` does it: nothing in it is executed.

    Args:
        name_or_folder: a folder, or a name on the Hugging Face hub (`owner/name`), for which huggingface_hub has to be
            installed.
        revision: of the hub's repository: a branch, a tag or a commit.
        token: for private repositories; the one that huggingface_hub has stored unless given.
        cache_dir: where what is fetched is kept.
        local_files_only: whether to do with what was fetched before.
        device: where to.

    Raises:
        FileNotFoundError: no such folder and no huggingface_hub, or a file missing.
        ValueError: files that `load` refuses; a revision of a folder.

    Example:
        >>> import tempfile
        >>> import perceiver_core as pc
        >>> from perceiver_core.checkpoints import from_pretrained
        >>> model = from_pretrained("somebody/some-perceiver", revision="v1")  # doctest: +SKIP
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     model = from_pretrained(pc.save(pc.Encoder(10, num_latents=7, dim=32, depth=1, num_heads=4), folder))
        >>> model.latents.shape
        torch.Size([7, 32])
    """
    folder = fetched(
        name_or_folder,
        (CONFIG, WEIGHTS),
        revision=revision,
        token=token,
        cache_dir=cache_dir,
        local_files_only=local_files_only,
    )
    return load(folder, device=device)


def push_to_hub(
    model: nn.Module,
    repo_id: str,
    *,
    message: str = "A perceiver-core model",
    private: bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    token: str | bool | None = None,
) -> str:
    """Uploads a model to the Hugging Face hub, in one commit. Needs huggingface_hub.

    Args:
        model: made of registered parts.
        repo_id: `owner/name`; the repository is made if it is not there. A model card that it has stays as it is.
        message: of the commit.
        private: whether a repository that is made is private; the owner's setting unless given.
        revision: the branch to commit to, made if it is not there; `main` unless given.
        create_pr: whether to open a pull request instead.
        token: one that may write; the one that huggingface_hub has stored unless given.

    Returns:
        The address of the commit.

    Raises:
        ImportError: huggingface_hub is not installed.
        ValueError: what `save` refuses. Nothing is made on the hub then.

    Example:
        >>> import perceiver_core as pc
        >>> model = pc.Encoder(10, num_latents=7, dim=32, depth=1, num_heads=4)
        >>> pc.checkpoints.push_to_hub(model, "somebody/some-perceiver", private=True)  # doctest: +SKIP
        'https://huggingface.co/somebody/some-perceiver/commit/...'
    """
    try:
        from huggingface_hub import HfApi
    except ImportError as error:
        raise ImportError("the hub needs huggingface_hub; pip install perceiver-core[hub]") from error
    with tempfile.TemporaryDirectory() as folder:
        save(model, folder)
        api = HfApi(token=token)
        chosen: dict[str, Any] = {} if private is None else {"private": private}
        name = api.create_repo(repo_id, exist_ok=True, **chosen).repo_id
        if revision is not None and not create_pr:
            api.create_branch(name, branch=revision, exist_ok=True)
        if not api.file_exists(name, CARD, revision=revision):
            (Path(folder) / CARD).write_text(card(model, name), encoding="utf-8")
        commit = api.upload_folder(
            repo_id=name, folder_path=folder, commit_message=message, revision=revision, create_pr=create_pr
        )
    return str(commit.commit_url)


def fetched(name_or_folder: str | PathLike[str], files: Sequence[str], **options: Any) -> Path:
    """A folder as it is, or one fetched from the hub.

    Args:
        name_or_folder: a folder, or `owner/name` on the hub.
        files: which of the hub's files are wanted.
        options: of `huggingface_hub.snapshot_download`.

    Raises:
        FileNotFoundError: no such folder, and no name on the hub, or no huggingface_hub.
        ValueError: a revision of a folder.

    Example:
        >>> from perceiver_core.checkpoints.hub import fetched
        >>> fetched("deepmind/vision-perceiver-fourier", ["config.json"])  # doctest: +SKIP
    """
    folder = Path(name_or_folder)
    if folder.is_dir():
        if options.get("revision") is not None:
            raise ValueError(
                f"revision is of a repository on the hub; {folder} is a folder, which has none. Leave revision out"
            )
        return folder
    if folder.exists() or len(folder.parts) != 2 or str(name_or_folder).startswith((".", "/", "~")):
        raise FileNotFoundError(f"name_or_folder must be a folder, or owner/name on the hub; there is none at {folder}")
    try:
        from huggingface_hub import snapshot_download
    except ImportError as error:
        raise FileNotFoundError(
            f"there is no folder {folder}; to fetch it from the hub, pip install perceiver-core[hub]"
        ) from error
    return Path(snapshot_download(str(name_or_folder), allow_patterns=list(files), **options))
