"""The two files of a folder: their content, and how they are replaced."""

from __future__ import annotations

import hashlib
import json
import os
import stat
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import perceiver_core as pc
from perceiver_core import adapters
from perceiver_core.checkpoints import save_load
from tests.checkpoints.folders import CONFIG_OF_SMALL, contents, perceiver, small, trained

pytestmark = pytest.mark.no_shape_checks


def test_the_configuration_reads_well(tmp_path):
    pc.save(small(), tmp_path)
    digest = hashlib.sha256((tmp_path / "model.safetensors").read_bytes()).hexdigest()
    model = json.dumps(json.loads(CONFIG_OF_SMALL)["model"], sort_keys=True)
    of_model = hashlib.sha256(model.encode()).hexdigest()
    entry = f'  "format": 1,\n  "sha256": {{\n    "model.safetensors": "{digest}",\n    "model": "{of_model}"\n  }},\n'
    assert (tmp_path / "config.json").read_text() == CONFIG_OF_SMALL.replace('  "format": 1,\n', entry)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "model.safetensors"]


def test_the_same_model_is_the_same_bytes(tmp_path):
    model = trained(small())
    pc.save(model, tmp_path / "a")
    pc.save(pc.load(tmp_path / "a"), tmp_path / "b")
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


def test_other_programs_can_read_the_weights(tmp_path):
    model = trained(small())
    pc.save(model, str(tmp_path))
    read = load_file(tmp_path / "model.safetensors")
    assert read.keys() == model.state_dict().keys()


@pytest.mark.parametrize("name", ["two words", "größe-模型", "a/b/c", "it's [1]*?"])
def test_a_folder_is_made_whatever_its_name(name, tmp_path):
    assert pc.save(small(), tmp_path / name) == tmp_path / name
    pc.load(str(tmp_path / name))


def test_saving_again_replaces(tmp_path):
    first, second = trained(small()), perceiver(adapters.Audio(5, positions=None))
    pc.save(first, tmp_path)
    loaded = pc.load(tmp_path)
    for model in (loaded, second, second):
        pc.save(model, tmp_path)
        assert pc.load(tmp_path).state_dict().keys() == model.state_dict().keys()
    assert len(contents(tmp_path)) == 2
    assert torch.equal(loaded.encoder.latents, first.encoder.latents)


@pytest.mark.parametrize("mask, mode", [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)], ids=oct)
def test_files_have_the_modes_that_the_user_has_set(mask, mode, tmp_path):
    before = os.umask(mask)
    try:
        pc.save(small(), tmp_path)
    finally:
        os.umask(before)
    assert {stat.S_IMODE(file.stat().st_mode) for file in tmp_path.iterdir()} == {mode}


class CrashError(Exception):
    pass


def crash(*args, **kwargs):
    raise CrashError


@pytest.mark.parametrize("where", ["save_file", "os.replace", "os.fsync", "after save_file"])
def test_a_crash_leaves_the_old_files_and_no_others(where, tmp_path, monkeypatch):
    pc.save(small(), tmp_path)
    before = contents(tmp_path)
    if where == "after save_file":
        monkeypatch.setattr(
            save_load, "save_file", lambda values, path, metadata: Path(path).write_bytes(b"half") and crash()
        )
    else:
        monkeypatch.setattr(save_load, where, crash) if "." not in where else monkeypatch.setattr(where, crash)
    with pytest.raises(CrashError):
        pc.save(perceiver(adapters.Audio(5, positions=None)), tmp_path)
    assert contents(tmp_path) == before


def test_links_are_read_through_and_replaced(tmp_path):
    """The Hugging Face hub's cache is made of links: they load, and what they lead to is not written over."""
    pc.save(small(), tmp_path / "blobs")
    before = contents(tmp_path / "blobs")
    (tmp_path / "snapshot").mkdir()
    for name in ("config.json", "model.safetensors"):
        (tmp_path / "snapshot" / name).symlink_to(tmp_path / "blobs" / name)
    (tmp_path / "folder").symlink_to(tmp_path / "snapshot")
    pc.load(tmp_path / "folder")
    pc.save(perceiver(adapters.Audio(5, positions=None)), tmp_path / "folder")
    assert contents(tmp_path / "blobs") == before
    assert not (tmp_path / "snapshot" / "model.safetensors").is_symlink()


def test_a_file_in_the_place_of_the_folder(tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(FileExistsError, match="A file has the name of the folder; choose another folder"):
        pc.save(small(), tmp_path / "file")
    with pytest.raises(FileNotFoundError, match="pass the folder that save wrote"):
        pc.load(tmp_path / "file")
    assert (tmp_path / "file").read_text() == "mine"
