"""Students on the Hugging Face hub, which a folder stands in for: no test needs a network."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch

from amalgam import AmalgamatedOptimizer, NominalConfig, NominalStudent, cli, hub, load_policy
from amalgam.evaluation.contenders import names_of
from amalgam.extras import MissingExtra
from amalgam.policies import DM, DMConfig, Policy


class HTTPError(Exception):
    """As httpx has it: no OSError."""


class EntryNotFoundError(Exception):
    """As huggingface_hub has it."""


class CommitOperationAdd(NamedTuple):
    path_in_repo: str
    path_or_fileobj: bytes


class Hub:
    """What is used of huggingface_hub, with a folder for each repository and revision."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.private: dict[str, bool] = {}
        self.commits: list[list[str]] = []
        self.fault: Exception | None = None

    def place(self, repo: str, revision: str | None) -> Path:
        return self.folder / repo / (revision or "main")

    def hf_hub_download(
        self, repo_id: str, filename: str, *, revision: str | None, library_name: str
    ) -> str:
        path = self.place(repo_id, revision) / filename
        if self.fault is not None:
            raise self.fault
        if not path.exists():
            raise EntryNotFoundError(f"404: no {filename} in {repo_id}")
        return str(path)

    def create_repo(self, repo: str, *, private: bool, exist_ok: bool) -> None:
        if self.fault is not None:
            raise self.fault
        assert exist_ok
        self.private.setdefault(repo, private)

    def file_exists(self, repo: str, filename: str) -> bool:
        return (self.place(repo, None) / filename).exists()

    def create_commit(
        self, repo: str, operations: Iterable[CommitOperationAdd], *, commit_message: str
    ) -> SimpleNamespace:
        operations = list(operations)
        for operation in operations:
            path = self.place(repo, None) / operation.path_in_repo
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(operation.path_or_fileobj)
        self.commits.append([operation.path_in_repo for operation in operations])
        return SimpleNamespace(commit_url=f"https://hub/{repo}/commit/{len(self.commits)}")


@pytest.fixture
def there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    stand_in = Hub(tmp_path / "hub")
    module: Any = ModuleType("huggingface_hub")
    module.errors = ModuleType("huggingface_hub.errors")
    module.errors.HTTPError = HTTPError
    module.errors.EntryNotFoundError = EntryNotFoundError
    module.hf_hub_download = stand_in.hf_hub_download
    module.HfApi = lambda library_name: stand_in
    module.CommitOperationAdd = CommitOperationAdd
    monkeypatch.setitem(sys.modules, "huggingface_hub", module)
    monkeypatch.setitem(sys.modules, "huggingface_hub.errors", module.errors)
    return stand_in


def student(**about: Any) -> NominalStudent:
    generator = torch.Generator().manual_seed(1)
    return NominalStudent(NominalConfig(hidden=3), generator=generator, provenance=about)


def same(a: Policy, b: Policy) -> bool:
    return all(map(torch.equal, a.weights(), b.weights())) and a.config == b.config


def test_what_is_pushed_is_read_by_its_address(there: Hub) -> None:
    ours = student(seed=3)
    assert hub.push(ours, "me/mine", private=True) == "https://hub/me/mine/commit/1"
    assert there.private == {"me/mine": True}
    back = load_policy("hf://me/mine")
    assert same(back, ours)
    assert back.provenance == {"seed": 3}
    assert same(NominalStudent.load("hf://me/mine"), ours)
    optimizer = AmalgamatedOptimizer([torch.nn.Parameter(torch.ones(2))], student="hf://me/mine")
    assert optimizer.config == ours.config


def test_revisions_and_other_files(there: Hub) -> None:
    student().save(there.place("me/mine", "v0.1") / "student.safetensors")
    dm = DM(DMConfig(hidden=2), generator=torch.Generator().manual_seed(0))
    dm.save(there.place("me/mine", "v0.1") / "a" / "b.safetensors")
    dm.save(there.place("me/mine", None) / "b.safetensors")
    assert load_policy("hf://me/mine@v0.1").kind == "nominal"
    assert load_policy("hf://me/mine@v0.1/a/b.safetensors").kind == "dm"
    assert load_policy("hf://me/mine/b.safetensors").kind == "dm"


def test_one_commit_has_student_and_card_and_no_card_is_replaced(there: Hub) -> None:
    hub.push(student(), "me/mine")
    path = there.place("me/mine", None) / "README.md"
    path.write_text("my own words")
    hub.push(student(seed=4), "me/mine")
    assert there.commits == [["student.safetensors", "README.md"], ["student.safetensors"]]
    assert path.read_text() == "my own words"
    assert load_policy("hf://me/mine").provenance == {"seed": 4}


def test_the_card_says_what_is_known_and_its_code_runs(there: Hub) -> None:
    shipped = load_policy("standard")
    hub.push(shipped, "me/standard-copy")
    text = (there.place("me/standard-copy", None) / "README.md").read_text()
    assert text.startswith("---\nlibrary_name: amalgam\n")
    assert f"# standard-copy\n\n{shipped.description}\n" in text
    assert "| recipe | standard |" in text
    assert f"| weights of meta-step | {shipped.provenance['kept_meta_step']} |" in text
    assert f"| amalgam | 0.1.0 {shipped.provenance['commit']} |" in text
    assert "teachers" not in text  # it had none
    (code,) = text.split("```python\n")[1:]
    names: dict[str, Any] = {"model": torch.nn.Linear(2, 1)}
    exec(code.split("```")[0], names)
    assert names["optimizer"].config == shipped.config

    generator = torch.Generator().manual_seed(0)
    bare = hub.card(DM(DMConfig(hidden=2), generator=generator), "me/dm")
    assert 'PolicyOptimizer(model.parameters(), policy="hf://me/dm")' in bare
    assert "None" not in bare
    cells = student(teachers=["a|b", "c"], resolved={"description": None})
    assert r"| teachers | a\|b, c |" in hub.card(cells, "me/mine")


def test_a_downloaded_file_is_checked_as_any_other(there: Hub) -> None:
    hub.push(student(), "me/mine")
    path = there.place("me/mine", None) / "student.safetensors"
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(ValueError, match="not a whole safetensors file"):
        load_policy("hf://me/mine")


def test_what_cannot_be_reached_is_named(there: Hub) -> None:
    with pytest.raises(
        FileNotFoundError, match=r"'hf://me/none' can't be fetched: 404: no student"
    ):
        load_policy("hf://me/none")
    for fault in (HTTPError("no route"), OSError("no route")):
        there.fault = fault
        with pytest.raises(FileNotFoundError, match=r"'hf://me/mine@v1' can't be .*: no route"):
            load_policy("hf://me/mine@v1")
        with pytest.raises(OSError, match=r"can't be pushed to 'me/mine': no route"):
            hub.push(student(), "me/mine")
    assert not there.folder.exists()


@pytest.mark.parametrize("address", ["hf://", "hf://mine", "hf://me/", "hf://me/a@", "hf://@b/c"])
def test_what_is_no_address_is_refused(address: str, there: Hub) -> None:
    with pytest.raises(ValueError, match=f"hf://OWNER/NAME.*, not '{address}'"):
        load_policy(address)


@pytest.mark.parametrize("repo", ["mine", "hf://me/mine", "me/mine@v1", "me/", ""])
def test_what_is_no_repository_is_refused(repo: str, there: Hub) -> None:
    with pytest.raises(ValueError, match=f"OWNER/NAME, not '{repo}'"):
        hub.push(student(), repo)


def test_without_the_client_the_call_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    for call in (lambda: load_policy("hf://me/mine"), lambda: hub.push(student(), "me/mine")):
        with pytest.raises(MissingExtra, match=r"me/mine.*pip install 'amalgam-optim\[hub\]'"):
            call()


def test_contenders_are_named_after_their_repositories() -> None:
    addresses = ["hf://me/mine-0.1", "hf://me/mine-0.2", "runs/a/student.safetensors", "standard"]
    assert names_of(addresses) == ["mine-0.1", "mine-0.2", "student", "standard"]


def test_the_command_pushes_what_loads(
    there: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    student().save(tmp_path / "mine.safetensors")
    cli.push(str(tmp_path / "mine.safetensors"), "me/mine")
    assert capsys.readouterr().out == "https://hub/me/mine/commit/1\n"
    assert same(load_policy("hf://me/mine"), student())
    (tmp_path / "mine.safetensors").write_bytes(b"no student")
    with pytest.raises(ValueError, match="not a whole safetensors file"):
        cli.push(str(tmp_path / "mine.safetensors"), "me/mine")
    assert len(there.commits) == 1
