"""Converts the authors' released students into ours.

Two sources are read: an ``.npz`` of many students, with keys such as
``"min-max/1/recurrent/0/kernel"``, and a TensorFlow checkpoint as their ``package()`` writes it, a
folder of ``weights.index``, ``weights.data-00000-of-00001`` and ``config.json``.

Their kernels are Keras's, of shape (inputs, 4 hidden) with gates in the order input, forget,
candidate, output; ours are the same gates in the same order, transposed.
"""

from __future__ import annotations

import difflib
import json
import math
import os
import re
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from amalgam.convert.tensor_bundle import TensorBundle
from amalgam.policies.student import Student, StudentConfig
from amalgam.version import __version__

Arrays = Mapping[str, npt.NDArray[Any]]

MOST_BYTES = 2**30
WARMUP_STEPS = 100
WARMUP_LR = 0.05
_WEIGHT = r"recurrent/\d+/(?:kernel|recurrent_kernel|bias)|delta/(?:kernel|bias)"
_IN_NPZ = re.compile(rf"(?:(?P<key>.*)/)?(?P<name>{_WEIGHT}|iter)")
_VARIABLE = "/.ATTRIBUTES/VARIABLE_VALUE"
_IN_CHECKPOINT = re.compile(rf"network/(?P<name>{_WEIGHT}){re.escape(_VARIABLE)}")
_ITERATIONS = tuple(f"optimizer/{name}{_VARIABLE}" for name in ("iter", "_iterations"))
_FIXED = {
    "activation": "tanh",
    "recurrent_activation": "sigmoid",
    "use_bias": True,
    "warmup_lstm_update": False,
}
_RENAMED = {"alpha": "alpha", "beta_1": "beta1", "beta_2": "beta2", "epsilon": "eps"}
_UNREADABLE = (
    EOFError,
    KeyError,
    MemoryError,
    NotImplementedError,
    OSError,
    OverflowError,
    RuntimeError,
    SyntaxError,
    TypeError,
    ValueError,
    zipfile.BadZipFile,
    zlib.error,
)


def convert(
    source: str | os.PathLike[str],
    dest: str | os.PathLike[str],
    *,
    key: str | None = None,
    warmup_steps: int | None = None,
    warmup_lr: float | None = None,
) -> Student:
    """Convert one of the authors' students, and save it.

    Args:
        source: An ``.npz`` of students; or a packaged TensorFlow checkpoint: its folder, its
            ``weights.index``, or the path without ``.index``. A ``config.json`` beside the
            checkpoint gives the student's constants; without one they are the paper's.
        dest: The safetensors file to write; it appears whole, or not at all.
        key: Which student of an ``.npz``, such as ``"min-max/1"``; may be absent where there is
            only one.
        warmup_steps: SGD steps before the student takes over. Where absent, 100, or 0 where
            ``config.json`` says that there were none: its own number counts windows of 100 steps,
            not steps, so it can't be taken as it stands.
        warmup_lr: Their learning rate; where absent, that of ``config.json``, else 0.05.

    Returns:
        The student, in float32.

    Raises:
        FileNotFoundError: There is no such source.
        ValueError: The source is damaged, of an unsupported kind, or does not hold the student
            asked for; ``dest`` is a part of it; or its weights are not those of an RNNProp student.
    """
    path = Path(source)
    prefix = _checkpoint_prefix(path)
    _refuse_source(path, prefix, Path(dest))
    if prefix is not None:
        if key is not None:
            raise ValueError(
                f"key picks a student of an .npz; the checkpoint {str(path)!r} holds only one"
            )
        arrays, iterations = read_checkpoint(prefix)
        packaged = _packaged_config(prefix.parent / "config.json")
        source_format = "tensorflow-checkpoint"
        name = f"{prefix.resolve().parent.name}/{prefix.name}.index"
    else:
        arrays, iterations, key = read_npz(path, key)
        packaged = {}
        source_format = "npz"
        name = path.name
    constants = dict(packaged)
    layers = constants.pop("layers", None)
    if warmup_steps is not None or "warmup_steps" not in constants:
        constants["warmup_steps"] = WARMUP_STEPS if warmup_steps is None else warmup_steps
    if warmup_lr is not None or "warmup_lr" not in constants:
        constants["warmup_lr"] = WARMUP_LR if warmup_lr is None else warmup_lr
    provenance: dict[str, Any] = {
        "converted_from": name,
        "key": key,
        "source_format": source_format,
        "amalgam_version": __version__,
    }
    if iterations is not None:
        provenance["iterations"] = iterations
    student = student_from_keras(arrays, constants, provenance)
    found = [student.config.hidden] * student.config.layers
    if layers is not None and layers != found:
        raise ValueError(
            f"policy.layers in the config.json of {str(path)!r} is {layers}, but the weights "
            f"have {found}"
        )
    student.save(dest)
    return student


def student_from_keras(
    arrays: Arrays,
    constants: Mapping[str, Any] | None = None,
    provenance: Mapping[str, Any] | None = None,
) -> Student:
    """A student from an RNNProp policy's Keras weights.

    Args:
        arrays: ``recurrent/<layer>/kernel`` (inputs, 4 hidden), ``.../recurrent_kernel`` (hidden,
            4 hidden), ``.../bias`` (4 hidden,) for layers from 0 on, ``delta/kernel`` (hidden, 1)
            and ``delta/bias`` (1,).
        constants: Fields of :class:`StudentConfig` other than layers and hidden.
        provenance: Where the weights come from; kept with the student.

    Returns:
        The student, in float32.

    Raises:
        ValueError: A tensor is missing, superfluous, misshapen, not floating-point or not finite,
            which the message names; or a constant can't be.
    """
    layers = len({name.split("/")[1] for name in arrays if name.startswith("recurrent/")})
    recurrent = _array(arrays, "recurrent/0/recurrent_kernel")
    hidden = recurrent.shape[0] if recurrent.ndim else 0
    shapes: dict[str, tuple[int, ...]] = {}
    for layer in range(layers):
        inputs = hidden if layer else 2
        shapes[f"recurrent/{layer}/kernel"] = (inputs, 4 * hidden)
        shapes[f"recurrent/{layer}/recurrent_kernel"] = (hidden, 4 * hidden)
        shapes[f"recurrent/{layer}/bias"] = (4 * hidden,)
    shapes |= {"delta/kernel": (hidden, 1), "delta/bias": (1,)}
    ours = []
    for name, shape in shapes.items():
        array = _array(arrays, name)
        if array.shape != shape or not hidden:
            raise ValueError(f"{name} must have shape {shape}, not {array.shape}")
        if array.dtype.kind != "f":
            raise ValueError(f"{name} must be floating-point, not {array.dtype}")
        tensor = torch.from_numpy(np.array(array, dtype=np.float64)).float()
        if not tensor.isfinite().all():
            raise ValueError(f"{name} holds values that are not finite in float32")
        ours.append(tensor.T if tensor.dim() == 2 else tensor)
    for name in arrays:
        if name not in shapes:
            raise ValueError(f"{name} has no place in a student of {layers} layers")
    config = StudentConfig(layers=layers, hidden=hidden, **(constants or {}))
    student = Student(config, provenance=dict(provenance or {}))
    with torch.no_grad():
        for weight, tensor in zip(student.weights(), ours, strict=True):
            weight.copy_(tensor)
    return student


def read_npz(
    path: str | os.PathLike[str], key: str | None
) -> tuple[dict[str, npt.NDArray[Any]], int | None, str]:
    """One student's arrays from an ``.npz``.

    Args:
        path: The file.
        key: Which student; may be ``None`` where there is only one.

    Returns:
        The arrays as :func:`student_from_keras` takes them, the meta-training iterations where
        known, and the key.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It is not a whole ``.npz``, or does not hold that student.
    """
    path = Path(path)
    with _open_npz(path) as file:
        keys = _keys(file.files)
        if not keys:
            raise ValueError(
                f"{str(path)!r} holds no student; its arrays should have names such as "
                f"'min-max/1/recurrent/0/kernel'"
            )
        if key is None:
            if len(keys) > 1:
                raise ValueError(
                    f"{str(path)!r} holds {len(keys)} students; key must be one of {list(keys)}"
                )
            key = keys[0]
        if key not in keys:
            near = difflib.get_close_matches(key, keys, 4, 0.4)
            hint = f"did you mean one of {near}? It" if near else "it"
            raise ValueError(f"{str(path)!r} has no student {key!r}; {hint} has {list(keys)}")
        for info in file.zip.infolist():
            if info.file_size > MOST_BYTES:
                raise ValueError(
                    f"{str(path)!r} holds {info.file_size} bytes in {info.filename!r}; an array of "
                    f"a student has {MOST_BYTES} at most"
                )
        try:
            arrays = {
                match["name"]: file[full]
                for full in file.files
                if (match := _IN_NPZ.fullmatch(full)) and (match["key"] or "") == key
            }
        except _UNREADABLE as error:
            raise ValueError(f"{str(path)!r} is damaged: {error}") from error
    iterations = arrays.pop("iter", None)
    where = f"iter of {key!r} in {str(path)!r}"
    return arrays, None if iterations is None else _count(iterations, where), key


def read_checkpoint(
    prefix: str | os.PathLike[str],
) -> tuple[dict[str, npt.NDArray[Any]], int | None]:
    """A policy's arrays from a ``tf.train.Checkpoint(network=policy, optimizer=...)``.

    Args:
        prefix: The checkpoint's path without ``.index``.

    Returns:
        The arrays as :func:`student_from_keras` takes them, and the meta-training iterations where
        known.

    Raises:
        FileNotFoundError: A file is missing.
        ValueError: The checkpoint is damaged, of an unsupported kind, or holds no such policy.
    """
    bundle = TensorBundle(prefix)
    arrays: dict[str, npt.NDArray[Any]] = {}
    for full in bundle.names():
        if match := _IN_CHECKPOINT.fullmatch(full):
            arrays[match["name"]] = bundle.read(full)
    if not arrays:
        raise ValueError(
            f"{os.fspath(prefix)!r} holds no RNNProp policy: nothing in it is named as "
            f"'network/recurrent/0/kernel{_VARIABLE}'; it has {list(bundle.names()[:8])}"
        )
    for full in _ITERATIONS:
        if full in bundle.names():
            return arrays, _count(bundle.read(full), full)
    return arrays, None


def _checkpoint_prefix(path: Path) -> Path | None:
    """The checkpoint that a path means; None where it is a file, to be read as an ``.npz``."""
    if path.is_dir():
        if not (path / "weights.index").is_file():
            others = sorted(str(other.with_suffix("")) for other in path.glob("*.index"))
            hint = f"; give one of its checkpoints: {others}" if others else ""
            raise ValueError(f"the folder {str(path)!r} has no 'weights.index'{hint}")
        return path / "weights"
    if path.suffix == ".index":
        path = path.with_suffix("")
    elif path.is_file():
        return None
    if not Path(f"{path}.index").is_file():
        raise FileNotFoundError(
            f"there is no .npz, no folder and no checkpoint {str(path)!r}; a checkpoint is named "
            f"without '.index'"
        )
    return path


def _refuse_source(source: Path, prefix: Path | None, dest: Path) -> None:
    """Raise ValueError where the file to write is one of those that are read."""
    read = [source]
    if prefix is not None:
        read = [Path(f"{prefix}.index"), Path(f"{prefix}.data-00000-of-00001")]
        read.append(prefix.parent / "config.json")
    if dest.exists() and any(path.exists() and dest.samefile(path) for path in read):
        raise ValueError(f"dest must be another file than what is converted, not {str(dest)!r}")


def _packaged_config(path: Path) -> dict[str, Any]:
    """The fields of StudentConfig that a packaged ``config.json`` sets, and ``layers``, a list."""
    if not path.is_file():
        return {}
    where = str(path)
    try:
        config = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where!r} is not JSON: {error}") from error
    policy = _section(config, "policy", where)
    settings = _section(config, "settings", where)
    constructor = config.get("policy_constructor", "RNNPropOptimizer")
    if constructor != "RNNPropOptimizer":
        raise ValueError(
            f"policy_constructor in {where!r} must be 'RNNPropOptimizer', the only policy that "
            f"converts, not {constructor!r}"
        )
    for name, value in _FIXED.items():
        if policy.get(name, value) != value:
            raise ValueError(
                f"policy.{name} in {where!r} must be {value!r}, the only one that converts, "
                f"not {policy[name]!r}"
            )
    found: dict[str, Any] = {}
    for theirs, ours in _RENAMED.items():
        if theirs in policy:
            found[ours] = _real(policy[theirs], f"policy.{theirs}", where)
    if "layers" in policy:
        layers = policy["layers"]
        if not isinstance(layers, list) or not all(type(size) is int for size in layers):
            raise ValueError(f"policy.layers in {where!r} must be a list of sizes, not {layers!r}")
        if len(set(layers)) != 1:
            raise ValueError(
                f"policy.layers in {where!r} must be one or more of one size, not {layers!r}"
            )
        found["layers"] = layers
    if "warmup" in settings:
        windows = _real(settings["warmup"], "settings.warmup", where)
        if windows < 0 or windows != int(windows):
            raise ValueError(f"settings.warmup in {where!r} must be 0 or more windows")
        found["warmup_steps"] = WARMUP_STEPS if windows else 0
    if "warmup_rate" in settings:
        found["warmup_lr"] = _real(settings["warmup_rate"], "settings.warmup_rate", where)
    try:
        StudentConfig(**{name: value for name, value in found.items() if name != "layers"})
    except ValueError as error:
        raise ValueError(f"{where!r} says what can't be: {error}") from error
    return found


def _section(config: Any, name: str, where: str) -> dict[str, Any]:
    section = config.get(name, {}) if isinstance(config, dict) else None
    if not isinstance(section, dict):
        raise ValueError(f"{where!r} must be an object with an object {name!r} in it")
    return section


def _real(value: Any, name: str, where: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError(f"{name} in {where!r} must be a finite number, not {value!r}")
    return float(value)


def _open_npz(path: Path) -> Any:
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {str(path)!r}")
    try:
        file = np.load(path, allow_pickle=False)
    except _UNREADABLE as error:
        raise ValueError(f"{str(path)!r} is not a whole .npz file: {error}") from error
    if not isinstance(file, np.lib.npyio.NpzFile):
        raise ValueError(f"{str(path)!r} is a single array, not an .npz of students")
    return file


def _keys(names: list[str]) -> tuple[str, ...]:
    matches = (_IN_NPZ.fullmatch(name) for name in names)
    return tuple(sorted({match["key"] or "" for match in matches if match}))


def _array(arrays: Arrays, name: str) -> npt.NDArray[Any]:
    if name not in arrays:
        raise ValueError(f"{name} is missing; there are {sorted(arrays)}")
    return arrays[name]


def _count(array: npt.NDArray[Any], where: str) -> int:
    if array.shape != () or array.dtype.kind not in "iu" or array < 0:
        raise ValueError(f"{where} must be one integer of 0 or more, not {array!r}")
    return int(array)
