"""Published formats, written small: read whole, and refused where they are cut or another's."""

import gzip
import shlex
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.io import savemat

from amalgam.tasks import datasets, glyphs, published

COUNTS = (10, 5)
SMALL = {name: replace(of, counts=COUNTS) for name, of in published.PUBLISHED.items()}


def drawn(name: str, part: int) -> tuple[np.ndarray, np.ndarray]:
    """Images (samples, channels, height, width) and labels of a part, of every kind of byte."""
    rng = np.random.default_rng(part)
    of = SMALL[name]
    images = rng.integers(0, 256, (of.counts[part], *of.shape), dtype=np.uint8)
    return images, rng.integers(0, of.classes, of.counts[part], dtype=np.uint8)


def write_idx(name: str, root: Path, folder: str = "", compressed: bool = True) -> Path:
    folder = folder or SMALL[name].folders[0]
    (root / folder).mkdir(parents=True)
    for part, prefix in enumerate(("train", "t10k")):
        for kind, array in zip(("images-idx3", "labels-idx1"), drawn(name, part), strict=True):
            array = array.squeeze(1) if array.ndim == 4 else array
            header = bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">i4").tobytes()
            path = root / folder / f"{prefix}-{kind}-ubyte"
            content = header + array.tobytes()
            if compressed:
                path = path.with_name(f"{path.name}.gz")
                content = gzip.compress(content)
            path.write_bytes(content)
    return root / folder


def write_cifar(name: str, root: Path) -> Path:
    of = SMALL[name]
    folder = root / of.folders[0]
    folder.mkdir(parents=True)
    for part, files in enumerate((of.files[:-1], of.files[-1:])):
        images, labels = drawn(name, part)
        columns = [labels[:, None], images.reshape(len(images), -1)]
        if of.classes == 100:
            columns.insert(0, labels[:, None] // 5)
        records = np.concatenate(columns, 1)
        for file, some in zip(files, np.split(records, len(files)), strict=True):
            (folder / file).write_bytes(some.tobytes())
    return folder


def write_svhn(name: str, root: Path, labels_of: type = np.uint8) -> Path:
    root.mkdir(exist_ok=True)
    for part, file in enumerate(SMALL[name].files):
        images, labels = drawn(name, part)
        ten = np.where(labels == 0, 10, labels).astype(labels_of)
        content = {"X": images.transpose(2, 3, 1, 0), "y": ten[:, None]}
        savemat(root / file, content, do_compression=True)
    return root


WRITE: dict[str, Callable[[str, Path], Path]] = {
    **dict.fromkeys(("mnist", "fmnist", "kmnist"), write_idx),
    **dict.fromkeys(("cifar10", "cifar100"), write_cifar),
    "svhn": write_svhn,
}


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """The published sets with few images, and their stand-ins with as few."""
    for name, of in SMALL.items():
        monkeypatch.setitem(published.PUBLISHED, name, of)
        stand_in = replace(glyphs._STAND_INS[name], train=10, validation=5)
        monkeypatch.setitem(glyphs._STAND_INS, name, stand_in)
    monkeypatch.delenv("AMALGAM_DATA", raising=False)


def check(name: str, found: datasets.DataSet) -> None:
    for part, (images, labels) in enumerate((found.train, found.validation)):
        expected_images, expected_labels = drawn(name, part)
        assert images.dtype == torch.uint8
        assert images.is_contiguous()
        assert labels.dtype == torch.int64
        assert np.array_equal(images.numpy(), expected_images)
        assert np.array_equal(labels.numpy(), expected_labels)


@pytest.mark.parametrize("name", SMALL)
def test_published_sets_are_read(name: str, tmp_path: Path) -> None:
    WRITE[name](name, tmp_path)
    found = datasets.load(name, tmp_path)
    assert found.source == "published"
    assert (found.shape, found.classes) == (SMALL[name].shape, SMALL[name].classes)
    check(name, found)


@pytest.mark.parametrize("compressed", [True, False])
@pytest.mark.parametrize("folder", ["MNIST/raw", "MNIST"])
def test_idx_files_compressed_or_not(tmp_path: Path, folder: str, compressed: bool) -> None:
    write_idx("mnist", tmp_path, folder, compressed)
    check("mnist", datasets.load("mnist", tmp_path))


def test_auto_takes_what_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_idx("mnist", tmp_path)
    assert datasets.load("mnist").source == "glyphs"
    monkeypatch.setenv("AMALGAM_DATA", str(tmp_path))
    check("mnist", datasets.load("mnist"))
    assert datasets.load("mnist", "glyphs").source == "glyphs"
    assert datasets.load("fmnist").source == "glyphs"
    with pytest.raises(FileNotFoundError, match="Fashion-MNIST is not in .*FashionMNIST/raw or"):
        datasets.load("fmnist", tmp_path)
    (tmp_path / "MNIST/raw/t10k-labels-idx1-ubyte.gz").unlink()
    published.load.cache_clear()
    with pytest.raises(FileNotFoundError, match="t10k-labels-idx1-ubyte is missing"):
        datasets.load("mnist")
    monkeypatch.setenv("AMALGAM_DATA", str(tmp_path / "none"))
    with pytest.raises(ValueError, match="AMALGAM_DATA must name a folder, not '.*none'"):
        datasets.load("mnist")


def test_bad_names_are_named() -> None:
    with pytest.raises(ValueError, match="data set must be one of .*, not 'minst'; did you mean"):
        datasets.load("minst")
    with pytest.raises(ValueError, match="data must be 'auto', 'glyphs' or a folder .*'/no/such'"):
        datasets.load("mnist", "/no/such")


def cut(content: bytes) -> bytes:
    return content[:-1]


def lengthened(content: bytes) -> bytes:
    return content + b"\1"


def empty(content: bytes) -> bytes:
    return b""


def foreign(content: bytes) -> bytes:
    return b"<html>404</html>" * (len(content) // 16 + 1)


def flipped(content: bytes) -> bytes:
    return (
        content[: len(content) // 2]
        + bytes([content[len(content) // 2] ^ 255])
        + content[len(content) // 2 + 1 :]
    )


DAMAGES = [cut, lengthened, empty, foreign]


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("name", SMALL)
def test_damaged_files_are_refused(name: str, tmp_path: Path, damage) -> None:
    """By one line that names the file and how to get the right one."""
    folder = WRITE[name](name, tmp_path)
    (path, *_) = sorted(folder.iterdir())
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ValueError, match="as published; get it by: .*curl -fL") as caught:
        datasets.load(name, tmp_path)
    assert str(path) in str(caught.value)
    assert str(tmp_path) in str(caught.value).partition("get it by: ")[2]
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["mnist", "svhn"])
def test_flipped_bits_in_compressed_files_are_seen(name: str, tmp_path: Path) -> None:
    folder = WRITE[name](name, tmp_path)
    (path, *_) = sorted(folder.iterdir())
    path.write_bytes(flipped(path.read_bytes()))
    with pytest.raises(ValueError, match="as published; get it by"):
        datasets.load(name, tmp_path)


def test_sizes_are_compared_before_memory_is_taken(tmp_path: Path) -> None:
    """A header that promises four billion images of that size."""
    folder = write_idx("mnist", tmp_path, compressed=False)
    path = folder / "train-images-idx3-ubyte"
    content = path.read_bytes()
    path.write_bytes(content[:4] + b"\xff\xff\xff\xff" + content[8:])
    with pytest.raises(ValueError, match="begins with 00000803ffffffff0000001c0000001c and not"):
        datasets.load("mnist", tmp_path)


def test_a_bomb_is_not_unpacked(tmp_path: Path) -> None:
    folder = write_idx("mnist", tmp_path)
    path = folder / "train-images-idx3-ubyte.gz"
    content = gzip.decompress(path.read_bytes())
    path.write_bytes(gzip.compress(content + bytes(10**7)))
    with pytest.raises(ValueError, match="goes on after 7,840 bytes"):
        datasets.load("mnist", tmp_path)


def test_sets_in_each_others_places_are_refused(tmp_path: Path) -> None:
    write_cifar("cifar100", tmp_path / "other")
    (tmp_path / "cifar-10-batches-bin").mkdir()
    for number in range(1, 6):
        source = tmp_path / "other/cifar-100-binary/train.bin"
        (tmp_path / f"cifar-10-batches-bin/data_batch_{number}.bin").write_bytes(
            source.read_bytes()
        )
    with pytest.raises(ValueError, match="has 30,740 bytes and not 6,146"):
        datasets.load("cifar10", tmp_path)
    savemat(tmp_path / "train_32x32.mat", {"X": np.zeros((2, 2)), "y": np.zeros(2)})
    shapes = r"holds X of shape \(2, 2\) and type double, not of shape \(32, 32, 3, 10\) and type"
    with pytest.raises(ValueError, match=shapes):
        datasets.load("svhn", tmp_path)


def test_labels_of_svhn_may_be_doubles(tmp_path: Path) -> None:
    write_svhn("svhn", tmp_path, np.float64)
    check("svhn", datasets.load("svhn", tmp_path))


@pytest.mark.parametrize("label", [0, 11, 1.5, np.nan])
def test_other_labels_of_svhn_are_refused(tmp_path: Path, label: float) -> None:
    write_svhn("svhn", tmp_path)
    images, labels = drawn("svhn", 1)
    labels = np.full((len(labels), 1), float(label))
    savemat(tmp_path / "test_32x32.mat", {"X": images.transpose(2, 3, 1, 0), "y": labels})
    with pytest.raises(ValueError, match="holds labels that are not from 1 to 10"):
        datasets.load("svhn", tmp_path)


def test_labels_that_are_no_classes_are_refused(tmp_path: Path) -> None:
    folder = write_cifar("cifar10", tmp_path)
    path = folder / "test_batch.bin"
    path.write_bytes(b"\x0a" + path.read_bytes()[1:])
    with pytest.raises(ValueError, match="holds the label 10"):
        datasets.load("cifar10", tmp_path)


def test_commands_are_quoted_for_a_shell(tmp_path: Path) -> None:
    root = tmp_path / "my data"
    root.mkdir()
    with pytest.raises(FileNotFoundError) as caught:
        datasets.load("kmnist", root)
    words = shlex.split(str(caught.value).partition("get it by: ")[2])
    assert words[words.index("--output-dir") + 1] == str(root / "KMNIST/raw")


def test_no_file_that_is_pickled_is_read(tmp_path: Path) -> None:
    (tmp_path / "cifar-10-batches-py").mkdir()
    (tmp_path / "cifar-10-batches-py/data_batch_1").write_bytes(b"cos\nsystem\n(S'false'\ntR.")
    with pytest.raises(FileNotFoundError, match="CIFAR-10 in its binary version is not in"):
        datasets.load("cifar10", tmp_path)
