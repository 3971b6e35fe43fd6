"""Builds ``amalgam._core``, the compiled operations; everything else is in pyproject.toml.

The module includes no PyTorch header, so it builds under pip's isolation. Environment variables:

- ``AMALGAM_CUDA``: ``auto`` (default: where nvcc is found), ``0`` (never), ``1`` (or fail).
- ``AMALGAM_CUDA_ARCHS``: compute capabilities, ``"80;90"``; by default those of `DEFAULT_ARCHS`
  that nvcc knows. PTX of the newest is added, for GPUs newer than all of them.
- ``AMALGAM_SANITIZE``: ``0`` (default), or ``1`` for a core without CUDA that stops at the first
  bad memory access or undefined behaviour. It imports only where the sanitizers' libraries are
  preloaded; ``tests/sanitize_core.py`` runs the kernels in it.
- ``MAX_JOBS``: objects compiled at once; by default as many as cores and memory allow.
"""

from __future__ import annotations

import functools
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py
from setuptools.command.sdist import sdist

ROOT = Path(__file__).resolve().parent
CSRC = Path("csrc")
DEFAULT_ARCHS = ("80", "90", "100")
BYTES_PER_JOB = 1 << 30  # cc1plus on bindings and cicc each stay below it
FLAGS = ["-std=c++17", "-fvisibility=hidden"]
OPTIMIZED = ["-O3", "-g0"]
SANITIZERS = ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"]

# Flags of each instruction set's objects. ISO C++ mode forbids contraction, so it is asked for.
ISA_FLAGS = {
    "portable": ["-ffp-contract=fast"],
    "avx2": ["-ffp-contract=fast", "-mavx2", "-mfma"],
    "avx512": [
        "-ffp-contract=fast",
        *("-mavx2", "-mfma", "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl"),
        "-mprefer-vector-width=512",
    ],
}
# Of *_bf16.cpp, which builds hold whose compiler knows the last one: GCC since 10, Clang since 9.
BF16_ISA, BF16_FLAGS = "avx512_bf16", [*ISA_FLAGS["avx512"], "-mavx512bf16"]


class BuildError(SystemExit):
    """Stops the build with a message and no traceback."""

    def __init__(self, message: str) -> None:
        super().__init__(f"amalgam: {message}")


def find_nvcc(environment: Mapping[str, str]) -> str | None:
    """The CUDA compiler of ``CUDA_HOME`` or else of ``PATH``, or ``None``."""
    home = environment.get("CUDA_HOME")
    if home:
        of_home = shutil.which("nvcc", path=str(Path(home) / "bin"))
        if of_home:
            return of_home
    return shutil.which("nvcc", path=environment.get("PATH", os.defpath))


def sanitizers(environment: Mapping[str, str]) -> list[str]:
    """Flags of compiler and linker that ``AMALGAM_SANITIZE`` asks for; none by default.

    Raises:
        BuildError: ``AMALGAM_SANITIZE`` has another value than 0, 1.
    """
    wanted = environment.get("AMALGAM_SANITIZE", "0") or "0"
    if wanted not in ("0", "1"):
        raise BuildError(f"AMALGAM_SANITIZE must be 0 or 1, not {wanted!r}")
    return SANITIZERS if wanted == "1" else []


def cuda_compiler(environment: Mapping[str, str]) -> str | None:
    """The CUDA compiler to build with, or ``None`` to build without CUDA.

    Raises:
        BuildError: ``AMALGAM_CUDA`` has another value than auto, 0, 1, or is 1 without nvcc or
            together with ``AMALGAM_SANITIZE=1``.
    """
    wanted = environment.get("AMALGAM_CUDA", "auto") or "auto"
    if wanted not in ("auto", "0", "1"):
        raise BuildError(f"AMALGAM_CUDA must be auto, 0 or 1, not {wanted!r}")
    if sanitizers(environment):
        if wanted == "1":
            raise BuildError(
                "AMALGAM_CUDA=1 and AMALGAM_SANITIZE=1 exclude each other: the sanitizers are the "
                "C++ compiler's, and the CUDA driver does not run under them. Unset one"
            )
        return None
    nvcc = find_nvcc(environment) if wanted != "0" else None
    if wanted == "1" and nvcc is None:
        raise BuildError(
            "AMALGAM_CUDA=1, but nvcc is neither on PATH nor in CUDA_HOME/bin "
            f"(CUDA_HOME={environment.get('CUDA_HOME', '')!r}). Install the CUDA toolkit or set "
            "CUDA_HOME; AMALGAM_CUDA=0 builds without CUDA"
        )
    return nvcc


def cuda_archs(environment: Mapping[str, str], supported: set[str]) -> list[str]:
    """The compute capabilities to compile for, oldest first.

    Args:
        environment: Where ``AMALGAM_CUDA_ARCHS`` is read.
        supported: What nvcc can compile for: ``{"80", "90", ...}``.

    Raises:
        BuildError: An architecture asked for has no such form or is not supported.
    """
    text = environment.get("AMALGAM_CUDA_ARCHS", "")
    wanted = [each for each in re.split(r"[;,\s]+", text) if each]
    for arch in wanted:
        if not re.fullmatch(r"\d{2,3}", arch):
            raise BuildError(
                f"AMALGAM_CUDA_ARCHS must be numbers as in '80;90', not {text!r} ({arch!r})"
            )
        if arch not in supported:
            known = sorted(supported, key=int)
            raise BuildError(f"AMALGAM_CUDA_ARCHS names {arch}, and nvcc compiles for {known}")
    archs = set(wanted) or supported.intersection(DEFAULT_ARCHS)
    if not archs:
        raise BuildError(f"nvcc knows none of {DEFAULT_ARCHS}; set AMALGAM_CUDA_ARCHS")
    return sorted(archs, key=int)


def gencode_flags(archs: list[str]) -> list[str]:
    """Flags of nvcc for machine code of every architecture and PTX of the newest."""
    flags = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in archs]
    return [*flags, f"-gencode=arch=compute_{archs[-1]},code=compute_{archs[-1]}"]


def jobs(environment: Mapping[str, str]) -> int:
    """How many objects to compile at once.

    Raises:
        BuildError: ``MAX_JOBS`` is no positive number.
    """
    text = environment.get("MAX_JOBS", "")
    if text:
        if not text.isdecimal() or int(text) < 1:
            raise BuildError(f"MAX_JOBS must be a positive number, not {text!r}")
        return int(text)
    try:
        cores = len(os.sched_getaffinity(0))
        memory = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):  # not Linux
        return os.cpu_count() or 1
    return max(1, min(cores, memory // BYTES_PER_JOB))


def isas() -> list[str]:
    """The instruction sets to compile the inner loops for."""
    universal = "-arch arm64" in os.environ.get("ARCHFLAGS", "")
    x86 = platform.machine().lower() in ("x86_64", "amd64") and not universal
    return list(ISA_FLAGS) if x86 else ["portable"]


def commit() -> str | None:
    """The commit of these sources: git's, or the one written down in the sdist that they are of."""
    if (ROOT / ".git").exists() and shutil.which("git") is not None:
        command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=12"]
        done = subprocess.run(command, capture_output=True, text=True)
        return done.stdout if done.returncode == 0 else None
    written = ROOT / "amalgam" / "COMMIT"
    return written.read_text(encoding="utf-8") if written.exists() else None


def write_commit(folder: Path) -> None:
    """Write ``amalgam/COMMIT`` in a folder, where a commit is known."""
    known = commit()
    if known is not None:
        (folder / "amalgam" / "COMMIT").write_text(known, encoding="utf-8")


class BuildPython(build_py):
    """Copies the modules, and writes down the commit they come from for the students they train."""

    def run(self) -> None:
        """Build, and write ``amalgam/COMMIT`` where a commit is known."""
        super().run()
        if not self.editable_mode:
            write_commit(Path(self.build_lib))


class SourceDistribution(sdist):
    """Writes down the commit, too, which git does not know where an sdist is built."""

    def make_release_tree(self, base_dir: str, files: list[str]) -> None:
        """Copy the sources, and write ``amalgam/COMMIT`` beside them where a commit is known."""
        super().make_release_tree(base_dir, files)
        write_commit(Path(base_dir))


class BuildCore(build_ext):
    """Compiles csrc/: inner loops once per instruction set, CUDA files by nvcc, all in parallel."""

    def build_extension(self, ext: Extension) -> None:
        """Compile and link the one extension module."""
        import pybind11

        self._check_compiler()
        nvcc = cuda_compiler(os.environ)
        sanitizing = sanitizers(os.environ)
        # At -O1 a report's line numbers are those of the fault.
        tuning = [*sanitizing, "-O1", "-g1"] if sanitizing else OPTIMIZED
        openmp = self._openmp_flags()
        bf16 = len(isas()) > 1 and self._compiles("int main() {}\n", BF16_FLAGS)
        macros: list[tuple[str, str | None]] = [
            ("AMALGAM_VERSION", f'"{self.distribution.get_version()}"')
        ]
        if len(isas()) > 1:
            macros.append(("AMALGAM_X86", None))
        if bf16:
            macros.append(("AMALGAM_BF16", None))
        archs: list[str] = []
        if nvcc:
            archs = cuda_archs(os.environ, _supported_archs(nvcc))
            macros += [("AMALGAM_WITH_CUDA", None), ("AMALGAM_CUDA_ARCHS", f'"{";".join(archs)}"')]

        def compile_cpp(source: Path, folder: str, flags: list[str], isa: str | None) -> list[str]:
            return self.compiler.compile(
                [str(source)],
                output_dir=str(Path(self.build_temp) / folder),
                macros=[*macros, ("AMALGAM_ISA", isa)] if isa else macros,
                include_dirs=[str(CSRC), pybind11.get_include(), *self.compiler.include_dirs],
                extra_postargs=[*FLAGS, *tuning, *openmp, *flags],
            )

        def compile_cuda(source: Path) -> list[str]:
            target = Path(self.build_temp) / "cuda" / source.with_suffix(".o").name
            target.parent.mkdir(parents=True, exist_ok=True)
            defines = [f"-D{name}" + (f"={value}" if value else "") for name, value in macros]
            command = [str(nvcc), "-c", str(source), "-o", str(target), "-I", str(CSRC), *defines]
            command += ["-std=c++17", "-O3", "-Xcompiler=-fPIC,-fvisibility=hidden"]
            self._run([*command, *gencode_flags(archs)])
            return [str(target)]

        tasks: list[Callable[[], list[str]]] = []
        if nvcc:
            for source in sorted((CSRC / "cuda").glob("*.cu")):
                tasks.append(functools.partial(compile_cuda, source))
        of_cuda = (CSRC / "cuda").glob("*.cpp") if nvcc else ()
        for source in sorted([*CSRC.glob("*.cpp"), *(CSRC / "cpu").glob("*.cpp"), *of_cuda]):
            if source.stem.endswith("_simd"):
                for isa in isas():
                    tasks.append(functools.partial(compile_cpp, source, isa, ISA_FLAGS[isa], isa))
            elif source.stem.endswith("_bf16"):
                if bf16:
                    tasks.append(
                        functools.partial(compile_cpp, source, BF16_ISA, BF16_FLAGS, BF16_ISA)
                    )
            else:
                tasks.append(functools.partial(compile_cpp, source, "common", [], None))

        with ThreadPoolExecutor(jobs(os.environ)) as pool:
            objects = [name for names in pool.map(lambda task: task(), tasks) for name in names]

        library = Path(self.get_ext_fullpath(ext.name))
        library.parent.mkdir(parents=True, exist_ok=True)
        if nvcc:
            # nvcc links, because it knows where its static runtime is.
            link = [nvcc, "-shared", "-cudart", "static", "-o", str(library), *objects]
            self._run([*link, *gencode_flags(archs), *(f"-Xcompiler={flag}" for flag in openmp)])
        else:
            self.compiler.link_shared_object(
                objects, str(library), extra_postargs=[*openmp, *sanitizing], target_lang="c++"
            )

    def _check_compiler(self) -> None:
        """Stop unless there is a compiler that knows C++17."""
        name, program = self.compiler.compiler_cxx[0], "#include <optional>\nint main() {}\n"
        try:
            works = self._compiles(program, ["-std=c++17"])
        except OSError:
            raise BuildError(
                f"there is no C++ compiler {name!r}. Install one, such as g++ "
                "(apt install g++, dnf install gcc-c++, on macOS xcode-select --install), or say "
                "which by CXX. A wheel needs none."
            ) from None
        if not works:
            raise BuildError(
                f"the C++ compiler {name!r} builds no C++17. Say by CXX which one does: GCC since "
                "8, Clang since 7."
            )

    def _openmp_flags(self) -> list[str]:
        """``-fopenmp`` where the toolchain takes it; without it the CPU kernels use one thread."""
        program = "#include <omp.h>\nint main() { return omp_get_max_threads() < 1; }\n"
        return ["-fopenmp"] if self._compiles(program, ["-fopenmp"]) else []

    def _compiles(self, program: str, flags: list[str]) -> bool:
        """Whether the toolchain makes a program with these flags."""
        with tempfile.TemporaryDirectory() as folder:
            source = Path(folder) / "probe.cpp"
            source.write_text(program)
            command = [*self.compiler.compiler_cxx, *flags, str(source)]
            done = subprocess.run(
                [*command, "-o", str(source.with_suffix(""))], capture_output=True
            )
        return done.returncode == 0

    def _run(self, command: list[str]) -> None:
        self.announce(" ".join(command), level=2)
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        sys.stdout.write(done.stdout)
        if done.returncode != 0:
            raise BuildError(
                f"nvcc failed ({done.returncode}): {' '.join(command)}\n{done.stdout}\n"
                "AMALGAM_CUDA=0 builds without CUDA"
            )


def _supported_archs(nvcc: str) -> set[str]:
    listing = subprocess.run([nvcc, "--list-gpu-code"], capture_output=True, text=True)
    if listing.returncode != 0:
        raise BuildError(
            f"{nvcc} --list-gpu-code failed: {listing.stderr.strip()}. "
            "AMALGAM_CUDA=0 builds without CUDA"
        )
    return set(re.findall(r"^sm_(\d+)$", listing.stdout, re.MULTILINE))


def packages() -> list[str]:
    """All packages; ``kernels/`` is amalgam.kernels, never a top-level name."""
    found = find_packages(str(ROOT), include=["amalgam", "amalgam.*"])
    return sorted({*found, "amalgam.kernels"})


def arguments() -> dict[str, Any]:
    """What pyproject.toml can't say."""
    sources = [*CSRC.glob("*.cpp"), *CSRC.glob("cpu/*.cpp"), *CSRC.glob("cuda/*.cpp")]
    sources += CSRC.glob("cuda/*.cu")
    return {
        "packages": packages(),
        "package_dir": {"amalgam.kernels": "kernels"},
        "ext_modules": [
            Extension(
                "amalgam._core",
                sources=sorted(str(source) for source in sources),
                depends=sorted(str(header) for header in CSRC.glob("**/*.*h")),
                language="c++",
            )
        ],
        "cmdclass": {
            "build_ext": BuildCore,
            "build_py": BuildPython,
            "sdist": SourceDistribution,
        },
    }


if __name__ == "__main__":
    os.chdir(ROOT)
    setup(**arguments())
