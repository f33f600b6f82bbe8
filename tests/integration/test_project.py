"""Documentation and project files: examples run, links work, versions and dependencies agree."""

from __future__ import annotations

import ast
import doctest
import inspect
import re
from pathlib import Path

import pytest
import torch

import perceiver_core as pc
from tests.registered import restored
from tools import constraints

pytestmark = pytest.mark.no_shape_checks

tomllib = pytest.importorskip("tomllib", reason="Python 3.11 reads TOML")

ROOT = Path(__file__).resolve().parents[2]
SOURCES = sorted((ROOT / "src" / "perceiver_core").rglob("*.py"))
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
PYTHON = re.compile(r"^(?P<indent> *)```python\n(?P<code>.*?)^ *```$", re.DOTALL | re.MULTILINE)
EXTRAS = {"images", "hub", "plots", "akoa", "dev", "docs", "ecosystem"}
# Names that only make sense together with another, whose example shows both.
SHOWN_IN = {
    "perceiver_core.kernels.PartialAttention": "perceiver_core.kernels.partial_attention",
    "perceiver_core.kernels.merge": "perceiver_core.kernels.partial_attention",
    "perceiver_core.load": "perceiver_core.save",
    "perceiver_core.ReadExplanation": "perceiver_core.explain_reads",
    "perceiver_core.reads.Cost": "perceiver_core.reads.Decision",
    "perceiver_core.reads.FactoredKeysValues": "perceiver_core.reads.factor",
    "perceiver_core.reads.Memory": "perceiver_core.reads.KeysValues",
    "perceiver_core.reads.ReadContext": "perceiver_core.reads.Decision",
    "perceiver_core.reads.Sizes": "perceiver_core.reads.Decision",
    "perceiver_core.reads.Strategy": "perceiver_core.reads.Dense",
}
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]

ECOSYSTEM = [re.match(r"[\w-]+", dependency)[0] for dependency in PROJECT["optional-dependencies"]["ecosystem"]]


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def blocks(page: Path) -> list[str]:
    return [inspect.cleandoc("\n" + actual["code"]) for actual in PYTHON.finditer(page.read_text())]


def public(module: object) -> dict[str, object]:
    """Every public class and function, by its dotted name, in the package and in the modules that it exports."""
    actual: dict[str, object] = {}
    for name in module.__all__:
        thing = getattr(module, name)
        where = f"{module.__name__}.{name}"
        if inspect.isclass(thing) or inspect.isfunction(thing):
            actual[where] = thing
        elif inspect.ismodule(thing) and hasattr(thing, "__all__"):
            actual |= public(thing)
    return actual


@pytest.fixture
def one_thread():
    """Pages compute little, and more threads only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.slow
# PyTorch's own, in the page on quantization: quantize_dynamic and its tensors are deprecated
@pytest.mark.filterwarnings("ignore:torch.ao.quantization is deprecated:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor, torch.quantize_per_channel:UserWarning")
# Lightning's own, in the page on it: of the summary, few batches and few workers
@pytest.mark.filterwarnings("ignore:Precision bf16-mixed is not supported by the model summary:UserWarning")
@pytest.mark.filterwarnings("ignore:The number of training batches:UserWarning")
@pytest.mark.filterwarnings("ignore:.* does not have many workers:UserWarning")
# On look-inside.md: PyTorch's own, of TensorBoard's graph and of vmap on the CPU; captum's and Opacus's own
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@pytest.mark.filterwarnings("ignore:There is a performance drop because:UserWarning")
@pytest.mark.filterwarnings("ignore:Input Tensor .* did not already require gradients:UserWarning")
@pytest.mark.filterwarnings("ignore:Secure RNG turned off:UserWarning")
@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page)], ids=name_of)
def test_the_python_of_a_page_runs_in_order(page, one_thread):
    names: dict[str, object] = {"__name__": "__page__"}
    with restored():  # pages register parts of their own, maybe under names that tests have registered too
        for name, thing in list(pc.registry.names._named.items()):
            if thing.__module__.startswith("tests."):
                del pc.registry.names._named[name], pc.registry.names._names[thing]
        try:
            for code in blocks(page):
                exec(compile(code, name_of(page), "exec"), names)
        except ModuleNotFoundError as error:  # CI installs the extra; the core suite does not need it
            if (error.name or "").replace("_", "-") not in {name.removesuffix("-core") for name in ECOSYSTEM}:
                raise
            pytest.skip(f"{error.name} is not installed")


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_of_a_page_have_targets(page):
    targets = re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", page.read_text())
    local = [target for target in targets if "://" not in target]
    assert [target for target in local if not (page.parent / target).exists()] == []


def test_the_extras_named_in_the_pages_exist():
    assert set(PROJECT["optional-dependencies"]) == EXTRAS


def test_there_are_five_runtime_dependencies():
    names = {re.match(r"[\w-]+", dependency)[0] for dependency in PROJECT["dependencies"]}
    assert names == {"torch", "numpy", "einops", "jaxtyping", "safetensors"}


def test_every_dependency_is_pinned():
    expected = [*PROJECT["dependencies"], *(d for extra in PROJECT["optional-dependencies"].values() for d in extra)]
    pins = re.findall(r"^([\w.-]+)==[\w.]+(?: ; .*)?$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    normal = {re.sub(r"[-_.]+", "-", name).lower() for name in pins}
    names = {re.sub(r"[-_.]+", "-", re.match(r"[\w-]+", d)[0]).lower() for d in expected}
    assert names - normal == constraints.UNPINNED


def test_the_version_is_consistent():
    changelog = (ROOT / "CHANGELOG.md").read_text()
    citation = (ROOT / "CITATION.cff").read_text()
    assert re.findall(r"^## \[(\d[^\]]*)\]", changelog, re.MULTILINE)[0] == pc.__version__
    assert re.search(r"^version: (.+)$", citation, re.MULTILINE)[1] == pc.__version__


@pytest.mark.parametrize("source", SOURCES, ids=name_of)
def test_nothing_is_unpickled_evaluated_or_executed(source):
    tree = ast.parse(source.read_text())
    names = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    imported = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    imported |= {node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    attributes = {ast.unparse(node) for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    assert names & {"eval", "exec", "__import__", "compile"} == set()
    # An exception, which tests/checkpoints/test_folder_executes_nothing.py looks into: torch.load for tensors alone.
    allowed = {"torch_archive.py": {"torch.load"}}.get(source.name, set())
    loaders = {"pickle", "cloudpickle", "dill", "marshal", "shelve"} - allowed
    assert {name.split(".")[0] for name in imported} & loaders == set()
    assert attributes & ({"torch.save", "torch.load"} - allowed) == set()


@pytest.mark.parametrize("name, thing", public(pc).items(), ids=public(pc).keys())
def test_every_public_name_has_a_docstring_with_an_example(name, thing):
    documentation = inspect.getdoc(thing)
    assert documentation, f"{name} has no docstring"
    shown = inspect.getdoc(public(pc)[SHOWN_IN.get(name, name)])
    assert doctest.DocTestParser().get_examples(shown), f"{name} has no example"


def test_every_name_in_all_exists():
    for module in (pc, pc.adapters, pc.kernels, pc.models, pc.positions):
        assert sorted(module.__all__, key=str.lower) == sorted(set(module.__all__), key=str.lower)
        assert [name for name in module.__all__ if not hasattr(module, name)] == []


def test_every_public_name_has_an_entry_in_the_reference():
    pages = "\n".join(page.read_text() for page in (ROOT / "docs" / "api").glob("*.md"))
    entries = set(re.findall(r"auto(?:class|function|module):: (\S+)", pages))
    missing = []
    for name, thing in public(pc).items():
        if name not in entries and not {f"perceiver_core.{name.split('.')[-1]}", thing.__module__} & entries:
            missing.append(name)
    assert missing == []
