"""What an upload needs is asked first, each in one sentence; then a private repository gets the whole folder."""

from pathlib import Path
from types import SimpleNamespace

import pytest

from lcprune.delivery import hub
from lcprune.errors import InputError, RunError


class _Hub:
    """Stands in for HfApi; remembers what was asked of it."""

    def __init__(self, error: Exception | None = None) -> None:
        self.error = error
        self.calls: list[tuple[str, dict[str, object]]] = []

    def __call__(self) -> "_Hub":
        return self

    def whoami(self) -> None:
        if self.error is not None:
            raise self.error

    def create_repo(self, name: str, **options: object) -> object:
        self.calls.append((name, options))
        return type("Url", (SimpleNamespace,), {"__str__": lambda url: f"https://hub/{url.repo_id}"})(
            repo_id=f"me/{name}"
        )

    def upload_folder(self, **options: object) -> None:
        if self.error is not None:
            raise self.error
        self.calls.append(("upload", options))


@pytest.fixture
def online(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(hub, "get_token", lambda: "token")


def test_upload_offline_is_refused(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(InputError, match="HF_HUB_OFFLINE is set"):
        hub.check("me/short")


@pytest.mark.usefixtures("online")
def test_upload_under_a_name_that_is_none_is_refused():
    with pytest.raises(InputError, match="--push-to-hub me/short/of is no name for the hub"):
        hub.check("me/short/of")


@pytest.mark.usefixtures("online")
def test_upload_without_a_login_is_refused(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(hub, "get_token", lambda: None)
    with pytest.raises(InputError, match="hf auth login"):
        hub.check("me/short")


@pytest.mark.usefixtures("online")
def test_upload_that_the_hub_refuses_is_refused(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(hub, "HfApi", _Hub(ConnectionError("no route\nto the hub")))
    with pytest.raises(InputError, match=r"does not let you in \(no route\)"):
        hub.check("me/short")


def test_upload_sends_the_folder_to_a_private_repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    server = _Hub()
    monkeypatch.setattr(hub, "HfApi", server)
    assert hub.push(tmp_path, "short") == "https://hub/me/short"
    (name, made), (_, sent) = server.calls
    assert (name, made) == ("short", {"private": True, "exist_ok": True})
    assert (sent["repo_id"], sent["folder_path"]) == ("me/short", tmp_path)


def test_upload_that_breaks_off_says_how_to_repeat_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(hub, "HfApi", _Hub(OSError("reset by peer")))
    with pytest.raises(RunError, match=f"reset by peer.*lcprune export {tmp_path} --push-to-hub short"):
        hub.push(tmp_path, "short")


def test_paths_of_this_machine_are_found_in_what_is_uploaded(tmp_path: Path):
    assert hub.local_paths(tmp_path) == {}
    (tmp_path / "recipe.yaml").write_text("model: {teacher: owner/name}\ndata:\n  path: [a.txt, /home/me/b.txt]\n")
    (tmp_path / "history.json").write_text('{"teacher": "~/models/m", "steps": [{"scores": {"bi": 0.5}}]}')
    (tmp_path / "evaluation.json").write_text('{"model": "short", "text": "held-out/part"}')
    assert hub.local_paths(tmp_path) == {"recipe.yaml": "/home/me/b.txt", "history.json": "~/models/m"}
