"""The hub, played by fakes: what is downloaded, what happens when it does not answer."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from huggingface_hub import constants, errors

from hestctl.errors import HestError
from hestctl.model import backbone as module
from hestctl.model import hub as hub_module
from hestctl.model.backbone import load_backbone, parameter_estimate, tiny_backbone
from hestctl.settings import BackboneSettings

REPO = "org/model"
COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub:
    """Answers ``model_info`` and ``snapshot_download`` as the hub's client does."""

    def __init__(self, files: Path, cache: Path) -> None:
        self.files, self.cache = files, cache
        self.trouble: list[Exception] = []
        self.extra: list[str] = []
        self.asked = 0
        self.patterns: list[str] = []

    def model_info(self, repo_id: str, **options: Any) -> Any:
        assert repo_id == REPO
        assert options["timeout"] <= 4
        self.asked += 1
        if self.trouble:
            raise self.trouble.pop(0)
        found = [(path.name, path.stat().st_size) for path in self.files.iterdir()]
        found += [(name, 10**15) for name in self.extra]
        return SimpleNamespace(siblings=[SimpleNamespace(rfilename=name, size=size) for name, size in found])

    def download(self, repo_id: str, **options: Any) -> str:
        self.patterns = options["allow_patterns"]
        folder = self.cache / "models--org--model" / "snapshots" / COMMIT
        if not options.get("local_files_only"):
            shutil.copytree(self.files, folder, dirs_exist_ok=True)
        elif not folder.is_dir():
            raise errors.LocalEntryNotFoundError("not here")
        return str(folder)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    files = tmp_path / "files"
    tiny = tiny_backbone()
    tiny.model.save_pretrained(files)
    tiny.tokenizer.save_pretrained(files)
    made = Hub(files, tmp_path / "hub")
    monkeypatch.setenv("HESTCTL_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(made.cache))
    monkeypatch.setattr(hub_module, "HfApi", lambda: made)
    monkeypatch.setattr(hub_module, "snapshot_download", made.download)
    monkeypatch.setattr(hub_module.time, "sleep", lambda _: None)
    return made


def refusal(kind: type[errors.HfHubHTTPError], status: int) -> errors.HfHubHTTPError:
    response: Any = SimpleNamespace(status_code=status, headers={}, request=None)
    return kind("no", response=response)


def load(told: list[str] | None = None, **more: Any) -> module.Backbone:
    settings = BackboneSettings(name=REPO, device="cpu", **more)
    return load_backbone(settings, progress=[].append if told is None else told.append)


def test_download_is_announced_in_bytes_and_leaves_pickles_alone(hub: Hub) -> None:
    (hub.files / "pytorch_model.bin").write_bytes(b"pickle")
    (hub.files / "evil.py").write_text("")
    told: list[str] = []
    assert load(told).name == REPO
    assert told[0].startswith(f"downloading {REPO}: 5")
    assert told[0].endswith(f" bytes to {hub.cache}")
    assert not any(pattern in ("*", "*.bin", "*.py", "*.json") for pattern in hub.patterns)


def test_fingerprint_is_that_of_the_same_files_in_a_folder(hub: Hub) -> None:
    local = load_backbone(BackboneSettings(name=str(hub.files), device="cpu"))
    assert load().fingerprint == local.fingerprint


def test_pickle_only_repository_is_refused_before_any_download(hub: Hub) -> None:
    (hub.files / "model.safetensors").rename(hub.files / "pytorch_model.bin")
    with pytest.raises(HestError, match="pickled"):
        load()
    assert not hub.cache.exists()


def test_too_full_a_volume_names_the_bytes(hub: Hub) -> None:
    hub.extra = ["model-00001-of-00001.safetensors"]
    with pytest.raises(
        HestError, match=r"org/model needs 1,000,000,000,\d{3},\d{3} bytes in .*hub"
    ) as caught:
        load()
    assert "HF_HOME" in (caught.value.hint or "")


def test_busy_hub_is_asked_again(hub: Hub) -> None:
    hub.trouble = [refusal(errors.HfHubHTTPError, 429), refusal(errors.HfHubHTTPError, 503)]
    told: list[str] = []
    load(told)
    assert hub.asked == 3
    assert told[:2] == [
        "the hub answers 429; asking again in 1 s",
        "the hub answers 503; asking again in 2 s",
    ]


def test_unreachable_hub_is_asked_once(hub: Hub) -> None:
    hub.trouble = [ConnectionError("no route to host")]
    with pytest.raises(HestError, match=r"cannot reach the model hub.*no route to host") as caught:
        load()
    assert hub.asked == 1
    for way in ("local folder", "smollm2-135m-gguf", "random"):
        assert way in (caught.value.hint or "")


def test_offline_variable_is_explained(hub: Hub) -> None:
    hub.trouble = [errors.OfflineModeIsEnabled("offline")]
    with pytest.raises(HestError, match="HF_HUB_OFFLINE is set") as caught:
        load()
    assert "unset HF_HUB_OFFLINE" in (caught.value.hint or "")


@pytest.mark.parametrize(
    "trouble",
    [ConnectionError("down"), KeyError("id"), ValueError("not JSON"), errors.OfflineModeIsEnabled("off")],
)
def test_downloaded_copy_serves_when_the_hub_is_away(hub: Hub, trouble: Exception) -> None:
    first = load().fingerprint
    hub.trouble = [trouble]
    told: list[str] = []
    assert load(told).fingerprint == first
    assert told[0] == f"the hub does not answer; using the downloaded copy of {REPO}"


def test_half_a_downloaded_copy_does_not_serve(hub: Hub) -> None:
    load()
    next(hub.cache.rglob("model.safetensors")).unlink()
    hub.trouble = [ConnectionError("down")]
    with pytest.raises(HestError, match="cannot reach"):
        load()


@pytest.mark.parametrize(
    ("kind", "status", "message", "hint"),
    [
        (errors.GatedRepoError, 403, "org/model is gated", "hf auth login"),
        (errors.RepositoryNotFoundError, 401, "no model org/model", "hf auth login"),
        (errors.RevisionNotFoundError, 404, "no model org/model", "check the name"),
        (errors.HfHubHTTPError, 400, "it answers 400", "local folder"),
    ],
)
def test_refusals_say_what_to_do(
    hub: Hub, kind: type[errors.HfHubHTTPError], status: int, message: str, hint: str
) -> None:
    hub.trouble = [refusal(kind, status)]
    with pytest.raises(HestError, match=message) as caught:
        load()
    assert hint in (caught.value.hint or "")


def test_random_weights_and_estimate_take_the_config_alone(hub: Hub) -> None:
    expected = sum(p.numel() for p in tiny_backbone().model.parameters())
    for path in hub.files.iterdir():
        if path.name != "config.json":
            path.unlink()
    assert load(weights="random").weights == "random"
    assert hub.patterns == ["config.json"]
    assert parameter_estimate(BackboneSettings(name=REPO, dtype="bfloat16")) == (expected, 2 * expected)
    hub.files = hub.files / "none"
    shutil.rmtree(hub.cache)
    hub.trouble = [ConnectionError("down")]
    assert parameter_estimate(BackboneSettings(name=REPO)) is None


def test_real_client_finds_the_downloaded_copy(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    snapshot = Path(hub.download(REPO, allow_patterns=[]))
    refs = snapshot.parent.parent / "refs"
    refs.mkdir()
    (refs / "main").write_text(COMMIT)
    monkeypatch.undo()
    monkeypatch.setenv("HESTCTL_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    told: list[str] = []
    assert load(told).num_layers == 2
    assert told[0].startswith("the hub does not answer")
