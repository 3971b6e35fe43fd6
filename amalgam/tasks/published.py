"""Published image data sets, read from a folder in the formats in which they are published.

No file is trusted: what a header says is compared with what the data set is before memory is taken
for it, and nothing is unpickled. Folders are laid out as torchvision leaves them, those of CIFAR's
binary version, which it does not read, as the archives are.
"""

from __future__ import annotations

import functools
import gzip
import math
import shlex
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from amalgam.tasks.task import Batch

_IDX_PARTS = ("train", "t10k")
_IDX_MAGIC = {"images-idx3": b"\x00\x00\x08\x03", "labels-idx1": b"\x00\x00\x08\x01"}

_Part = tuple[NDArray[np.uint8], NDArray[np.uint8]]


@dataclass(frozen=True)
class Published:
    """A published data set.

    Attributes:
        title: Its name in messages.
        shape: Of an image: channels, height and width.
        classes: The number of its classes; labels are from 0 on.
        counts: The numbers of its training and its test images.
        folders: Where its files may lie, relative to the folder of all data sets; the first is
            torchvision's.
        files: Its files there; of one in IDX, the name without ``.gz``.
        read: Reads one part of it, 0 for training and 1 for test, from one of the folders.
        command: A shell command that gets it; ``{folder}`` stands for the first of the folders,
            ``{root}`` for the folder of all data sets.
    """

    title: str
    shape: tuple[int, int, int]
    classes: int
    counts: tuple[int, int]
    folders: tuple[str, ...]
    files: tuple[str, ...]
    read: Callable[[Published, Path, int], _Part]
    command: str

    def find(self, root: Path) -> Path | None:
        """The folder that holds at least one of its files, if any does."""
        for name in self.folders:
            if any(_existing(root / name / file) is not None for file in self.files):
                return root / name
        return None

    def load(self, root: Path) -> tuple[Batch, Batch]:
        """Read it.

        Args:
            root: The folder of all data sets.

        Returns:
            Training and test data: images of type uint8, shape (samples, channels, height, width),
            and labels of type int64, shape (samples,).

        Raises:
            FileNotFoundError: A file is missing; the message has the command that gets it.
            ValueError: A file is cut, damaged, or not what the data set's is; likewise.
        """
        folder = self.find(root)
        if folder is None:
            places = " or ".join(str(root / name) for name in self.folders)
            raise FileNotFoundError(f"{self.title} is not in {places}; {self.how(root)}")
        try:
            train, test = (self._part(folder, index) for index in (0, 1))
        except _Unfit as error:
            kind = FileNotFoundError if error.missing else ValueError
            raise kind(f"{error}; {self.how(root)}") from error.__cause__
        return train, test

    def how(self, root: Path) -> str:
        """How to get it, as the end of a message."""
        root_, folder = (shlex.quote(str(path)) for path in (root, root / self.folders[0]))
        return "get it by: " + self.command.format(root=root_, folder=folder)

    def _part(self, folder: Path, index: int) -> Batch:
        images, labels = self.read(self, folder, index)
        if labels.max() >= self.classes:
            raise _Unfit(folder, f"holds the label {labels.max()}", self)
        return _tensor(images), _tensor(labels).long()


class _Unfit(Exception):
    """A file is not what a data set's is.

    Args:
        path: The file, or a folder.
        what: What is the matter with it, as a predicate.
        of: The data set.
        missing: Whether it does not exist.
    """

    def __init__(self, path: Path, what: str, of: Published, missing: bool = False) -> None:
        super().__init__(f"{path} {what}, so it is not {of.title} as published")
        self.missing = missing


def _tensor(array: NDArray[np.uint8]) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(array))


def _existing(path: Path) -> Path | None:
    """A file, or the compressed one in its place."""
    for found in (path, path.with_name(f"{path.name}.gz")):
        if found.is_file():
            return found
    return None


@contextmanager
def _reading(path: Path, of: Published) -> Iterator[None]:
    """Inside, whatever a reader raises about a file's content says which file it is."""
    try:
        yield
    except _Unfit:
        raise
    except (OSError, EOFError, zlib.error) as error:
        raise _Unfit(path, f"can't be read ({error})", of) from error


def _bytes(path: Path, of: Published, header: bytes, count: int) -> NDArray[np.uint8]:
    """A file's bytes after its header, which must be as many as ``count``."""
    found = _existing(path)
    if found is None:
        raise _Unfit(path, "is missing", of, missing=True)
    opened: Any = gzip.open if found.suffix == ".gz" else open
    with _reading(found, of), opened(found, "rb") as file:
        begin = file.read(len(header))
        if begin != header:
            raise _Unfit(found, f"begins with {begin.hex()} and not with {header.hex()}", of)
        if found.suffix != ".gz" and found.stat().st_size != len(header) + count:
            size = found.stat().st_size
            raise _Unfit(found, f"has {size:,} bytes and not {len(header) + count:,}", of)
        content = file.read(count)
        if len(content) < count:
            raise _Unfit(found, f"ends after {len(content):,} of {count:,} bytes", of)
        if file.read(1):
            raise _Unfit(found, f"goes on after {count:,} bytes", of)
    return np.frombuffer(bytearray(content), np.uint8)


def _idx(of: Published, folder: Path, part: int) -> _Part:
    """One part of a data set in IDX: images in one file, labels in another."""
    count = of.counts[part]
    arrays = []
    for kind, shape in (("images-idx3", (count, *of.shape[1:])), ("labels-idx1", (count,))):
        sizes = b"".join(size.to_bytes(4, "big") for size in shape)
        path = folder / f"{_IDX_PARTS[part]}-{kind}-ubyte"
        content = _bytes(path, of, _IDX_MAGIC[kind] + sizes, math.prod(shape))
        arrays.append(content.reshape(shape))
    return arrays[0][:, None], arrays[1]


def _cifar(of: Published, folder: Path, part: int) -> _Part:
    """One part of CIFAR's binary version: per image one or two labels, then its channels."""
    files = of.files[:-1] if part == 0 else of.files[-1:]
    labels = 2 if of.classes == 100 else 1  # a coarse label comes before the fine one
    record = labels + math.prod(of.shape)
    each = of.counts[part] // len(files)
    content = [_bytes(folder / name, of, b"", each * record) for name in files]
    records = np.concatenate(content).reshape(-1, record)
    return records[:, labels:].reshape(-1, *of.shape), records[:, labels - 1]


def _svhn(of: Published, folder: Path, part: int) -> _Part:
    """One part of SVHN's cropped digits, a MATLAB file."""
    from scipy.io import loadmat, whosmat

    path = folder / of.files[part]
    if not path.is_file():
        raise _Unfit(path, "is missing", of, missing=True)
    channels, height, width = of.shape
    count = of.counts[part]
    # MATLAB may say double of labels that are kept as bytes.
    expected = {
        "X": ((height, width, channels, count), ("uint8",)),
        "y": ((count, 1), ("uint8", "double")),
    }
    try:
        found = {name: (shape, kind) for name, shape, kind in whosmat(path)}
        for name, (shape, kinds) in expected.items():
            has_shape, kind = found.get(name, ((), "nothing"))
            if has_shape != shape or kind not in kinds:
                has = f"{name} of shape {has_shape} and type {kind}"
                raise _Unfit(path, f"holds {has}, not of shape {shape} and type {kinds[0]}", of)
        content = loadmat(path, variable_names=list(expected))
        images, labels = content["X"], content["y"][:, 0]
    except _Unfit:
        raise
    except Exception as error:  # SciPy's reader has no error of its own for a damaged file.
        raise _Unfit(path, f"can't be read ({type(error).__name__}: {error})", of) from error
    if not np.isin(labels, range(1, of.classes + 1)).all():
        raise _Unfit(path, f"holds labels that are not from 1 to {of.classes}", of)
    # The digit 0 has the label 10.
    return images.transpose(3, 2, 0, 1), labels.astype(np.uint8) % 10


_GET = "curl -fL --create-dirs --output-dir {folder} --remote-name-all "
_UNPACK = " | tar xz -C {root}"
_IDX_FILES = tuple(f"{part}-{kind}-ubyte" for part in _IDX_PARTS for kind in _IDX_MAGIC)
_IDX_URL = "/{{train,t10k}}-{{images-idx3,labels-idx1}}-ubyte.gz'"


def _of_idx(title: str, name: str, url: str) -> Published:
    folders = (f"{name}/raw", name)
    counts = (60_000, 10_000)
    command = f"{_GET}'{url}{_IDX_URL}"
    return Published(title, (1, 28, 28), 10, counts, folders, _IDX_FILES, _idx, command)


def _of_cifar(classes: int, folder: str, files: tuple[str, ...]) -> Published:
    url = f"https://www.cs.toronto.edu/~kriz/cifar-{classes}-binary.tar.gz"
    return Published(
        f"CIFAR-{classes} in its binary version",
        (3, 32, 32),
        classes,
        (50_000, 10_000),
        (folder,),
        files,
        _cifar,
        f"mkdir -p {{root}} && curl -fL {url}{_UNPACK}",
    )


PUBLISHED = {
    "mnist": _of_idx("MNIST", "MNIST", "https://ossci-datasets.s3.amazonaws.com/mnist"),
    "fmnist": _of_idx(
        "Fashion-MNIST",
        "FashionMNIST",
        "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com",
    ),
    "kmnist": _of_idx("KMNIST", "KMNIST", "http://codh.rois.ac.jp/kmnist/dataset/kmnist"),
    "svhn": Published(
        "SVHN",
        (3, 32, 32),
        10,
        (73_257, 26_032),
        (".", "SVHN"),
        ("train_32x32.mat", "test_32x32.mat"),
        _svhn,
        _GET + "'http://ufldl.stanford.edu/housenumbers/{{train,test}}_32x32.mat'",
    ),
    "cifar10": _of_cifar(
        10,
        "cifar-10-batches-bin",
        (*(f"data_batch_{number}.bin" for number in range(1, 6)), "test_batch.bin"),
    ),
    "cifar100": _of_cifar(100, "cifar-100-binary", ("train.bin", "test.bin")),
}
"""The data sets of the paper's tasks, by the names that tasks give them."""


# Tasks of one data set share it; another takes its place, for hundreds of megabytes.
@functools.lru_cache(maxsize=1)
def load(name: str, root: Path) -> tuple[Batch, Batch]:
    """A published data set, the last one kept; see :meth:`Published.load`.

    Args:
        name: One of :data:`PUBLISHED`.
        root: The folder of all data sets.
    """
    return PUBLISHED[name].load(root)
