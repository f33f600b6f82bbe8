"""Broken and hostile files are refused, quickly and in words."""

from __future__ import annotations

import cProfile
import json
import os
import pickle
import resource
import struct
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

import perceiver_core as pc
from tests.checkpoints.folders import CONFIG_OF_SMALL, DIM, PICTURES, Blend, Learner, described, small, write

pytestmark = pytest.mark.no_shape_checks


def assert_refused(path, message, error=ValueError):
    """In words, within three million calls of functions (about a second), in little memory."""
    peak, profile = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, cProfile.Profile()
    with pytest.raises(error, match=message) as caught:
        profile.runcall(pc.load, path)
    assert sum(entry.callcount for entry in profile.getstats()) < 3e6
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak < 256 * 2**10
    assert type(caught.value) is error
    assert len(str(caught.value)) < 2000


def test_a_folder_that_is_not_there(tmp_path):
    assert_refused(tmp_path / "new", "config.json does not exist; pass the folder that save wrote", FileNotFoundError)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
@pytest.mark.parametrize("instead", ["nothing", "a folder", "a dead link", "a pipe", "a device"])
def test_a_file_that_is_not_there(name, instead, broken):
    (broken / name).unlink()
    if instead == "a folder":
        (broken / name).mkdir()
    elif instead == "a dead link":
        (broken / name).symlink_to(broken / "elsewhere")
    elif instead == "a pipe":
        os.mkfifo(broken / name)
    elif instead == "a device":
        (broken / name).symlink_to("/dev/zero")
    assert_refused(broken, f"{name} does not exist", FileNotFoundError)


def header(content):
    text = json.dumps(content).encode()
    return struct.pack("<Q", len(text)) + text


BROKEN_WEIGHTS = {
    "empty": lambda old: b"",
    "eight zeros": lambda old: bytes(8),
    "half": lambda old: old[: len(old) // 2],
    "one byte short": lambda old: old[:-1],
    "one byte more": lambda old: old + b"x",
    "half a header": lambda old: old[:50],
    "a header length of nothing": lambda old: bytes(8) + old[8:],
    "a header length of everything": lambda old: b"\xff" * 8 + old[8:],
    "a header length past the end": lambda old: struct.pack("<Q", len(old) + 7) + old[8:],
    "a header length of a gigabyte": lambda old: struct.pack("<Q", 2**30) + old[8:],
    "random": lambda old: bytes((i * 197 + 31) % 256 for i in range(5000)),
    "text": lambda old: b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 7\n",
    "a pickle": lambda old: pickle.dumps({"latents": [3.0] * 100}),
    "a zip": lambda old: b"PK\x03\x04" + bytes(100),
    "a header that is a list": lambda old: header([3]),
    "offsets past the end": lambda old: header({"a": {"dtype": "F32", "shape": [3], "data_offsets": [0, 12]}}),
    "a shape that lies": lambda old: header({"a": {"dtype": "F32", "shape": [10**12], "data_offsets": [0, 0]}}),
    "a shape that overflows": lambda old: header(
        {"a": {"dtype": "F32", "shape": [2**40, 2**40], "data_offsets": [0, 0]}}
    ),
    "a negative shape": lambda old: header({"a": {"dtype": "F32", "shape": [-3], "data_offsets": [0, 12]}}) + bytes(12),
    "an unknown type": lambda old: header({"a": {"dtype": "OBJECT", "shape": [], "data_offsets": [0, 4]}}) + bytes(4),
    "a deep header": lambda old: struct.pack("<Q", 100_000) + b"[" * 100_000,
}


@pytest.mark.parametrize("change", BROKEN_WEIGHTS.values(), ids=BROKEN_WEIGHTS.keys())
def test_broken_weights(change, broken):
    weights = broken / "model.safetensors"
    weights.write_bytes(change(weights.read_bytes()))
    assert_refused(broken, r"model\.safetensors is not a complete safetensors file: .*Copy it again")


OTHER_WEIGHTS = {
    "one missing": (lambda t: t.pop("encoder.latents"), r"missing \['encoder\.latents'\]"),
    "one more": (lambda t: t.update(more=torch.zeros(3)), r"unknown \['more'\]"),
    "none": (lambda t: t.clear(), "missing "),
    "another shape": (
        lambda t: t.update({"encoder.latents": torch.zeros(3, DIM)}),
        r"encoder\.latents has shape \(3, 14\) torch\.float32, not \(5, 14\)",
    ),
    "transposed": (lambda t: t.update({"encoder.latents": torch.zeros(DIM, 5)}), r"has shape \(14, 5\)"),
    "as many values": (lambda t: t.update({"encoder.latents": torch.zeros(5 * DIM)}), r"has shape \(70,\)"),
    "integers": (lambda t: t.update({"encoder.latents": torch.zeros(5, DIM, dtype=torch.int8)}), "int8, not"),
    "truths": (lambda t: t.update({"encoder.latents": torch.zeros(5, DIM, dtype=torch.bool)}), "bool, not"),
    "complex": (lambda t: t.update({"encoder.latents": torch.zeros(5, DIM, dtype=torch.complex64)}), "complex64, not"),
}  # fmt: skip


@pytest.mark.parametrize("change, message", OTHER_WEIGHTS.values(), ids=OTHER_WEIGHTS.keys())
def test_weights_of_another_model(change, message, broken):
    weights = broken / "model.safetensors"
    tensors = load_file(weights)
    change(tensors)
    save_file(tensors, weights)
    assert_refused(broken, rf"(?s)model\.safetensors does not fit config\.json: .*{message}.*Copy both from one save")


def test_a_type_that_no_part_has(broken):
    (broken / "model.safetensors").write_bytes(
        header({"a": {"dtype": "F4", "shape": [2], "data_offsets": [0, 1]}}) + b"x"
    )
    assert_refused(broken, "holds values of type F4, which no part has")


def test_a_counter_must_count(tmp_path):
    pc.save(Blend(5, inner=Learner()), tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["inner.steps"] = torch.zeros(3)
    save_file(tensors, tmp_path / "model.safetensors")
    assert_refused(tmp_path, r"inner\.steps has shape \(3,\) torch\.float32, not \(3,\) torch\.int32")


BROKEN_TEXT = {
    "empty": (b"", "is not valid JSON"),
    "no JSON": (b"model: Perceiver", "is not valid JSON in UTF-8: .*Copy it again"),
    "half": (CONFIG_OF_SMALL.encode()[:200], "is not valid JSON"),
    "no text": (b"\xff\xfe\x00\x01", "is not valid JSON"),
    "UTF-16": (CONFIG_OF_SMALL.encode("utf-16"), "is not valid JSON"),
    "deep": (b"[" * 100_000 + b"]" * 100_000, "is not valid JSON"),
    "deep objects": (b'{"a":' * 100_000, "is not valid JSON"),
    "huge": (b"[" + b"0," * 10**7 + b"0]", "must have at most 1048576 bytes; it has more"),
    "NaN": (CONFIG_OF_SMALL.replace('"depth": 1', '"depth": NaN').encode(), "NaN is not a finite number"),
    "infinity": (CONFIG_OF_SMALL.replace('"depth": 1', '"depth": -Infinity').encode(), "-Infinity is not a finite"),
    "overflow": (CONFIG_OF_SMALL.replace('"depth": 1', '"depth": 1e999').encode(), "1e999 is not a finite number"),
    "many digits": (CONFIG_OF_SMALL.replace('"depth": 1', '"depth": ' + "1" * 10**5).encode(), "is not valid JSON"),
    "a key twice": (CONFIG_OF_SMALL.replace('"depth": 1', '"dim": 11').encode(), r"key twice; its keys are \['part'"),
    "a list": (b"[3]", r"was not written by perceiver_core\.save; give load a folder that was"),
    "nothing": (b"null", "was not written by"),
    "Hugging Face": (b'{"model_type": "perceiver", "architectures": ["PerceiverModel"]}', "was not written by"),
    "another library": (b'{"library": "other", "format": 1, "model": {}}', "was not written by"),
    "no model": (b'{"library": "perceiver_core", "format": 1}', "was not written by"),
    **{
        f"format {number}": (
            CONFIG_OF_SMALL.replace('"format": 1', f'"format": {number}').encode(),
            r"has format .*; this version reads 1\. Update perceiver-core if the file is newer, or save it again",
        )
        for number in ("0", "2", "-1", "true", "1.0", '"1"', "null", "[1]", f'"{"1" * 9999}"')
    },
    "no format": (CONFIG_OF_SMALL.replace('"format": 1,', "").encode(), "has format None; this version reads 1"),
}  # fmt: skip


@pytest.mark.parametrize("text, message", BROKEN_TEXT.values(), ids=[name[:20] for name in BROKEN_TEXT])
def test_a_broken_configuration(text, message, broken):
    (broken / "config.json").write_bytes(text)
    assert_refused(broken, message)


OTHER_MODELS = {
    "another size": (lambda m: m["encoder"].update(dim=21), "head must accept the output width of encoder, 21"),
    "fewer blocks": (lambda m: m["encoder"].update(depth=0), "does not fit"),
    "no module": (lambda m: {"name": "Perceiver"}, "describes a type, not a module"),
    "a partial": (lambda m: {"partial": "Perceiver"}, "describes a partial, not a module"),
    "a number": (lambda m: 3, "describes a int, not a module"),
    "a list": (lambda m: [m], "describes a list, not a module"),
    "a partial for a module": (lambda m: m.update(encoder={"partial": "Encoder"}), "does not fit|cannot be"),
    "a class for a module": (lambda m: m.update(head={"name": "Classification"}), "does not fit|cannot be"),
    "a head for an encoder": (lambda m: m.update(encoder=m["head"]), "does not fit"),
    "a head for positions": (lambda m: m["adapter"].update(positions=m["head"]), "Image cannot be built"),
    "a string for positions": (lambda m: m["adapter"].update(positions="Fourier"), "Image cannot be built"),
    "itself": (lambda m: m.update(head={"same": "head"}), "no part stands there before it"),
    "the encoder again": (lambda m: m.update(head={"same": "encoder"}), "does not fit"),
    "the shell": (lambda m: {"part": "os.system", "command": "true"}, "names 'os.system', which is not registered"),
    "eval": (lambda m: m.update(head={"part": "builtins.eval"}), "head names 'builtins.eval', which is not registered"),
    "torch.load": (lambda m: m.update(head={"name": "torch.load"}), "which is not registered"),
    "a dunder": (lambda m: m.update(__class__={"name": "Perceiver"}), "Perceiver cannot be built"),
    "a dunder name": (lambda m: m.update(head={"part": "__init__"}), "which is not registered"),
    "a dotted name": (lambda m: m.update(head={"part": "Perceiver.__init__"}), "which is not registered"),
    "a module of torch": (lambda m: m.update(head={"partial": "nn.Identity"}), "which is not registered"),
    "the device": (
        lambda m: m["head"].update(norm={"partial": "LayerNorm", "device": "cpu"}),
        r"head\.norm gives LayerNorm \['device'\]",
    ),
}  # fmt: skip


@pytest.mark.parametrize("change, message", OTHER_MODELS.values(), ids=OTHER_MODELS.keys())
def test_a_configuration_of_another_model(change, message, broken):
    write(broken, described(change))
    assert_refused(broken, message)


@pytest.mark.parametrize("path", ["adapter", "adapter.positions", "encoder", "head"])
@pytest.mark.parametrize(
    "value",
    ["7", None, [], [7], 2.5, -3, 0, True, 10**30, -(10**30), {"dict": {}}, {"name": "sdpa"}, {"part": "GEGLU"},
     {"partial": "MLP"}],
    ids=repr,
)  # fmt: skip
def test_arguments_of_a_wrong_type_or_size(path, value, broken):
    part = described(lambda m: None)
    for step in path.split("."):
        part = part[step]
    for name in set(part) - {"part"}:
        model = described(lambda m: None)
        inner = model
        for step in path.split("."):
            inner = inner[step]
        inner[name] = value
        write(broken, model)
        try:
            loaded = pc.load(broken)
        except ValueError as error:
            assert len(str(error)) < 2000
        else:  # another value that gives the same shapes: a resolution, one head
            assert loaded.state_dict().keys() == small().state_dict().keys()


@pytest.mark.parametrize("key", ["\x1b[2J", "\u202e", "\n", "x" * 10**5], ids=["escape", "bidi", "line", "long"])
def test_names_in_a_file_do_not_reach_the_terminal_as_they_are(key, broken):
    for value in ({"part": key}, {"name": key}, {"dict": {key: {"part": "none"}}}, key, [key]):
        for model in (
            described(lambda m, value=value: m["encoder"].update({key: value})),
            described(lambda m, value=value: m["encoder"].update(dim=value)),
        ):
            write(broken, model)
            with pytest.raises(ValueError, match=r".") as caught:
                pc.load(broken)
            assert str(caught.value).isprintable()
            assert len(str(caught.value)) < 2000


BIG = 10**12
GREEDY = {
    "latents": lambda m: m["encoder"].update(num_latents=BIG),
    "dim": lambda m: m["encoder"].update(dim=7 * BIG),
    "input_dim": lambda m: m["encoder"].update(input_dim=BIG),
    "overflow": lambda m: m["encoder"].update(num_latents=2**62, dim=2**62),
    "depth": lambda m: m["encoder"].update(depth=10**9),
    "depth, nearly": lambda m: m["encoder"].update(depth=10_000),
    "reads": lambda m: m["encoder"].update(num_reads=10**9),
    "reads, nearly": lambda m: m["encoder"].update(num_reads=10_000, share=False),
    "reads of nothing": lambda m: m["encoder"].update(num_reads=10_000, share=False, depth=0),
    "bands": lambda m: m["adapter"]["positions"].update(num_bands=BIG) or m["encoder"].update(dim=21),
    "classes": lambda m: m["head"].update(num_classes=10**15),
    "a grid": lambda m: m["adapter"].update(positions={"part": "LearnedGrid", "grid": [10**9, 10**9], "dim": 3}),
    "a random matrix": lambda m: m["adapter"].update(
        positions={"part": "Gaussian", "num_axes": 2, "num_features": BIG}
    ),
    "widening": lambda m: m["encoder"].update(
        cross_attention={"partial": "CrossAttend", "mlp": {"partial": "MLP", "widening_factor": BIG}}
    ),
    "nested encoders": lambda m: m["encoder"].update(
        cross_attention={
            "partial": "CrossAttend",
            "norm": {"partial": "Encoder", "num_latents": 3, "dim": 8, "num_reads": 10_000},
        }
    ),
    "blocks of nothing": lambda m: m["encoder"].update(
        num_reads=10_000, share=False, cross_attention={"name": "Identity"},
        latent_transformer={"partial": "LatentTransformer", "block": {"name": "Identity"}},
    ),
    "blocks of nothing, deep": lambda m: m["encoder"].update(
        depth=10_000, latent_transformer={"partial": "LatentTransformer", "block": {"name": "Identity"}}
    ),
    "many parts": lambda m: m.update(head=[{"part": "GEGLU"}] * 20_000),
    "many adapters": lambda m: {"part": "PerRead", "adapters": [{"part": "GEGLU"}] * 20_000},
}  # fmt: skip


@pytest.mark.parametrize("change", GREEDY.values(), ids=GREEDY.keys())
def test_a_small_file_asks_for_nothing_large(change, broken):
    write(broken, described(change))
    assert_refused(broken, ".")


LIMITED = """
import resource, sys, torch, perceiver_core as pc
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + 512 * 2**20,) * 2)
try:
    pc.load(sys.argv[1])
except ValueError as error:
    print(error)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.parametrize(
    "change",
    [
        lambda m: m["encoder"].update(num_latents=BIG, dim=7 * BIG),
        lambda m: m["adapter"]["positions"].update(num_axes=10**9),
        lambda m: m["adapter"]["positions"].update(num_bands=10**9),
        lambda m: m["head"].update(dim=10**9, norm={"name": "paper"}),
    ],
    ids=["tensors", "axes", "bands", "a scheme for a norm"],
)
def test_large_sizes_are_refused_under_a_limit_of_memory(change, broken):
    write(broken, described(change))
    found = subprocess.run([sys.executable, "-c", LIMITED, str(broken)], capture_output=True, text=True, timeout=60)
    assert "does not fit config.json" in found.stdout or "cannot be built" in found.stdout, found.stderr
    assert "MemoryError" not in found.stdout


def test_a_part_in_the_place_of_another_fails_at_the_first_call_at_the_latest(broken):
    """Where the shapes fit, a file can only describe a model that fails in words."""
    write(broken, described(lambda m: m.update(adapter={"part": "heads.Identity"})))
    model = pc.load(broken)
    with pytest.raises(ValueError, match="tokens must have 3 axes"):
        model(PICTURES)


@pytest.mark.parametrize("folder", [3, None, b"folder", "a\0b"], ids=repr)
def test_folders_that_are_no_paths(folder):
    for call in (pc.load, lambda path: pc.save(small(), path), pc.checkpoints.from_pretrained):
        with pytest.raises((TypeError, ValueError), match=r"\b(folder|name_or_folder) must be a path"):
            call(folder)


@pytest.mark.parametrize("device", ["unknown", None, 1.5, "cuda:99", "xla"])
def test_devices_that_there_are_not(device, broken):
    with pytest.raises(ValueError, match="device must be a device of this machine, such as 'cpu'; got"):
        pc.load(broken, device=device)


def test_control_characters_in_paths_are_escaped(tmp_path):
    for call in (pc.load, pc.checkpoints.from_pretrained):
        with pytest.raises(FileNotFoundError) as caught:
            call(tmp_path / "a\x1b[2Jb" / "c")
        assert r"a\x1b[2Jb" in str(caught.value)
        assert str(caught.value).isprintable()
