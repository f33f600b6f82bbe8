"""Models on the hub, without it: what its functions are asked for, and folders that need none of them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

import perceiver_core as pc
from perceiver_core.checkpoints import from_pretrained, push_to_hub, save_pretrained
from perceiver_core.checkpoints.card import as_calls, card
from perceiver_core.interop import load_transformers

huggingface_hub = pytest.importorskip("huggingface_hub")


def model(seed: int = 0) -> pc.Perceiver:
    torch.manual_seed(seed)
    audio = pc.adapters.Audio(patch_size=3, positions=pc.positions.Fourier(num_axes=1, num_bands=2, max_resolution=11))
    encoder = pc.Encoder(audio.dim, num_latents=5, dim=8, depth=1, num_heads=2)
    return pc.Perceiver(audio, encoder, pc.heads.Classification(8, num_classes=7)).eval()


WHOLE = {
    "Perceiver": model,
    "PerceiverIO": lambda: pc.PerceiverIO(
        pc.adapters.Grid(3, positions=None),
        pc.Encoder(3, num_latents=5, dim=8, depth=1, num_heads=2),
        pc.queries.Learned(2, 7),
        pc.Decoder(8, query_dim=7, out_dim=1),
    ),
    "PerceiverAR": lambda: pc.models.presets.perceiver_ar(11, context_length=13, num_latents=5, depth=1),
    "Resampler": lambda: pc.Resampler(6, num_latents=5, depth=1, num_heads=2),
    "HierarchicalPerceiver": lambda: pc.HierarchicalPerceiver(
        3,
        levels=[pc.Level(2, num_latents=3, dim=16), pc.Level(1, num_latents=5, dim=16)],
        positions=pc.positions.LearnedGrid((22,), dim=8),
    ),
    "Encoder": lambda: pc.Encoder(10, num_latents=5, dim=8, depth=1, num_heads=2),
}


class Hub:
    """Stands for the hub: keeps what it is asked for, has what it is given."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.asked, self.files, self.card = folder, [], {}, False

    def snapshot_download(self, name: str, **asked: Any) -> str:
        self.asked.append(("snapshot_download", name, asked))
        return str(self.folder)

    def HfApi(self, **asked: Any) -> Hub:
        self.asked.append(("HfApi", asked))
        return self

    def create_repo(self, name: str, **asked: Any) -> SimpleNamespace:
        self.asked.append(("create_repo", name, asked))
        return SimpleNamespace(repo_id=f"me/{name}" if "/" not in name else name)

    def create_branch(self, name: str, **asked: Any) -> None:
        self.asked.append(("create_branch", name, asked))

    def file_exists(self, name: str, file: str, **asked: Any) -> bool:
        self.asked.append(("file_exists", name, file, asked))
        return self.card

    def upload_folder(self, *, folder_path: str, **asked: Any) -> SimpleNamespace:
        self.asked.append(("upload_folder", asked))
        for path in Path(folder_path).iterdir():
            (self.folder / path.name).write_bytes(path.read_bytes())
        return SimpleNamespace(commit_url=f"https://huggingface.co/{asked['repo_id']}/commit/1")

    def names(self) -> list[str]:
        return [name for name, *_ in self.asked]


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    (tmp_path / "hub").mkdir()
    stand_in = Hub(tmp_path / "hub")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", stand_in.snapshot_download)
    monkeypatch.setattr(huggingface_hub, "HfApi", stand_in.HfApi)
    return stand_in


@pytest.fixture
def no_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)


@pytest.mark.parametrize("kind", WHOLE)
def test_a_folder_needs_no_hub(kind: str, tmp_path: Path, no_hub: None) -> None:
    made = WHOLE[kind]()
    folder = save_pretrained(made, tmp_path / "model")
    assert sorted(path.name for path in folder.iterdir()) == ["README.md", "config.json", "model.safetensors"]
    for again in (from_pretrained(folder), pc.load(folder)):
        assert type(again) is type(made) and not again.training
        torch.testing.assert_close(again.state_dict(), made.state_dict(), rtol=0.0, atol=0.0)
    assert f"A {type(made).__name__} with" in (folder / "README.md").read_text()


def test_a_folder_has_no_revisions(tmp_path: Path, no_hub: None) -> None:
    folder = save_pretrained(model(), tmp_path)
    with pytest.raises(ValueError, match="revision is of a repository on the hub"):
        from_pretrained(folder, revision="v1")


def test_a_card_that_is_there_stays(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("mine")
    save_pretrained(model(), tmp_path)
    assert (tmp_path / "README.md").read_text() == "mine"


def test_the_card_says_how_to_load_and_of_what(tmp_path: Path) -> None:
    text = card(model(), "me/listener")
    assert text.startswith("---\nlibrary_name: perceiver-core\n")
    assert "# listener\n" in text and 'pc.checkpoints.from_pretrained("me/listener")' in text
    assert "adapter=Audio(patch_size=3, positions=Fourier(num_axes=1, num_bands=2, max_resolution=11))," in text
    assert f"{sum(p.numel() for p in model().parameters()):,} parameters" in text
    assert "registers" not in text


def test_the_card_names_what_registers_parts_that_are_not_ours() -> None:
    class Own(nn.Module):
        pass

    taken = pc.registry.names._named.copy(), pc.registry.names._names.copy()
    pc.register(Own, name="Own")
    try:
        assert f"first: {__name__}." in card(Own(), "own")
    finally:
        pc.registry.names._named.clear()
        pc.registry.names._names.clear()
        pc.registry.names._named.update(taken[0])
        pc.registry.names._names.update(taken[1])


def test_calls_are_those_that_make_a_description() -> None:
    description = {"part": "A", "x": [1, None, 'a"b'], "y": {"dict": {"k": {"name": "f"}}}, "z": {"same": "y.k"}}
    assert as_calls(description) == 'A(x=[1, None, "a\\"b"], y={"k": f}, z=y.k)'
    assert as_calls({"part": "A", "x": list(range(40))}).startswith("A(\n    x=[\n        0,\n        1,\n")


def test_what_is_pushed_is_what_comes_back(hub: Hub) -> None:
    made = model()
    address = push_to_hub(made, "me/listener", message="first", private=True, token="secret")
    assert address == "https://huggingface.co/me/listener/commit/1"
    commit = {"repo_id": "me/listener", "commit_message": "first", "revision": None, "create_pr": False}
    assert hub.asked == [
        ("HfApi", {"token": "secret"}),
        ("create_repo", "me/listener", {"exist_ok": True, "private": True}),
        ("file_exists", "me/listener", "README.md", {"revision": None}),
        ("upload_folder", commit),
    ]
    assert 'from_pretrained("me/listener")' in (hub.folder / "README.md").read_text()
    again = from_pretrained("me/listener", revision="v1", token="secret", cache_dir="cache", local_files_only=True)
    told = {"revision": "v1", "token": "secret", "cache_dir": "cache", "local_files_only": True}
    files = {"allow_patterns": ["config.json", "model.safetensors"]}
    assert hub.asked[-1] == ("snapshot_download", "me/listener", files | told)
    sound = torch.randn(2, 33)
    torch.testing.assert_close(again(sound), made(sound), rtol=0.0, atol=0.0)


def test_the_owner_decides_whether_it_is_private_and_of_the_name(hub: Hub) -> None:
    push_to_hub(model(), "listener", revision="try")
    assert ("create_repo", "listener", {"exist_ok": True}) in hub.asked
    assert ("create_branch", "me/listener", {"branch": "try", "exist_ok": True}) in hub.asked
    assert hub.asked[-1][1]["repo_id"] == "me/listener" and hub.asked[-1][1]["revision"] == "try"


def test_a_pull_request_makes_no_branch(hub: Hub) -> None:
    push_to_hub(model(), "me/listener", revision="try", create_pr=True)
    assert "create_branch" not in hub.names() and hub.asked[-1][1]["create_pr"]


def test_a_card_on_the_hub_stays(hub: Hub) -> None:
    hub.card = True
    push_to_hub(model(), "me/listener")
    assert sorted(path.name for path in hub.folder.iterdir()) == ["config.json", "model.safetensors"]


def test_a_model_that_is_refused_makes_nothing_on_the_hub(hub: Hub) -> None:
    with pytest.raises(ValueError, match="not registered"):
        push_to_hub(nn.Linear(3, 5), "me/linear")
    assert hub.asked == []


def test_errors_without_the_package_say_what_to_install(no_hub: None) -> None:
    with pytest.raises(FileNotFoundError, match=r"no folder me/listener; .* pip install perceiver-core\[hub\]"):
        from_pretrained("me/listener")
    with pytest.raises(FileNotFoundError, match=r"pip install perceiver-core\[hub\]"):
        load_transformers("deepmind/vision-perceiver-fourier")
    with pytest.raises(ImportError, match=r"needs huggingface_hub; pip install perceiver-core\[hub\]"):
        push_to_hub(model(), "me/listener")


@pytest.mark.parametrize("name", ["nowhere", "./me/listener", "/me/listener", "a/b/c", "~/listener"])
def test_errors_of_a_folder_that_is_not_there_ask_no_hub(name: str, hub: Hub) -> None:
    with pytest.raises(FileNotFoundError, match="must be a folder, or owner/name on the hub; there is none at"):
        from_pretrained(name)
    assert hub.asked == []


def test_transformers_models_come_from_the_hub_too(hub: Hub) -> None:
    with pytest.raises(FileNotFoundError, match=r"must hold config\.json"):
        load_transformers("me/theirs")
    files = ["config.json", "model.safetensors", "model.safetensors.index.json", "model-*-of-*.safetensors"]
    assert hub.asked == [("snapshot_download", "me/theirs", {"allow_patterns": files})]


def test_the_packages_are_not_imported_with_the_library() -> None:
    others = {"huggingface_hub", "transformers", "perceiver_pytorch"}
    program = f"import sys, perceiver_core.__main__; assert not {others} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", program], check=True)
