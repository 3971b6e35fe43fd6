"""The cache: kept whole, checked when read, made anew where it is damaged."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from amalgam.tasks import cache


class Maker:
    """Makes two tensors, and counts how often."""

    def __init__(self) -> None:
        self.times = 0

    def __call__(self) -> dict[str, Tensor]:
        self.times += 1
        return {"b": torch.arange(6, dtype=torch.uint8).view(2, 3), "a": torch.tensor([7])}


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("AMALGAM_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(
        one[name].dtype == other[name].dtype and torch.equal(one[name], other[name]) for name in one
    )


def test_what_is_kept_is_not_made_again(folder: Path) -> None:
    make = Maker()
    first = cache.tensors("two", make)
    assert same(cache.tensors("two", make), first)
    assert make.times == 1
    assert [path.name for path in folder.iterdir()] == ["two.safetensors"]
    cache.tensors("three", make)
    assert make.times == 2


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def unsigned(path: Path) -> None:
    save_file(load_file(path), path)


def foreign(path: Path) -> None:
    path.write_text("{}")


@pytest.mark.parametrize("damage", [cut, flip, unsigned, foreign])
def test_a_damaged_file_is_made_anew(folder: Path, damage) -> None:
    make = Maker()
    first = cache.tensors("two", make)
    damage(folder / "two.safetensors")
    assert same(cache.tensors("two", make), first)
    assert make.times == 2
    assert same(cache.tensors("two", make), first)
    assert make.times == 2


def test_without_a_place_there_is_a_warning(folder: Path) -> None:
    folder.write_text("a file, not a folder")
    make = Maker()
    with pytest.warns(UserWarning, match="can't be kept .* until AMALGAM_CACHE names a folder"):
        made = cache.tensors("two", make)
    assert same(made, make())
    assert folder.read_text() == "a file, not a folder"


def test_nothing_is_left_of_what_fails(folder: Path) -> None:
    def fail() -> dict[str, Tensor]:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        cache.tensors("two", fail)
    assert not folder.exists()


@pytest.mark.parametrize(
    ("own", "shared", "expected"),
    [
        ("/a/b", "/c", "/a/b"),
        ("~/b", "/c", "/home/me/b"),
        ("", "/c", "/c/amalgam"),
        ("", "c", "/home/me/.cache/amalgam"),
        ("", "", "/home/me/.cache/amalgam"),
    ],
)
def test_the_folder(monkeypatch: pytest.MonkeyPatch, own: str, shared: str, expected: str) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.setenv("AMALGAM_CACHE", own)
    monkeypatch.setenv("XDG_CACHE_HOME", shared)
    assert cache.folder() == Path(expected)
