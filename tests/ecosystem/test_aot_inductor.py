"""A model compiled ahead of time by AOTInductor, and loaded as a package that needs no Python code of this library."""

from __future__ import annotations

import pytest
import torch
from torch.utils._pytree import tree_leaves

from tests.ecosystem.export_cases import CASES, built, outputs, sizes, varying

pytestmark = [
    pytest.mark.compile,
    pytest.mark.no_shape_checks,
    pytest.mark.slow,
    pytest.mark.usefixtures("fresh"),
    # torch's own, when it decomposes an exported program
    pytest.mark.filterwarnings(r"ignore:`isinstance\(treespec, LeafSpec\)` is deprecated:FutureWarning"),
]


def test_a_package_runs_at_other_sizes(tmp_path):
    case = CASES["masked points"]
    model, (args, kwargs) = built(case), case.inputs(5, 8)
    program = torch.export.export(model, args, kwargs, dynamic_shapes=varying(model, case))
    path = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "model.pt2"))
    package = torch._inductor.aoti_load_package(path)
    for b, n in sizes(case):
        args, kwargs = inputs = case.inputs(b, n)
        actual = tree_leaves(package(*args, **kwargs))
        torch.testing.assert_close(actual, outputs(model, inputs), rtol=1e-5, atol=1e-5)
