"""Pickles that would do harm, written by hand, opcode by opcode; and those that are read."""

from __future__ import annotations

import collections
import io
import pickle
import struct
import subprocess
import sys
import tracemalloc
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import perceiver_core
from perceiver_core.interop import haiku, load_haiku
from perceiver_core.interop.weight_files import pickle_values, safe_pickle


class Harm:
    def __reduce__(self) -> Any:
        return print, ("executed",)


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize(
    "holds", [Harm(), {"a": [Harm()]}, np.array([Harm()], dtype=object)], ids=["it", "deep", "array"]
)
def test_pickles_that_execute_are_refused(
    holds: Any, protocol: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "it"
    path.write_bytes(pickle.dumps(holds, protocol))
    with pytest.raises(ValueError, match=r"may run code|only arrays of numbers"):
        safe_pickle.read(path)
    assert "executed" not in capsys.readouterr().out


def test_one_text_that_is_encoded_often_takes_its_memory_once(tmp_path: Path) -> None:
    often = b"".join(called(named("_codecs", "encode"), b"h\xff", plain("latin1")) for _ in range(1000))
    texts = b"](" + plain("a" * 100_000) + b"q\xff" + often + b"e"
    (tmp_path / "it").write_bytes(b"\x80\x02}" + plain("params") + b"}s" + plain("texts") + texts + b"s.")
    tracemalloc.start()
    try:
        assert safe_pickle.read(tmp_path / "it") == {}
        assert tracemalloc.get_traced_memory()[1] < 10e6
    finally:
        tracemalloc.stop()


def test_text_that_is_no_latin1_is_no_data(tmp_path: Path) -> None:
    data = called(named("_codecs", "encode"), plain("\u20ac" * 8), plain("latin1"))
    array = called(named("numpy.core.multiarray", "scalar"), F8, data)
    (tmp_path / "it").write_bytes(b"\x80\x02" + within(array))
    with pytest.raises(ValueError, match="latin-1"):
        safe_pickle.read(tmp_path / "it")["s/n"].read()


@pytest.mark.parametrize("data", [b"", b"junk", pickle.dumps([1, 2])[:-3], b"cos\nsystem\n(S'true'\ntR."])
def test_what_is_no_such_pickle_is_refused(data: bytes, tmp_path: Path) -> None:
    (tmp_path / "it").write_bytes(data)
    with pytest.raises(ValueError, match=r"pickle|may run code|dictionary"):
        load_haiku(tmp_path / "it")


def test_arrays_and_dictionaries_are_read(tmp_path: Path) -> None:
    """Of parameters and state; other values beside them are not looked at."""
    held = {"a": {"w": np.arange(6.0).reshape(2, 3)}, "c/d": {"b": np.ones((), np.int64)}, "e": {}}
    statistics = {"a": {"mean": np.float32(3.5)}}
    others = {"step": 2**40, "more": [1, "two", None, {"x": -0.5}, (True, np.zeros(3))]}
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        (tmp_path / "it").write_bytes(pickle.dumps({"params": held, "state": statistics, **others}, protocol))
        found = safe_pickle.read(tmp_path / "it")
        assert list(found) == ["a/w", "c/d/b", "a/mean"]
        np.testing.assert_array_equal(found["a/w"].read(), held["a"]["w"])
        assert found["c/d/b"].read() == 1 and found["a/mean"].read() == 3.5
        (tmp_path / "it").write_bytes(pickle.dumps(held, protocol))
        assert list(safe_pickle.read(tmp_path / "it")) == ["a/w", "c/d/b"]


def test_references_to_elsewhere_are_refused(tmp_path: Path) -> None:
    class Referring(pickle.Pickler):
        def persistent_id(self, obj: Any) -> Any:
            return "elsewhere" if obj == 7 else None

    buffer = io.BytesIO()
    Referring(buffer).dump({"a": 7})
    (tmp_path / "it").write_bytes(buffer.getvalue())
    with pytest.raises(ValueError, match="outside itself"):
        safe_pickle.read(tmp_path / "it")


def plain(value: Any) -> bytes:
    """The opcodes that put a value on the stack."""
    return pickle.dumps(value, 2)[2:-1]


def named(module: str, name: str) -> bytes:
    return f"c{module}\n{name}\n".encode()


def called(function: bytes, *arguments: bytes) -> bytes:
    return function + b"(" + b"".join(arguments) + b"tR"


def dtype(code: str) -> bytes:
    return called(named("numpy", "dtype"), plain(code), plain(False), plain(True))


def of_bytes(data: bytes) -> bytes:
    return called(named("_codecs", "encode"), plain(data.decode("latin1")), plain("latin1"))


def within(value: bytes) -> bytes:
    """A file of one array."""
    return b"}" + plain("s") + b"}" + plain("n") + value + b"ss."


def scalar(kind: bytes, data: bytes) -> bytes:
    return called(named("numpy.core.multiarray", "scalar"), kind, of_bytes(data))


def array(shape: tuple[int, ...], kind: bytes, data: bytes) -> bytes:
    ndarray = named("numpy", "ndarray")
    made = called(named("numpy.core.multiarray", "_reconstruct"), ndarray, plain((0,)), plain(b"b"))
    return made + b"(" + plain(1) + plain(shape) + kind + plain(False) + of_bytes(data) + b"tb"


def changed(function: bytes) -> bytes:
    return function + b"(N}" + plain("__defaults__") + plain((1, 2, 3)) + b"stb"


# A dtype of 8 plain bytes that a file gives a field of objects, and flags by which NumPy does not know of it.
FIELDS = b"(" + plain(3) + plain("|") + b"N" + plain(("a",)) + b"}" + plain("a") + b"(" + dtype("O8") + plain(0) + b"ts"
POINTER = dtype("V8") + FIELDS + plain(8) + plain(1) + plain(0) + b"tb"
WITH_FIELDS = dtype("f8") + FIELDS.replace(b"O8", b"i8") + plain(8) + plain(1) + plain(0) + b"tb"
EIGHT = struct.pack("<Q", 0x4141414141414141)
F8 = dtype("f8")
ONE = array((1,), F8, EIGHT)
EMPTY = array((0,), F8, b"") + b"q\xfe"
SHARED = b"}(" + plain("p") + EMPTY + b"".join(plain(f"p{i}") + b"h\xfe" for i in range(2000)) + b"u"

HARM = {
    "a pointer": (b"}" + scalar(POINTER, EIGHT) + plain(1) + b"s.", "only arrays of numbers are read"),
    "fields": (scalar(WITH_FIELDS, EIGHT) + b".", "fields, parts or flags"),
    "flags": (dtype("f8") + plain((3, "<", None, None, None, -1, -1, 63)) + b"b.", "flags"),
    "objects": (array((1,), dtype("O8"), EIGHT) + b".", "only arrays of numbers"),
    "text": (array((1,), dtype("U2"), EIGHT) + b".", "only arrays of numbers"),
    "another dtype": (dtype("f8,O") + b".", "only arrays of numbers"),
    "memory without data": (called(named("numpy", "ndarray"), plain((4 * 10**9,)), plain("u1")) + b".", "no function"),
    "strides of zero": (
        called(named("numpy", "ndarray"), plain((2 * 10**8, 10)), F8, of_bytes(EIGHT), plain(0), plain((0, 0))) + b".",
        "no function",
    ),
    "less data than the shape": (array((2,), F8, EIGHT) + b".", r"takes 16 bytes; it has 8"),
    "more data than the shape": (array((), dtype("f4"), EIGHT) + b".", r"takes 4 bytes; it has 8"),
    "a huge shape": (array((2**39, 2**39), F8, EIGHT) + b".", r"it has 8"),
    "an axis beyond all": (array((2**62, 0), F8, b"") + b".", "whole numbers, 16 at most"),
    "a negative axis": (array((-1, -1), F8, EIGHT) + b".", "none of them negative"),
    "a shape of truth": (array((True,), F8, EIGHT) + b".", "whole numbers"),
    "data twice": (ONE + b"(" + ONE.rpartition(b"R(")[2] + b".", "its data twice"),
    "no data": (within(ONE.partition(b"R(K")[0] + b"R"), "s/n is not an array with data"),
    "a subclass": (called(named("numpy.core.multiarray", "_reconstruct"), named("numpy", "dtype"), plain((0,)), b"N"),
                   "another class"),
    "changed defaults": (b"}" + plain("x") + changed(named("numpy.core.numeric", "_frombuffer")) + b"s.", "changes"),
    "a changed class": (changed(named("collections", "OrderedDict")) + b".", "changes"),
    "a changed dictionary": (b"}" + b"(N}" + plain("x") + plain(1) + b"stb.", "changes"),
    "a called value": (plain("x") + b")R.", "no function"),
    "a made array": (named("numpy", "ndarray") + b")\x81.", "something else than a mapping"),
    "an instance": (b"(inumpy\nndarray\n.", "none that data need"),
    "an extension": (b"\x82\x01.", "none that data need"),
    "a set": (b"\x8f.", "none that data need"),
    "keys of tuples": (b"}" + b")" + b"\x85" * 50_000 + b"Ns.", "texts as its keys"),
    "keys of numbers": (b"}K\x01Ns.", "texts as its keys"),
    "keys of lists": (b"}]Ns.", "texts as its keys"),
    "a key twice": (b"}" + 2 * (plain("x") + b"Ns") + b".", "each once"),
    "a long key": (b"}" + plain("x" * 1001) + b"Ns.", "1000 letters"),
    "a far place in the memo": (b"}r" + struct.pack("<I", 2**31 - 1) + b"0.", "none that data need"),
    "nothing in the memo": (b"h\x07.", "value 7, which was not kept"),
    "a long number": (b"\x8b" + struct.pack("<i", 2**20) + b"\1" * 2**20 + b".", "more than 8 bytes"),
    "a long number of digits": (b"I" + b"9" * 5000 + b"\n.", "digits|8 bytes"),
    "text beyond the end": (b"\x8d" + struct.pack("<Q", 2**62) + b"a", "but only 1 remain"),
    "bytes beyond the end": (b"\x8e" + struct.pack("<Q", 2**62) + b"a", "but only 1 remain"),
    "an array beyond the end": (b"\x96" + struct.pack("<Q", 2**62) + b"a", "but only 1 remain"),
    "nesting": (b"]" * 20_000 + b"a" * 19_999 + b".", "it is of type list"),
    "itself": (b"]q\x01h\x01a.", "it is of type list"),
    "a scope that is itself": (b"}q\x01" + plain("x") + b"h\x01s.", "x/x is not an array"),
    "a global": (within(named("numpy", "ndarray")), "s/n is not an array with data but of type Global"),
    "too many values": (b"](" + b"N" * 200_000 + b"e.", "more than 100000 instructions"),
    "many in one": (
        b"}" + plain("p") + SHARED + b"q\xffs(" + b"".join(plain(f"s{i}") + b"h\xff" for i in range(2000)) + b"u.",
        "100000 arrays at most",
    ),
    "one array in many places": (
        b"}" + plain("s") + b"}(" + plain("x") + array((500,), F8, bytes(4000)) + b"q\xff"
        + b"".join(plain(f"{i}") + b"h\xff" for i in range(900)) + b"us.",
        "more than the file",
    ),
    "one text in many arrays": (
        b"}" + plain("text") + plain("a" * 8000) + b"q\xffs" + plain("params") + b"}" + plain("s") + b"}("
        + b"".join(plain(f"{i}") + called(named("numpy.core.numeric", "_frombuffer"), b"h\xff", F8, plain((1000,)),
                                          plain("C")) for i in range(900)) + b"uss.",
        "more than the file",
    ),
    "another coding": (called(named("_codecs", "encode"), plain("a"), plain("idna")) + b".", "encoded"),
    "too few on the stack": (b"R.", ""),
    "nothing": (b".", ""),
    "no mark": (b"t.", ""),
    "set without a dictionary": (b"NNNs.", "no dictionary"),
    "append without a list": (b"NNa.", "no list"),
    "objects of Python 2": (b"S'a'\n.", "none that data need"),
}  # fmt: skip


@pytest.mark.parametrize("case", HARM)
def test_harm_is_refused(case: str, tmp_path: Path) -> None:
    """Each at once, naming the file, with little memory, and without a trace."""
    code, message = HARM[case]
    (tmp_path / "it").write_bytes(b"\x80\x02" + code)
    before = {name: dict(vars(part)) for name, part in vars(pickle_values).items() if isinstance(part, type)}
    functions = [part for part in pickle_values.KNOWN.values() if part is not None]
    defaults = [part.__defaults__ for part in functions]
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match=rf"it (is not a pickle of dict|must hold a dict).*: .*{message}"):
            safe_pickle.read(tmp_path / "it")
        assert tracemalloc.get_traced_memory()[1] < 100e6
    finally:
        tracemalloc.stop()
    assert [part.__defaults__ for part in functions] == defaults
    assert {name: dict(vars(part)) for name, part in vars(pickle_values).items() if isinstance(part, type)} == before


def test_a_pointer_is_not_followed(tmp_path: Path) -> None:
    """In a process of its own, which would be killed: the dtype that NumPy's own `__setstate__` would accept."""
    (tmp_path / "it").write_bytes(b"\x80\x02" + HARM["a pointer"][0])
    code = "import sys; from perceiver_core.interop import load_haiku; load_haiku(sys.argv[1])"
    run = [sys.executable, "-c", code, str(tmp_path / "it")]
    source = str(Path(perceiver_core.__file__).parents[1])
    found = subprocess.run(run, capture_output=True, text=True, env={"PYTHONPATH": source})
    assert found.returncode == 1 and "ValueError" in found.stderr and "only arrays of numbers" in found.stderr


def test_what_is_called_is_in_this_library() -> None:
    """Nothing of NumPy or of Python's own stands in the table."""
    for make in pickle_values.KNOWN.values():
        assert make is None or (isinstance(make, types.FunctionType) and make.__module__ == pickle_values.__name__)
    assert all(
        "__slots__" in vars(part)
        for part in (pickle_values.Global, pickle_values.DTypeStandIn, pickle_values.ArrayStandIn)
    )


def test_reading_stops_at_the_first_unknown_name_and_errors_name_it(tmp_path: Path) -> None:
    (tmp_path / "it").write_bytes(b"\x80\x02" + named("os", "system") + b"r")
    with pytest.raises(ValueError, match=r"it is not a pickle .* refers to os\.system, which may run code"):
        safe_pickle.read(tmp_path / "it")


def test_sizes_that_are_refused(tmp_path: Path) -> None:
    (tmp_path / "empty").write_bytes(b"")
    with (tmp_path / "large").open("wb") as file:
        file.truncate(haiku.LARGEST_FILE + 1)
    for name in ("empty", "large"):
        with pytest.raises(ValueError, match=rf"{name} must hold a published Perceiver IO, at most 8589934592 bytes"):
            load_haiku(tmp_path / name)


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_arrays_of_all_layouts_are_read(protocol: int, tmp_path: Path) -> None:
    """Of each number, byte order and layout, and none at all, as NumPy pickles them."""
    of = np.arange(-3, 9)
    whole: list[Any] = [of.astype(code) for code in ("f2", "f4", "f8", ">f4", ">i2", "u1", "i8", "c8", "?")]
    whole += [of.reshape(3, 4).T.astype("f4"), of.reshape(3, 4)[::2, ::3], np.zeros((0, 3), "f4"), np.float64(3.0)]
    whole += [np.ones((), "f4")]
    saved = collections.OrderedDict((f"{i}", array) for i, array in enumerate(whole))
    (tmp_path / "it").write_bytes(pickle.dumps({"a": saved}, protocol))
    found = safe_pickle.read(tmp_path / "it")
    for wanted, got in zip(whole, found.values(), strict=True):
        again = got.read()
        np.testing.assert_array_equal(again, wanted)
        assert again.dtype == wanted.dtype.newbyteorder("=") and again.flags.writeable
        assert got.shape == wanted.shape and got.dtype.name == wanted.dtype.name


@pytest.mark.parametrize("module, name", [("jax._src.array", "_reconstruct_array"),
                                          ("jax._src.device_array", "reconstruct_device_array")])  # fmt: skip
def test_arrays_of_jax_are_read(module: str, name: str, tmp_path: Path) -> None:
    """As JAX pickles them, which need not be installed to read them."""
    ndarray, reconstruct = named("numpy", "ndarray"), named("numpy.core.multiarray", "_reconstruct")
    state = b"(" + plain(1) + plain((1, 1)) + F8 + plain(False) + of_bytes(struct.pack("<d", 2.5)) + b"t"
    args = b"(" + ndarray + plain((0,)) + plain(b"b") + b"t"
    made = called(named(module, name), reconstruct, args, state, plain({"weak_type": False}))
    (tmp_path / "it").write_bytes(b"\x80\x02" + within(made))
    assert safe_pickle.read(tmp_path / "it")["s/n"].read().tolist() == [[2.5]]
    (tmp_path / "it").write_bytes(b"\x80\x02" + called(named(module, name), ndarray, args, state, b"N") + b".")
    with pytest.raises(ValueError, match="not as JAX pickles one"):
        safe_pickle.read(tmp_path / "it")


def test_mappings_of_haiku_are_read(tmp_path: Path) -> None:
    """Made of a dictionary, or empty and then filled, in two ways."""
    mapping, inside = named("haiku._src.data_structures", "FlatMapping"), b"}" + plain("a") + ONE + b"s"
    state = b"}" + plain("_mapping") + inside + b"s"
    for filled in (inside, state, b"(" + inside + b"Nt"):
        (tmp_path / "it").write_bytes(b"\x80\x02}" + plain("s") + mapping + b")\x81" + filled + b"bs.")
        assert list(safe_pickle.read(tmp_path / "it")) == ["s/a"]
    for whole in (called(mapping, inside), called(mapping, called(mapping, inside))):
        (tmp_path / "it").write_bytes(b"\x80\x02}" + plain("s") + whole + b"s.")
        assert list(safe_pickle.read(tmp_path / "it")) == ["s/a"]
    for wrong in (called(mapping, plain([1])), called(mapping, inside, inside), mapping + b")\x81" + plain([1]) + b"b"):
        (tmp_path / "it").write_bytes(b"\x80\x02" + wrong + b".")
        with pytest.raises(ValueError, match="a mapping is"):
            safe_pickle.read(tmp_path / "it")


def test_references_to_buffers_outside_are_refused(tmp_path: Path) -> None:
    data = pickle.dumps(np.arange(3.0), 5, buffer_callback=lambda _: False)
    (tmp_path / "it").write_bytes(data)
    with pytest.raises(ValueError, match="outside itself"):
        safe_pickle.read(tmp_path / "it")
