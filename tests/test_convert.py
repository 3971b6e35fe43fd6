"""The authors' students become ours: from an .npz, and from a TensorFlow checkpoint.

No TensorFlow runs here, so the checkpoints are written by the small writer below, after the
format's description (LevelDB's table_format.md, TensorFlow's tensor_bundle.proto). Its CRC is
computed bit by bit: another way than the reader's, and checked against a published value.
"""

import io
import json
import math
import struct
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from amalgam import files
from amalgam.convert import convert, read_npz, student_from_keras
from amalgam.convert.tensor_bundle import TensorBundle, masked_crc32c
from amalgam.policies import Student
from amalgam.version import __version__

GOLDEN = Path(__file__).parent / "golden"
VARIABLE = "/.ATTRIBUTES/VARIABLE_VALUE"
DTYPES = {"float32": 1, "float64": 2, "int32": 3, "int64": 9}
FUZZ = settings(
    max_examples=250,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


def varint(value: int) -> bytes:
    value &= (1 << 64) - 1
    out = b""
    while value >= 0x80:
        out += bytes([value & 0x7F | 0x80])
        value >>= 7
    return out + bytes([value])


def number(field: int, value: int) -> bytes:
    return varint(field << 3) + varint(value) if value else b""


def message(field: int, content: bytes) -> bytes:
    return varint(field << 3 | 2) + varint(len(content)) + content


def crc32c(data: bytes) -> int:
    crc = 0xFFFFFFFF
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = (crc >> 1) ^ (0x82F63B78 * (crc & 1))
    return crc ^ 0xFFFFFFFF


def mask(crc: int) -> int:
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF


def block(pairs: list[tuple[bytes, bytes]], compression: int = 0, interval: int = 4) -> bytes:
    out, restarts, last = b"", [], b""
    for index, (key, value) in enumerate(pairs):
        shared = 0
        if index % interval:
            while shared < min(len(key), len(last)) and key[shared] == last[shared]:
                shared += 1
        else:
            restarts.append(len(out))
        out += varint(shared) + varint(len(key) - shared) + varint(len(value))
        out += key[shared:] + value
        last = key
    restarts = restarts or [0]
    out += struct.pack(f"<{len(restarts)}I", *restarts) + struct.pack("<I", len(restarts))
    out += bytes([compression])
    return out + struct.pack("<I", masked_crc32c(out))


def table(pairs: Mapping[bytes, bytes], per_block: int = 5, compression: int = 0) -> bytes:
    ordered = sorted(pairs.items())
    out, index = b"", []
    for start in range(0, len(ordered), per_block):
        part = ordered[start : start + per_block]
        written = block(part, compression)
        index.append((part[-1][0], varint(len(out)) + varint(len(written) - 5)))
        out += written
    handles = b""
    for written in (block([]), block(index, interval=1)):
        handles += varint(len(out)) + varint(len(written) - 5)
        out += written
    return out + handles.ljust(40, b"\0") + struct.pack("<Q", 0xDB4775248B80FB57)


def shape_proto(shape: tuple[int, ...]) -> bytes:
    return b"".join(message(2, number(1, size)) for size in shape)


def entry(array: np.ndarray, offset: int, /, **change: Any) -> bytes:
    data = array.tobytes()
    fields = {
        "dtype": DTYPES.get(array.dtype.name, 7),
        "shape": shape_proto(array.shape),
        "shard": 0,
        "offset": offset,
        "size": len(data),
        "crc": masked_crc32c(data),
        "extra": b"",
    } | change
    return (
        number(1, fields["dtype"])
        + message(2, fields["shape"])
        + number(3, fields["shard"])
        + number(4, fields["offset"])
        + number(5, fields["size"])
        + varint(6 << 3 | 5)
        + struct.pack("<I", fields["crc"])
        + fields["extra"]
    )


def header(shards: int = 1, endianness: int = 0, oldest_reader: int = 0) -> bytes:
    version = number(1, 1) + number(2, oldest_reader)
    return number(1, shards) + number(2, endianness) + message(3, version)


def write_bundle(
    prefix: Path,
    tensors: Mapping[str, np.ndarray],
    *,
    head: bytes | None = None,
    change: Mapping[str, Mapping[str, Any]] | None = None,
    **options: Any,
) -> None:
    pairs, data = {b"": header() if head is None else head}, b""
    for name, array in sorted(tensors.items()):
        pairs[name.encode()] = entry(array, len(data), **(change or {}).get(name, {}))
        data += array.tobytes()
    prefix.parent.mkdir(parents=True, exist_ok=True)
    Path(f"{prefix}.index").write_bytes(table(pairs, **options))
    Path(f"{prefix}.data-00000-of-00001").write_bytes(data)


def keras_weights(layers: int = 2, hidden: int = 3, seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    shapes: dict[str, tuple[int, ...]] = {"delta/kernel": (hidden, 1), "delta/bias": (1,)}
    for layer in range(layers):
        shapes[f"recurrent/{layer}/kernel"] = (hidden if layer else 2, 4 * hidden)
        shapes[f"recurrent/{layer}/recurrent_kernel"] = (hidden, 4 * hidden)
        shapes[f"recurrent/{layer}/bias"] = (4 * hidden,)
    return {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}


def checkpoint_tensors(keras: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    tensors = {f"network/{name}{VARIABLE}": array for name, array in keras.items()}
    for name, array in keras.items():
        tensors[f"network/{name}/.OPTIMIZER_SLOT/optimizer/m{VARIABLE}"] = array + 1
    tensors[f"optimizer/iter{VARIABLE}"] = np.array(620, np.int64)
    tensors["_CHECKPOINTABLE_OBJECT_GRAPH"] = np.frombuffer(b"graph", "S5")
    return tensors


def package(folder: Path, config: Any = None, **keras: Any) -> dict[str, np.ndarray]:
    arrays = keras_weights(**keras)
    write_bundle(folder / "weights", checkpoint_tensors(arrays))
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))
    return arrays


def packaged_config(**policy: Any) -> dict[str, Any]:
    return {
        "policy_constructor": "RNNPropOptimizer",
        "policy": {
            "layers": [3, 3],
            "beta_1": 0.8,
            "beta_2": 0.99,
            "alpha": 0.2,
            "epsilon": 1e-8,
            "activation": "tanh",
            "recurrent_activation": "sigmoid",
            "use_bias": True,
            "warmup_lstm_update": False,
            "kernel_initializer": "glorot_uniform",
        }
        | policy,
        "settings": {"warmup": 1, "warmup_rate": 0.02},
    }


def assert_holds(student: Student, keras: Mapping[str, np.ndarray]) -> None:
    for layer, cell in enumerate(student.cells):
        for theirs, ours in (
            ("kernel", cell.weight_ih.T),
            ("recurrent_kernel", cell.weight_hh.T),
            ("bias", cell.bias),
        ):
            assert np.array_equal(ours.detach().numpy(), keras[f"recurrent/{layer}/{theirs}"])
    assert np.array_equal(student.head.weight.detach().numpy().T, keras["delta/kernel"])
    assert np.array_equal(student.head.bias.detach().numpy(), keras["delta/bias"])


def write_npz(path: Path, students: Mapping[str, Mapping[str, np.ndarray]]) -> None:
    arrays = {f"{key}/{n}" if key else n: a for key, s in students.items() for n, a in s.items()}
    with path.open("wb") as file:
        np.savez(file, **arrays)


# --- The .npz ---


@pytest.mark.parametrize(("layers", "hidden"), [(1, 4), (2, 3), (3, 1)])
def test_npz_student_arrives_whole(tmp_path: Path, layers: int, hidden: int) -> None:
    keras = keras_weights(layers, hidden)
    other = keras_weights(layers, hidden, seed=1) | {"iter": np.array(10)}
    students = {"min-max/1": keras | {"iter": np.array(620)}, "min-max/2": other}
    write_npz(tmp_path / "all.npz", students)
    dest = tmp_path / "new" / "student.safetensors"
    converted = convert(tmp_path / "all.npz", dest, key="min-max/1")
    loaded = Student.load(dest)
    for student in (converted, loaded):
        assert_holds(student, keras)
        assert (student.config.layers, student.config.hidden) == (layers, hidden)
        assert (student.config.warmup_steps, student.config.warmup_lr) == (100, 0.05)
        about = dict(student.provenance)
        assert about.pop("amalgam_version") == __version__
        assert about == {
            "converted_from": "all.npz",
            "key": "min-max/1",
            "source_format": "npz",
            "iterations": 620,
        }


@pytest.mark.parametrize("key", ["mean/7", ""])
def test_npz_of_one_student_needs_no_key(tmp_path: Path, key: str) -> None:
    write_npz(tmp_path / "one.npz", {key: keras_weights()})
    student = convert(tmp_path / "one.npz", tmp_path / "s", warmup_steps=7, warmup_lr=0.25)
    assert student.provenance["key"] == key
    assert "iterations" not in student.provenance
    assert (student.config.warmup_steps, student.config.warmup_lr) == (7, 0.25)
    assert read_npz(tmp_path / "one.npz", None)[2] == key


def test_key_must_choose_among_several(tmp_path: Path) -> None:
    source, dest = tmp_path / "all.npz", tmp_path / "dest"
    write_npz(source, {f"min-max/{i}": keras_weights() for i in (1, 2)} | {"mean/1": {}})
    with pytest.raises(ValueError, match=r"holds 2 students; key must be .*min-max/1.*min-max/2"):
        convert(source, dest)
    with pytest.raises(ValueError, match=r"no student 'min-mx/1'; did you mean .*'min-max/1'"):
        convert(source, dest, key="min-mx/1")
    with pytest.raises(ValueError, match=r"no student 'zzz'; it has \['min-max/1', 'min-max/2'\]"):
        convert(source, dest, key="zzz")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["all.npz"]


def broken_arrays() -> dict[str, tuple[dict[str, np.ndarray], str]]:
    good = keras_weights()
    f32 = np.float32
    nan = good["recurrent/1/bias"].copy()
    nan[3] = np.nan
    return {
        "missing": (
            {k: v for k, v in good.items() if k != "recurrent/1/bias"},
            "recurrent/1/bias is missing",
        ),
        "gap": (
            {k.replace("recurrent/1", "recurrent/2"): v for k, v in good.items()},
            "recurrent/1/kernel is missing",
        ),
        "no head": (
            {k: v for k, v in good.items() if k != "delta/kernel"},
            "delta/kernel is missing",
        ),
        "features": (
            good | {"recurrent/0/kernel": np.zeros((3, 12), f32)},
            r"recurrent/0/kernel must have shape \(2, 12\), not \(3, 12\)",
        ),
        "transposed": (
            good | {"recurrent/1/kernel": good["recurrent/1/kernel"].T},
            r"recurrent/1/kernel must have shape \(3, 12\), not \(12, 3\)",
        ),
        "scalar": (
            good | {"recurrent/0/recurrent_kernel": np.float32(1)[()].reshape(())},
            "recurrent/0/",
        ),
        "empty": (
            good | {"recurrent/0/recurrent_kernel": np.zeros((0, 0), f32)},
            "recurrent/0/",
        ),
        "bias": (
            good | {"recurrent/0/bias": np.zeros(24, f32)},
            r"recurrent/0/bias must have shape \(12,\), not \(24,\)",
        ),
        "head": (
            good | {"delta/kernel": np.zeros((3, 2), f32)},
            r"delta/kernel must have shape \(3, 1\), not \(3, 2\)",
        ),
        "integers": (
            good | {"delta/bias": np.zeros(1, np.int64)},
            "delta/bias must be floating-point, not int64",
        ),
        "nan": (good | {"recurrent/1/bias": nan}, "recurrent/1/bias holds values"),
        "overflow": (good | {"delta/bias": np.array([1e39])}, "delta/bias holds values"),
        "iterations": (good | {"iter": np.array([1, 2])}, "iter of 'm' .* one integer"),
        "negative": (good | {"iter": np.array(-1)}, "iter of 'm' .* one integer"),
    }


@pytest.mark.parametrize("fault", broken_arrays())
def test_broken_students_are_refused_and_named(tmp_path: Path, fault: str) -> None:
    arrays, why = broken_arrays()[fault]
    write_npz(tmp_path / "b.npz", {"m": arrays})
    with pytest.raises(ValueError, match=why):
        convert(tmp_path / "b.npz", tmp_path / "dest")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["b.npz"]


def test_superfluous_tensors_are_refused() -> None:
    with pytest.raises(ValueError, match="delta/scale has no place in a student of 2 layers"):
        student_from_keras(keras_weights() | {"delta/scale": np.zeros(1, np.float32)})


def test_a_failure_leaves_the_old_dest(tmp_path: Path) -> None:
    source, dest = tmp_path / "a.npz", tmp_path / "dest"
    write_npz(source, {"m": keras_weights()})
    convert(source, dest)
    before = dest.read_bytes()
    write_npz(source, {"m": broken_arrays()["nan"][0]})
    with pytest.raises(ValueError, match="not finite"):
        convert(source, dest)
    assert dest.read_bytes() == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.npz", "dest"]


def test_failing_write_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_npz(tmp_path / "a.npz", {"m": keras_weights()})

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files.os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        convert(tmp_path / "a.npz", tmp_path / "dest")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.npz"]


def test_files_that_are_no_npz(tmp_path: Path) -> None:
    dest = tmp_path / "dest"
    with pytest.raises(FileNotFoundError, match="nowhere"):
        convert(tmp_path / "nowhere.npz", dest)
    with pytest.raises(FileNotFoundError, match="nowhere"):
        read_npz(tmp_path / "nowhere.npz", None)
    for name, content in {"empty": b"", "text": b"hello", "pickle": b"\x80\x04N."}.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=f"{name}.*is not a whole .npz"):
            convert(tmp_path / name, dest)
    np.save(tmp_path / "single.npy", np.zeros(3))
    with pytest.raises(ValueError, match="a single array"):
        convert(tmp_path / "single.npy", dest)
    np.savez(tmp_path / "other.npz", a=np.zeros(3))
    with pytest.raises(ValueError, match="holds no student"):
        convert(tmp_path / "other.npz", dest)
    np.savez(tmp_path / "pickled.npz", **{"m/delta/bias": np.array([{}], object)})
    with pytest.raises(ValueError, match="is damaged: Object arrays cannot be loaded"):
        convert(tmp_path / "pickled.npz", dest)
    assert not dest.exists()


def small_npz() -> bytes:
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **{f"m/{k}": v for k, v in keras_weights(1, 1).items()})
    return buffer.getvalue()


SMALL_NPZ = small_npz()


@FUZZ
@given(
    keep=st.integers(0, len(SMALL_NPZ)),
    flips=st.lists(st.tuples(st.integers(0, len(SMALL_NPZ) - 1), st.integers(1, 255)), max_size=4),
)
@example(keep=len(SMALL_NPZ), flips=[])
def test_damaged_npz_is_a_value_error(
    tmp_path: Path, keep: int, flips: list[tuple[int, int]]
) -> None:
    data = bytearray(SMALL_NPZ)
    for at, bits in flips:
        data[at] ^= bits
    (tmp_path / "f.npz").write_bytes(data[:keep])
    dest = tmp_path / "dest"
    dest.unlink(missing_ok=True)
    try:
        convert(tmp_path / "f.npz", dest)
    except ValueError:
        assert not dest.exists()
        assert keep < len(SMALL_NPZ) or flips
    else:
        assert keep == len(SMALL_NPZ)
        assert_holds(Student.load(dest), keras_weights(1, 1))


def test_npz_with_an_absurd_shape_is_a_value_error(tmp_path: Path) -> None:
    head = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        head, {"descr": "<f4", "fortran_order": False, "shape": (10**15,)}
    )
    with zipfile.ZipFile(tmp_path / "bomb.npz", "w") as file:
        file.writestr("m/delta/bias.npy", head.getvalue())
    with pytest.raises(ValueError, match="is damaged"):
        convert(tmp_path / "bomb.npz", tmp_path / "dest")


# --- The authors' numbers ---


def golden_student(tmp_path: Path, name: str, layers: int) -> tuple[Student, Any]:
    data = np.load(GOLDEN / f"{name}.npz")
    names = [f"recurrent/{i}/{n}" for i in range(layers) for n in ("kernel", "recurrent_kernel")]
    names = [n for i in range(layers) for n in (*names[2 * i : 2 * i + 2], f"recurrent/{i}/bias")]
    names += ["delta/kernel", "delta/bias"]
    keys = [key for key in data.files if key.startswith("weight.")]
    arrays = {n: data[key] for n, key in zip(names, keys, strict=True)}
    write_npz(tmp_path / "golden.npz", {"golden": arrays})
    return convert(tmp_path / "golden.npz", tmp_path / "golden.safetensors"), data


@pytest.mark.parametrize(("name", "layers"), [("rnnprop", 2), ("rnnprop_one_layer", 1)])
def test_converted_student_steps_as_the_authors_do(tmp_path: Path, name: str, layers: int) -> None:
    student, data = golden_student(tmp_path, name, layers)
    student = student.double()
    grads = torch.from_numpy(data["grads"]).double()
    state, updates = student.initial_state(grads[0]), []
    with torch.no_grad():
        for grad in grads:
            update, state = student.step(grad, state)
            updates.append(update)
    theirs = data["updates"]
    assert np.abs(torch.stack(updates).numpy() - theirs).max() <= 1e-5 * np.abs(theirs).max()


# --- The checkpoint ---


def test_checksum_is_the_published_one() -> None:
    assert crc32c(b"123456789") == 0xE3069283
    for data in (b"", b"123456789", bytes(32), bytes(range(256)) * 3):
        assert masked_crc32c(data) == mask(crc32c(data))


@pytest.mark.parametrize("per_block", [1, 2, 5, 1000])
def test_bundle_reads_what_was_written(tmp_path: Path, per_block: int) -> None:
    rng = np.random.default_rng(0)
    tensors = {f"net/{i:03d}/kernel": rng.normal(size=(i % 4, 3)) for i in range(40)}
    tensors |= {"a": np.float32([1, 2]), "z": np.array(-5), "one/" * 60: np.zeros((1, 1, 1, 1))}
    write_bundle(tmp_path / "w", tensors, per_block=per_block)
    bundle = TensorBundle(tmp_path / "w")
    assert bundle.names() == tuple(sorted(tensors))
    for name, array in tensors.items():
        found = bundle.read(name)
        assert found.dtype == array.dtype
        assert found.flags.writeable
        assert np.array_equal(found, array)
    with pytest.raises(KeyError):
        bundle.read("absent")


@pytest.mark.parametrize("how", ["folder", "index", "prefix"])
def test_checkpoint_student_arrives_whole(tmp_path: Path, how: str) -> None:
    folder = tmp_path / "min-max-1"
    keras = package(folder, packaged_config())
    source = {"folder": folder, "index": folder / "weights.index", "prefix": folder / "weights"}
    convert(source[how], tmp_path / "dest")
    student = Student.load(tmp_path / "dest")
    assert_holds(student, keras)
    assert student.config.settings.constants == (0.2, 0.8, 0.99, 1e-8)
    assert (student.config.warmup_steps, student.config.warmup_lr) == (100, 0.02)
    assert student.provenance["converted_from"] == "min-max-1/weights.index"
    assert student.provenance["key"] is None
    assert student.provenance["source_format"] == "tensorflow-checkpoint"
    assert student.provenance["iterations"] == 620


def test_checkpoint_without_config_has_the_papers_constants(tmp_path: Path) -> None:
    keras = package(tmp_path / "c", layers=1, hidden=5)
    student = convert(tmp_path / "c", tmp_path / "dest")
    assert_holds(student, keras)
    assert student.config.settings.constants == (0.1, 0.9, 0.999, 1e-10)
    assert (student.config.warmup_steps, student.config.warmup_lr) == (100, 0.05)


def test_checkpoint_of_float64_and_newer_iterations(tmp_path: Path) -> None:
    keras = keras_weights()
    tensors = {f"network/{n}{VARIABLE}": a.astype(np.float64) for n, a in keras.items()}
    tensors[f"optimizer/_iterations{VARIABLE}"] = np.array(3)
    write_bundle(tmp_path / "w", tensors)
    student = convert(tmp_path / "w", tmp_path / "dest")
    assert_holds(student, keras)
    assert student.provenance["iterations"] == 3
    assert {w.dtype for w in student.weights()} == {torch.float32}


def test_warm_up_is_counted_in_steps(tmp_path: Path) -> None:
    config = packaged_config()
    config["settings"] = {"warmup": 0, "warmup_rate": 0.0}
    package(tmp_path / "c", config)
    student = convert(tmp_path / "c", tmp_path / "dest")
    assert (student.config.warmup_steps, student.config.warmup_lr) == (0, 0)
    student = convert(tmp_path / "c", tmp_path / "dest", warmup_steps=5, warmup_lr=0.5)
    assert (student.config.warmup_steps, student.config.warmup_lr) == (5, 0.5)
    with pytest.raises(ValueError, match="warmup_steps must be 0 or more"):
        convert(tmp_path / "c", tmp_path / "dest", warmup_steps=-1)


def test_wrong_places_are_explained(tmp_path: Path) -> None:
    dest = tmp_path / "dest"
    (tmp_path / "bare").mkdir()
    with pytest.raises(ValueError, match="has no 'weights.index'$"):
        convert(tmp_path / "bare", dest)
    write_bundle(tmp_path / "run" / "stage_3.0__period_4.0", checkpoint_tensors(keras_weights()))
    with pytest.raises(ValueError, match=r"one of its checkpoints: .*stage_3.0__period_4.0'"):
        convert(tmp_path / "run", dest)
    convert(tmp_path / "run" / "stage_3.0__period_4.0", dest)
    dest.unlink()
    with pytest.raises(FileNotFoundError, match="there is no .npz, no folder and no checkpoint"):
        convert(tmp_path / "run" / "stage_9", dest)
    package(tmp_path / "c")
    with pytest.raises(ValueError, match="key picks a student of an .npz"):
        convert(tmp_path / "c", dest, key="min-max/1")
    (tmp_path / "c" / "weights.data-00000-of-00001").unlink()
    with pytest.raises(FileNotFoundError, match="lacks its data file"):
        convert(tmp_path / "c", dest)
    write_bundle(tmp_path / "foreign" / "weights", {"model/kernel": np.zeros(2)})
    with pytest.raises(ValueError, match="holds no RNNProp policy.*model/kernel"):
        convert(tmp_path / "foreign", dest)
    assert not dest.exists()


@pytest.mark.parametrize(
    ("config", "why"),
    [
        ("{", "is not JSON"),
        ("[" * 100_000, "is not JSON"),
        ("[]", "must be an object"),
        ('{"policy": 3}', "object 'policy'"),
        ('{"settings": []}', "object 'settings'"),
        ('{"policy_constructor": "DMOptimizer"}', "policy_constructor .* not 'DMOptimizer'"),
        ('{"policy": {"alpha": "big"}}', "policy.alpha .* finite number, not 'big'"),
        ('{"policy": {"alpha": NaN}}', "policy.alpha .* finite number, not nan"),
        ('{"policy": {"alpha": true}}', "policy.alpha .* finite number, not True"),
        ('{"policy": {"beta_1": 1.5}}', "beta1 must be in"),
        ('{"policy": {"epsilon": 0}}', "eps must be positive"),
        ('{"policy": {"layers": 20}}', "policy.layers .* list of sizes"),
        ('{"policy": {"layers": [20, "20"]}}', "policy.layers .* list of sizes"),
        ('{"policy": {"layers": []}}', "policy.layers .* one size"),
        ('{"policy": {"layers": [20, 10]}}', "policy.layers .* one size"),
        ('{"policy": {"layers": [3]}}', r"policy.layers .* is \[3\], .* have \[3, 3\]"),
        ('{"policy": {"activation": "relu"}}', "policy.activation .* must be 'tanh'"),
        ('{"policy": {"warmup_lstm_update": true}}', "policy.warmup_lstm_update"),
        ('{"settings": {"warmup": 0.5}}', "settings.warmup .* windows"),
        ('{"settings": {"warmup": -1}}', "settings.warmup .* windows"),
        ('{"settings": {"warmup_rate": -1}}', "warmup_lr must be 0 or more"),
        ('{"settings": {"warmup_rate": null}}', "settings.warmup_rate"),
    ],
)
def test_config_errors_name_the_field(tmp_path: Path, config: str, why: str) -> None:
    package(tmp_path / "c")
    (tmp_path / "c" / "config.json").write_text(config)
    with pytest.raises(ValueError, match=why):
        convert(tmp_path / "c", tmp_path / "dest")
    assert not (tmp_path / "dest").exists()


@pytest.mark.parametrize(
    ("head", "options", "why"),
    [
        (header(shards=2), {}, "belongs to 2 data files"),
        (header(shards=0), {}, "belongs to 0 data files"),
        (header(endianness=1), {}, "big-endian"),
        (header(oldest_reader=2), {}, "reader of version 2"),
        (b"\xff", {}, "damaged"),
        (message(1, b"x"), {}, "wire type 2"),
        (number(3, 1), {}, "a message is missing"),
        (None, {"compression": 1}, r"compressed blocks \(compression snappy\)"),
        (None, {"compression": 77}, r"compressed blocks \(compression number 77\)"),
    ],
)
def test_unsupported_bundles_are_refused(
    tmp_path: Path, head: bytes | None, options: dict[str, Any], why: str
) -> None:
    write_bundle(tmp_path / "w", checkpoint_tensors(keras_weights()), head=head, **options)
    with pytest.raises(ValueError, match=why):
        convert(tmp_path / "w", tmp_path / "dest")


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"dtype": 19}, "float32, float64 or int64, not float16"),
        ({"dtype": 99}, "not dtype number 99"),
        ({"shape": shape_proto((1, 1, 1))}, r"delta/bias must have shape \(1,\)"),
        ({"shape": shape_proto((7,))}, "do not agree"),
        ({"shape": shape_proto((1 << 62, 1 << 62))}, "do not agree"),
        ({"shape": shape_proto((-1,))}, "unknown size"),
        ({"shape": number(3, 1)}, "unknown rank"),
        ({"shard": 1}, "data file 1"),
        ({"offset": 1 << 40}, "has [0-9]+; was it cut short"),
        ({"offset": -4}, "damaged"),
        ({"size": -4}, "damaged"),
        ({"offset": 4}, "does not match its checksum"),
        ({"crc": 0}, "does not match its checksum"),
        ({"extra": message(7, b"")}, "slices"),
        ({"extra": b"\x0b"}, "no protobuf wire type 3"),
        ({"extra": message(9, b"abc")[:-1]}, "field 9 passes its end"),
        ({"extra": number(6, 3)}, "wire type 0, not 5"),
    ],
)
def test_odd_entries_are_refused(tmp_path: Path, change: dict[str, Any], why: str) -> None:
    name = f"network/delta/bias{VARIABLE}"
    write_bundle(tmp_path / "w", checkpoint_tensors(keras_weights()), change={name: change})
    with pytest.raises(ValueError, match=why):
        convert(tmp_path / "w", tmp_path / "dest")
    assert not (tmp_path / "dest").exists()


def test_unknown_fields_are_skipped(tmp_path: Path) -> None:
    extra = number(12, 5) + message(13, b"new") + b"\x71" + bytes(8)
    name = f"network/delta/bias{VARIABLE}"
    keras = keras_weights()
    write_bundle(tmp_path / "w", checkpoint_tensors(keras), change={name: {"extra": extra}})
    assert_holds(convert(tmp_path / "w", tmp_path / "dest"), keras)


def test_index_of_wrong_order_or_names(tmp_path: Path) -> None:
    def write(pairs: list[tuple[bytes, bytes]]) -> None:
        data = block(pairs)
        index = block([(b"z", varint(0) + varint(len(data) - 5))])
        handles = varint(0) + varint(0) + varint(len(data)) + varint(len(index) - 5)
        magic = struct.pack("<Q", 0xDB4775248B80FB57)
        (tmp_path / "w.index").write_bytes(data + index + handles.ljust(40, b"\0") + magic)
        (tmp_path / "w.data-00000-of-00001").write_bytes(b"")

    good = entry(np.zeros(0), 0)
    write([(b"", header()), (b"a", good)])
    assert TensorBundle(tmp_path / "w").names() == ("a",)
    write([(b"", header()), (b"b", good), (b"a", good)])
    with pytest.raises(ValueError, match="not in order"):
        TensorBundle(tmp_path / "w")
    write([(b"", header()), (b"a", good), (b"a", good)])
    with pytest.raises(ValueError, match="not in order"):
        TensorBundle(tmp_path / "w")
    write([(b"", header()), (b"\xff", good)])
    with pytest.raises(ValueError, match="not named in UTF-8"):
        TensorBundle(tmp_path / "w")
    write([(b"a", good)])
    with pytest.raises(ValueError, match="no header"):
        TensorBundle(tmp_path / "w")


RESTARTS = struct.pack("<II", 0, 1)


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (b"\1\0\0" + RESTARTS, "an entry passes the end of its block"),
        (b"\0\5\0ab" + RESTARTS, "an entry passes the end of its block"),
        (b"\0\1\5abcd" + RESTARTS, "an entry passes the end of its block"),
        (b"\0\x80" + struct.pack("<I", 0x80808080) * 3 + RESTARTS, "cut short or too long"),
        (b"\xff" * 9 + b"\x7f\0\0" + RESTARTS, "cut short or too long"),
        (b"\0\0\0" + struct.pack("<I", 9), "no room for its restarts"),
        (b"\0\0", "no room for its restarts"),
        (b"", "no room for its restarts"),
    ],
)
def test_malformed_blocks_are_refused(tmp_path: Path, content: bytes, why: str) -> None:
    def sealed(block: bytes) -> bytes:
        return block + b"\0" + struct.pack("<I", masked_crc32c(block + b"\0"))

    data = sealed(content)
    index = sealed(b"\0\1\2z" + varint(0) + varint(len(content)) + RESTARTS)
    handles = bytes(2) + varint(len(data)) + varint(len(index) - 5)
    magic = struct.pack("<Q", 0xDB4775248B80FB57)
    (tmp_path / "w.index").write_bytes(data + index + handles.ljust(40, b"\0") + magic)
    with pytest.raises(ValueError, match=why):
        TensorBundle(tmp_path / "w")


BUNDLE = checkpoint_tensors(keras_weights(1, 1))


def read_all(prefix: Path) -> dict[str, np.ndarray]:
    bundle = TensorBundle(prefix)
    return {name: bundle.read(name) for name in bundle.names() if name[0] != "_"}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    prefix = tmp_path_factory.mktemp("bundle") / "w"
    write_bundle(prefix, BUNDLE)
    return prefix


@pytest.fixture(scope="module")
def spans(whole: Path) -> list[tuple[int, int]]:
    """Where each block of the index begins and ends, found by its checksum."""
    raw, at, found = Path(f"{whole}.index").read_bytes(), 0, []
    while at < len(raw) - 48:
        end = next(
            end
            for end in range(at + 4, len(raw) - 48)
            if raw[end + 1 : end + 5] == struct.pack("<I", masked_crc32c(raw[at : end + 1]))
        )
        found.append((at, end))
        at = end + 5
    return found


@FUZZ
@given(data=st.data())
def test_damaged_files_are_value_errors_or_read_right(
    whole: Path, tmp_path: Path, data: st.DataObject
) -> None:
    """Checksums catch every flip that matters; the footer's padding does not."""
    files = {
        suffix: bytearray(Path(f"{whole}{suffix}").read_bytes())
        for suffix in (".index", ".data-00000-of-00001")
    }
    which = data.draw(st.sampled_from(sorted(files)))
    content = files[which]
    for _ in range(data.draw(st.integers(0, 3))):
        content[data.draw(st.integers(0, len(content) - 1))] ^= data.draw(st.integers(1, 255))
    files[which] = content[: data.draw(st.integers(0, len(content)) | st.just(len(content)))]
    for suffix, altered in files.items():
        Path(f"{tmp_path / 'w'}{suffix}").write_bytes(altered)
    try:
        found = read_all(tmp_path / "w")
    except ValueError:
        assert files[which] != Path(f"{whole}{which}").read_bytes()
    else:
        for name, array in found.items():
            assert np.array_equal(array, BUNDLE[name])


@FUZZ
@given(data=st.data())
def test_lying_index_with_valid_checksums_is_a_value_error(
    whole: Path, spans: list[tuple[int, int]], tmp_path: Path, data: st.DataObject
) -> None:
    """Flips inside blocks whose checksums are then made right reach the parser itself."""
    content = bytearray(Path(f"{whole}.index").read_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        start, end = data.draw(st.sampled_from(spans))
        content[data.draw(st.integers(start, end - 1))] = data.draw(st.integers(0, 255))
        content[end + 1 : end + 5] = struct.pack("<I", masked_crc32c(content[start : end + 1]))
    (tmp_path / "w.index").write_bytes(content)
    (tmp_path / "w.data-00000-of-00001").write_bytes(
        Path(f"{whole}.data-00000-of-00001").read_bytes()
    )
    try:
        found = read_all(tmp_path / "w")
    except ValueError:
        return
    for array in found.values():
        assert array.nbytes == math.prod(array.shape) * array.itemsize <= 1000


@FUZZ
@given(content=st.binary(max_size=300), magic=st.booleans())
def test_random_bytes_are_no_index(tmp_path: Path, content: bytes, magic: bool) -> None:
    tail = struct.pack("<Q", 0xDB4775248B80FB57) if magic else b""
    (tmp_path / "w.index").write_bytes(content + tail)
    with pytest.raises(ValueError):  # noqa: PT011  any message will do: none of these is ours
        TensorBundle(tmp_path / "w")
