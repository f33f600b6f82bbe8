"""Functions to upload models to the Hugging Face Hub and to load models from it.

A repository holds the files written by `save` and a model card. Loading is a function, not a method of a model class,
because the class of the model is known only after the files are read.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import nn

from perceiver_core.atomic_files import write_atomically
from perceiver_core.checkpoints.card import card
from perceiver_core.checkpoints.folder import CONFIG, WEIGHTS
from perceiver_core.checkpoints.save_load import load, path_of, save
from perceiver_core.error_messages import printable_errors

CARD = "README.md"


def save_pretrained(model: nn.Module, folder: str | PathLike[str]) -> Path:
    """Save a model to a folder with `save`, and add a model card.

    Args:
        model: Model built from registered classes (see `register`), such as all models of this library.
        folder: Folder to write, created if it does not exist. An existing README.md is kept.

    Returns:
        Path of the folder.

    Raises:
        ValueError: If the model cannot be saved (see `save`). Nothing is written in this case.

    Example:
        >>> import tempfile
        >>> encoder = pc.Encoder(10, num_latents=7, dim=32, depth=1, num_heads=4)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     written = pc.checkpoints.save_pretrained(encoder, folder)
        ...     sorted(path.name for path in written.iterdir())
        ['README.md', 'config.json', 'model.safetensors']
    """
    folder = save(model, folder)
    if not (folder / CARD).exists():
        write_atomically({folder / CARD: card(model, f"path/to/{folder.resolve().name}")})
    return folder


@printable_errors()
def from_pretrained(
    name_or_folder: str | PathLike[str],
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | PathLike[str] | None = None,
    local_files_only: bool = False,
    device: str | torch.device = "cpu",
) -> nn.Module:
    """Load a model from a folder written by `save` or from the Hugging Face Hub, in evaluation mode.

    Files from the Hub are read with `load`, which does not execute any code in them.

    Args:
        name_or_folder: Folder, or repository on the Hugging Face Hub (`owner/name`), which requires huggingface_hub.
        revision: Branch, tag or commit of the repository; None for the default branch.
        token: Token for private repositories. Defaults to the token stored by huggingface_hub.
        cache_dir: Folder for downloaded files. Defaults to the cache folder of huggingface_hub.
        local_files_only: Whether to use only files that were downloaded before.
        device: Device of the weights.

    Returns:
        Model of the class that was saved.

    Raises:
        FileNotFoundError: If there is no such folder and the name does not have the form `owner/name`.
        FileNotFoundError: If huggingface_hub is needed but not installed, or a file is missing.
        ValueError: If `load` rejects the files, or `revision` is passed for a local folder.

    Example:
        >>> import tempfile
        >>> model = pc.checkpoints.from_pretrained("somebody/some-perceiver", revision="v1")  # doctest: +SKIP
        >>> encoder = pc.Encoder(10, num_latents=7, dim=32, depth=1, num_heads=4)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     model = pc.checkpoints.from_pretrained(pc.save(encoder, folder))
        >>> model.latents.shape
        torch.Size([7, 32])
    """
    options = {"revision": revision, "token": token, "cache_dir": cache_dir, "local_files_only": local_files_only}
    return load(fetched(name_or_folder, (CONFIG, WEIGHTS), **options), device=device)


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
    """Upload a model to the Hugging Face Hub in one commit. Requires huggingface_hub.

    Args:
        model: Model built from registered classes (see `register`).
        repo_id: Repository `owner/name`, created if it does not exist. An existing model card is kept.
        message: Commit message.
        private: Whether a new repository is private; None for the owner's default.
        revision: Branch to commit to, created if it does not exist. Defaults to `main`.
        create_pr: Whether to open a pull request instead of committing to the branch.
        token: Token with write access. Defaults to the token stored by huggingface_hub.

    Returns:
        URL of the commit.

    Raises:
        ImportError: If huggingface_hub is not installed.
        ValueError: If the model cannot be saved (see `save`). Nothing is created on the Hub in this case.

    Example:
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
            write_atomically({Path(folder) / CARD: card(model, name)})
        commit = api.upload_folder(
            repo_id=name, folder_path=folder, commit_message=message, revision=revision, create_pr=create_pr
        )
    return str(commit.commit_url)


def fetched(name_or_folder: str | PathLike[str], files: Sequence[str], **options: Any) -> Path:
    """Return the path of a local folder, or download files from the Hub and return the path of their folder.

    Args:
        name_or_folder: Local folder, or repository on the Hugging Face Hub (`owner/name`).
        files: Names of the files to download.
        options: Keyword arguments of `huggingface_hub.snapshot_download`.

    Raises:
        FileNotFoundError: If there is no such folder and the name does not have the form `owner/name`.
        FileNotFoundError: If huggingface_hub is needed but not installed.
        ValueError: If `revision` is passed for a local folder.
    """
    folder = path_of("name_or_folder", name_or_folder)
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
