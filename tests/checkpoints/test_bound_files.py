"""A folder holds the old model or the new one, for a reader at any moment and after a crash at any instruction."""

from __future__ import annotations

import json
import multiprocessing
import os
import sys
from itertools import count

import pytest
import torch
from safetensors.torch import load_file, save_file

import perceiver_core as pc
from perceiver_core import atomic_files
from perceiver_core.checkpoints import bound_files, save_load
from tests.checkpoints.folders import Blend, Learner, contents, small, trained

pytestmark = pytest.mark.no_shape_checks
FILES = {bound_files.__file__, atomic_files.__file__}


def filled(value):
    """A small model whose numbers are all `value`; an odd value has another architecture."""
    model = Learner() if value % 2 == 0 else Blend(3)
    with torch.no_grad():
        for tensor in model.state_dict().values():
            tensor.fill_(value)
    return model


def value_of(folder):
    """The value of the model in a folder, which must be the same everywhere."""
    model = pc.load(folder)
    values = {value for tensor in model.state_dict().values() for value in tensor.unique().tolist()}
    assert len(values) == 1
    (value,) = values
    assert type(model) is type(filled(int(value)))
    return int(value)


def save_and_die(model, folder, line):
    """Save in another process that ends at the given line of the file layer. Return whether it came to this line."""
    if process := os.fork():
        return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == 9
    lines = count()

    def trace(frame, event, argument):
        if frame.f_code.co_filename not in FILES:
            return None
        if event == "line" and next(lines) == line:
            os._exit(9)
        return trace

    def traced(*args):
        sys.settrace(trace)
        bound_files.write_pair(*args)

    try:
        save_load.write_pair = traced
        pc.save(model, folder)
    finally:
        os._exit(0)


@pytest.mark.parametrize("new, step", [(2, 1), (1, 4)], ids=["of the same shapes", "of another architecture"])
def test_a_crash_at_any_line_leaves_the_old_or_the_new_model(new, step, tmp_path):
    found = []
    for line in count(step=step):
        folder = tmp_path / str(line)
        pc.save(filled(4), folder)
        if not save_and_die(filled(new), folder, line):
            break
        found.append(value_of(folder))
        pc.save(filled(6), folder)
        assert value_of(folder) == 6
        assert sorted(contents(folder)) == ["config.json", "model.safetensors"]
    assert found == sorted(found, reverse=True)  # old up to some line, then new
    assert set(found) == {4, new}


def test_a_crash_of_the_first_save_leaves_no_model_or_the_new_one(tmp_path):
    complete = []
    for line in count(step=2):
        folder = tmp_path / str(line)
        folder.mkdir()
        if not save_and_die(filled(2), folder, line):
            break
        try:
            complete.append(value_of(folder) == 2)
        except FileNotFoundError:
            complete.append(False)
    assert complete == sorted(complete)
    assert set(complete) == {True, False}


def test_a_model_replaces_other_files_of_its_names(tmp_path):
    """A configuration of another library stays until the new one is complete."""
    (tmp_path / "config.json").write_text('{"model_type": "perceiver"}')
    for line in count(step=4):
        if not save_and_die(filled(2), tmp_path, line):
            break
        if (tmp_path / "config.json").read_text() == '{"model_type": "perceiver"}':
            with pytest.raises(ValueError, match="was not written by"):
                pc.load(tmp_path)
        else:
            assert value_of(tmp_path) == 2
            (tmp_path / "config.json").write_text('{"model_type": "perceiver"}')


def keep_saving(folder, values, start, stop):
    models = [filled(value) for value in values]
    start.set()
    while not stop.is_set():
        for model in models:
            pc.save(model, folder)


def test_readers_beside_writers_get_one_of_the_saved_models(tmp_path):
    pc.save(filled(2), tmp_path)
    context = multiprocessing.get_context("fork")
    stop = context.Event()
    starts = [context.Event(), context.Event()]
    writers = [
        context.Process(target=keep_saving, args=(tmp_path, values, start, stop))
        for values, start in zip([(2, 1), (4, 3)], starts, strict=True)
    ]
    for writer in writers:
        writer.start()
    try:
        assert all(start.wait(60) for start in starts)
        found = {value_of(tmp_path) for _ in range(150)}
    finally:
        stop.set()
        for writer in writers:
            writer.join(60)
    assert [writer.exitcode for writer in writers] == [0, 0]
    assert found <= {1, 2, 3, 4}
    assert len(found) > 1
    assert value_of(tmp_path) in {1, 3}
    assert sorted(contents(tmp_path)) == ["config.json", "model.safetensors"]


@pytest.mark.refusal
@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_file_of_another_save_is_refused(name, tmp_path):
    pc.save(trained(small()), tmp_path / "a")
    pc.save(small(), tmp_path / "b")
    (tmp_path / "a" / name).write_bytes((tmp_path / "b" / name).read_bytes())
    with pytest.raises(
        ValueError, match=r"model\.safetensors is not the file that config\.json describes: its SHA-256"
    ):
        pc.load(tmp_path / "a")


@pytest.mark.refusal
def test_a_changed_bit_is_refused_wherever_it_is(saved, tmp_path):
    good = contents(saved)
    (tmp_path / "config.json").write_bytes(good["config.json"])
    weights = good["model.safetensors"]
    for position in [*range(0, len(weights), max(1, len(weights) // 60)), len(weights) - 1]:
        damaged = bytearray(weights)
        damaged[position] ^= 1 << position % 8
        (tmp_path / "model.safetensors").write_bytes(damaged)
        with pytest.raises(ValueError, match=r"model\.safetensors"):
            pc.load(tmp_path)


@pytest.mark.refusal
@pytest.mark.parametrize(
    "digests", [None, [], "", {}, {"model.safetensors": 3}, {"model.safetensors": "ab"}, {"other": "0" * 64}], ids=repr
)
def test_digests_of_other_types_are_refused(digests, broken):
    config = json.loads((broken / "config.json").read_text())
    (broken / "config.json").write_text(json.dumps({**config, "sha256": digests}))
    with pytest.raises(ValueError, match=r"must have the SHA-256 digest of model\.safetensors in 'sha256'"):
        pc.load(broken)


@pytest.mark.refusal
def test_a_changed_configuration_is_refused_wherever_it_is(broken):
    """White space and the order of keys do not matter."""
    config = (broken / "config.json").read_text()
    for old, new in (('"max_resolution": 7', '"max_resolution": 3'), ('"num_heads": 7', '"num_heads": 1')):
        assert old in config
        (broken / "config.json").write_text(config.replace(old, new))
        with pytest.raises(ValueError, match=r"config\.json was changed after it was saved: its entry 'model'"):
            pc.load(broken)
    (broken / "config.json").write_text(json.dumps(json.loads(config), sort_keys=True))
    pc.load(broken)


def test_a_folder_without_a_digest_loads(broken):
    """Folders that were written before there were digests."""
    config = json.loads((broken / "config.json").read_text())
    del config["sha256"]
    (broken / "config.json").write_text(json.dumps(config))
    save_file(load_file(broken / "model.safetensors"), broken / "model.safetensors")
    pc.load(broken)


def test_a_folder_that_cannot_be_written_to_is_read(saved, tmp_path):
    folder = tmp_path / "read-only"
    folder.mkdir()
    for name, content in contents(saved).items():
        (folder / name).write_bytes(content)
    folder.chmod(0o500)
    try:
        pc.load(folder)
    finally:
        folder.chmod(0o700)
