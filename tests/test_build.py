from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
from setuptools import Distribution

from amalgam.backends import core

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def build() -> ModuleType:
    spec = importlib.util.spec_from_file_location("amalgam_setup", ROOT / "setup.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def toolkit(tmp_path: Path) -> Path:
    nvcc = tmp_path / "bin" / "nvcc"
    nvcc.parent.mkdir()
    nvcc.write_text("#!/bin/sh\n")
    nvcc.chmod(0o755)
    return tmp_path


def test_the_toolchain_decides_about_cuda(build: ModuleType, toolkit: Path) -> None:
    nvcc = str(toolkit / "bin" / "nvcc")
    assert build.cuda_compiler({"CUDA_HOME": str(toolkit), "PATH": ""}) == nvcc
    assert build.cuda_compiler({"PATH": str(toolkit / "bin"), "AMALGAM_CUDA": "1"}) == nvcc
    assert build.cuda_compiler({"PATH": str(toolkit / "bin"), "AMALGAM_CUDA": "0"}) is None
    assert build.cuda_compiler({"PATH": str(toolkit), "AMALGAM_CUDA": "auto"}) is None


def test_sanitizers_are_asked_for_and_exclude_cuda(build: ModuleType, toolkit: Path) -> None:
    with_nvcc = {"PATH": str(toolkit / "bin"), "AMALGAM_SANITIZE": "1"}
    assert "-fsanitize=address,undefined" in build.sanitizers(with_nvcc)
    assert build.sanitizers({"AMALGAM_SANITIZE": "0"}) == build.sanitizers({}) == []
    assert build.cuda_compiler(with_nvcc) is None
    with pytest.raises(SystemExit, match="exclude each other"):
        build.cuda_compiler({**with_nvcc, "AMALGAM_CUDA": "1"})
    with pytest.raises(SystemExit, match="must be 0 or 1, not 'yes'"):
        build.sanitizers({"AMALGAM_SANITIZE": "yes"})


def test_a_forced_part_that_cannot_be_built_is_an_error(build: ModuleType, toolkit: Path) -> None:
    with pytest.raises(SystemExit, match="AMALGAM_CUDA=1, but nvcc is neither"):
        build.cuda_compiler({"PATH": str(toolkit), "AMALGAM_CUDA": "1"})
    with pytest.raises(SystemExit, match="must be auto, 0 or 1, not 'yes'"):
        build.cuda_compiler({"PATH": "", "AMALGAM_CUDA": "yes"})


@pytest.mark.parametrize(
    ("compiler", "message"),
    [
        ("no-such-compiler", "there is no C[+][+] compiler 'no-such-compiler'. Install one"),
        ("false", "the C[+][+] compiler 'false' builds no C[+][+]17"),
    ],
)
def test_a_compiler_that_does_not_do_is_named(build, compiler: str, message: str) -> None:
    command = build.BuildCore(Distribution())
    command.compiler = SimpleNamespace(compiler_cxx=[compiler])
    with pytest.raises(SystemExit, match=message):
        command._check_compiler()


def test_architectures(build: ModuleType) -> None:
    known = {"75", "80", "90", "100"}
    assert build.cuda_archs({}, known) == ["80", "90", "100"]
    assert build.cuda_archs({}, {"75", "80"}) == ["80"]
    assert build.cuda_archs({"AMALGAM_CUDA_ARCHS": "90;80, 75"}, known) == ["75", "80", "90"]
    with pytest.raises(SystemExit, match="names 120"):
        build.cuda_archs({"AMALGAM_CUDA_ARCHS": "120"}, known)
    with pytest.raises(SystemExit, match="'sm_90'"):
        build.cuda_archs({"AMALGAM_CUDA_ARCHS": "sm_90"}, known)
    assert build.gencode_flags(["80", "90"])[-1] == "-gencode=arch=compute_90,code=compute_90"


def test_jobs(build: ModuleType) -> None:
    assert build.jobs({"MAX_JOBS": "3"}) == 3
    assert build.jobs({}) >= 1
    with pytest.raises(SystemExit, match="MAX_JOBS must be a positive number, not '0'"):
        build.jobs({"MAX_JOBS": "0"})


def test_kernels_are_no_top_level_package(build: ModuleType) -> None:
    names = build.packages()
    assert {"amalgam", "amalgam.kernels", "amalgam.operations"} <= set(names)
    assert all(name.split(".")[0] == "amalgam" for name in names)


def test_the_commit_goes_on_from_an_sdist(
    build: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """git knows none there, and the wheel that is built from it names the same."""
    sources, built = tmp_path / "sdist", tmp_path / "lib"
    for folder in (sources, built):
        (folder / "amalgam").mkdir(parents=True)
    monkeypatch.setattr(build, "ROOT", sources)
    build.write_commit(built)
    assert not (built / "amalgam" / "COMMIT").exists()
    (sources / "amalgam" / "COMMIT").write_text("0123456789ab\n")
    build.write_commit(built)
    assert (built / "amalgam" / "COMMIT").read_text() == "0123456789ab\n"


def test_the_core_is_of_this_version(build: ModuleType) -> None:
    from amalgam.version import __version__

    assert core.core().version == __version__


def _isa(name: str) -> subprocess.CompletedProcess[str]:
    """The core alone, since importing PyTorch would take most of the test's time."""
    code = f"""
from importlib import util
spec = util.spec_from_file_location("amalgam._core", {core.core().__file__!r})
core = util.module_from_spec(spec)
spec.loader.exec_module(core)
print(core.cpu.isa())
"""
    return subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "AMALGAM_CPU_ISA": name},
        capture_output=True,
        text=True,
    )


@pytest.mark.parametrize("name", ["portable", "avx2", "avx512"])
def test_an_instruction_set_can_be_forced(name: str) -> None:
    done = _isa(name)
    if name in core.core().cpu.available_isas():
        assert done.stdout.strip() == name, done.stderr
    else:
        assert f"AMALGAM_CPU_ISA={name} is not available here" in done.stderr


def test_an_unknown_instruction_set_is_an_error() -> None:
    done = _isa("sse9")
    assert done.returncode != 0
    assert "ValueError: AMALGAM_CPU_ISA must be avx512, avx2 or portable" in done.stderr


def _headers(guard: str) -> list[str]:
    """The CPU kernels' headers that hold a line."""
    headers = sorted((ROOT / "csrc" / "cpu").glob("*.h"))
    return [header.name for header in headers if guard in header.read_text().splitlines()]


def test_every_header_with_vectors_is_guarded() -> None:
    """Each opens the namespace of an instruction set, which such a header alone does."""
    guarded = set(_headers("#ifndef AMALGAM_ISA"))
    assert guarded == set(_headers("namespace amalgam::cpu::AMALGAM_ISA {"))
    assert {"simd.h", "activations.h", "lstm.h"} <= guarded
    assert {"parallel.h", "storage.h", "tiles.h"} <= set(_headers("#ifdef AMALGAM_ISA"))


@pytest.mark.parametrize("header", _headers("#ifndef AMALGAM_ISA"))
def test_a_plain_file_cannot_include_vectors(header: str, tmp_path: Path) -> None:
    """Its code would be of the build machine's default instruction set, or of none."""
    assert _compiles(header, tmp_path, "-DAMALGAM_ISA=portable") == ""
    assert f"{header} is for *_simd.cpp" in _compiles(header, tmp_path)


@pytest.mark.parametrize("header", _headers("#ifdef AMALGAM_ISA"))
def test_inner_loops_cannot_include_what_is_compiled_once(header: str, tmp_path: Path) -> None:
    assert _compiles(header, tmp_path) == ""
    assert f"{header} is for files compiled once" in _compiles(
        header, tmp_path, "-DAMALGAM_ISA=avx512"
    )


def _compiles(header: str, folder: Path, *flags: str) -> str:
    """The compiler's errors about a file that includes the header, or nothing."""
    compiler = shutil.which(os.environ.get("CXX", "g++"))
    if compiler is None:
        pytest.skip("needs a C++ compiler: CXX, or g++ on PATH")
    source = folder / "source.cpp"
    source.write_text(f'#include "{header}"\n\nint main() {{ return 0; }}\n')
    include = f"-I{ROOT / 'csrc' / 'cpu'}"
    command = [compiler, "-std=c++17", "-fsyntax-only", include, *flags, str(source)]
    return subprocess.run(command, capture_output=True, text=True).stderr


def test_cuda_without_a_gpu_says_what_is_wrong() -> None:
    module = core.core()
    if module.cuda is None or torch.cuda.is_available():
        pytest.skip("needs a core with CUDA on a machine without a GPU")
    with pytest.raises(RuntimeError, match=r"choosing the device: CUDA error \d+ \(cuda\w+\): "):
        module.cuda.teacher_distance_float32(
            *[0] * 5,
            **dict.fromkeys(("rows", "teacher_rows", "n", "k"), 1),
            **{"eps": 0.0, "huber_delta": -1.0, "device": 0, "stream": 0},
        )
