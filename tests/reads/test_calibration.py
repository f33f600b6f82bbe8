"""Measurement of machine constants, and the command that prints them."""

from __future__ import annotations

import dataclasses
import re
from functools import partial

from perceiver_core import __main__ as commands
from perceiver_core import explain_reads
from perceiver_core.reads import Auto, Machine, calibration
from perceiver_core.reads.machine import MEASURED_CPU
from tests.reads.cases import images, model_of


def test_the_command_prints_constants_that_can_be_used(monkeypatch, capsys):
    """Measures briefly; a model then chooses by the result."""
    monkeypatch.setattr(commands, "calibrate", partial(calibration.calibrate, seconds=0.1))
    monkeypatch.setattr("sys.argv", ["perceiver_core", "costs"])
    commands.main()
    *table, _, call = capsys.readouterr().out.splitlines()
    names = [line.split()[0] for line in table[1:]]
    assert names == [field.name for field in dataclasses.fields(Machine)]
    values = dict(re.findall(r"(\w+)=([-\d.e+]+)", call))
    assert list(values) == names
    machine = Machine(**{name: float(value) for name, value in values.items()})
    assert all(value > 0 for name, value in dataclasses.asdict(machine).items() if name not in ("softmax", "channel"))
    model = model_of(Auto(machine=machine))
    [read, _] = explain_reads(model, images())
    assert read.cost.seconds > 0


def test_constants_of_the_grid_loop_keep_their_defaults_without_it(monkeypatch):
    monkeypatch.setattr(calibration, "_median", lambda work, seconds: 1.0)
    monkeypatch.setattr(calibration, "missing_kernel", lambda device, channels: "no compiler")
    machine = calibration.calibrate(seconds=0.0)
    assert (machine.pair, machine.channel, machine.blocks) == (
        MEASURED_CPU.pair,
        MEASURED_CPU.channel,
        MEASURED_CPU.blocks,
    )


def test_a_call_is_measured_after_a_warm_up():
    calls = []
    assert 0 < calibration._median(lambda: calls.append(1), 0.0) < 1
    assert len(calls) > 1
