"""A GPU that is not there: Triton compiles for it what a real one would, and nothing is launched.

Arguments are specialised, and kernels looked up and kept on disk, as on hardware: what is compiled
here, a GPU of the same architecture finds, if Triton is of the same build and its folder of
compiled kernels lies at the same path. Operations of the ``triton`` backend compute what the
reference does. For pytest, ``-p compile_only`` runs the tests marked gpu so, and no others.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

PROCESSORS = 132  # of an H100's and an H200's
SHARED_MEMORY = 232448  # bytes that a program of theirs may have
MOST_COMPUTED = 1 << 24  # coordinates: the reference takes longer than a test may, beyond


@dataclasses.dataclass
class Compilation:
    """A kernel that a launch asked for and that this process did not have.

    Attributes:
        kernel: Its module and name.
        signature: Its arguments' types by name.
        constants: Those that are constants, as text.
        divisible: Arguments that it is compiled to take as multiples of 16.
        options: Warps, stages and so on.
        key: What the process knows it by.
        hash: What the disk knows it by; "" where keys are counted alone.
        seconds: To compile it, or to read it.
        hit: Whether it lay on the disk.
        launcher_seconds: To build or read the C function that launches it.
        test: The test that launched it, or "".
    """

    kernel: str
    signature: dict[str, str]
    constants: dict[str, str]
    divisible: list[str]
    options: dict[str, Any]
    key: str
    hash: str = ""
    seconds: float = 0.0
    hit: bool = False
    launcher_seconds: float = 0.0
    test: str = ""

    def __str__(self) -> str:
        return json.dumps(dataclasses.asdict(self))


compilations: list[Compilation] = []
launches: Counter[str] = Counter()
_test = ""


def dump(path: str | os.PathLike[str]) -> None:
    """Append the compilations to a file, a line of JSON each."""
    with Path(path).open("a") as file:
        file.writelines(f"{compilation}\n" for compilation in compilations)


def install(
    arch: int = 90,
    *,
    compile: bool = True,
    launchers: bool = False,
    results: bool = True,
    redirect: bool = True,
) -> None:
    """Put the GPU in place, until the process ends.

    Args:
        arch: Its compute capability, 90 for an H100 or H200.
        compile: Whether kernels are compiled; where not, their keys are recorded alone.
        launchers: Whether to build, too, what hardware builds by the C compiler beside kernels.
        results: Whether operations return what the reference computes; otherwise, memory as it is.
        redirect: Whether "cuda" in calls of PyTorch means the CPU.
    """
    from triton import knobs
    from triton.runtime import driver

    if torch.version.cuda is None:  # of a build without CUDA; with it, kernels may hold PTX
        torch.version.cuda = "13.0"
    driver.set_active(_Driver(arch, _real_launcher() if launchers else None))
    knobs.runtime.jit_cache_hook = functools.partial(_record, compile)
    knobs.compilation.listener = _complete
    _let_triton_compute(results)
    if redirect:
        _redirect()


def fingerprint() -> dict[str, Any]:
    """The part of a compiled kernel's key on disk that must agree with the hardware's."""
    import triton
    from triton._C.libtriton import get_cache_invalidating_env_vars
    from triton.backends.compiler import GPUTarget
    from triton.compiler.compiler import make_backend
    from triton.runtime import driver
    from triton.runtime.cache import triton_key

    from amalgam.kernels.launch import on_nvidia

    target = driver.active.get_current_target()
    backend = make_backend(GPUTarget(target.backend, target.arch, target.warp_size))
    options = backend.parse_options({})
    return {
        "triton": triton.__version__,
        "triton_key": hashlib.sha256(triton_key().encode()).hexdigest(),
        "backend": hashlib.sha256(backend.hash().encode()).hexdigest(),
        "options": options.hash(),
        "variables": get_cache_invalidating_env_vars(),
        "target": str(target),
        "folder": os.path.relpath(triton.knobs.cache.dir, tempfile.gettempdir()),
        "torch": torch.__version__,
        "ptx": on_nvidia(),
    }


# --- Triton's driver ---


class _Utils:
    def load_binary(self, *_: Any) -> tuple[int, ...]:
        return 0, 1, 0, 0, 1024

    def unload_module(self, *_: Any) -> None:
        pass

    def get_device_properties(self, _device: int) -> dict[str, int]:
        return {"max_shared_mem": SHARED_MEMORY, "multiprocessor_count": PROCESSORS}


class _Driver:
    """The part of Triton's driver that compiling and launching call."""

    utils = _Utils()

    def __init__(self, arch: int, real: Callable[[Any, Any], Any] | None) -> None:
        self.arch = arch
        self.launcher_cls = functools.partial(_Launcher, real)

    def get_current_device(self) -> int:
        return 0

    def set_current_device(self, _device: int) -> None:
        pass

    def get_current_stream(self, _device: int) -> int:
        return 0

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", self.arch, 32)

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")


class _Launcher:
    def __init__(self, real: Callable[[Any, Any], Any] | None, source: Any, metadata: Any) -> None:
        self.name = metadata.name
        if real is not None:
            start = time.perf_counter()
            real(source, metadata)
            compilations[-1].launcher_seconds = time.perf_counter() - start

    def __call__(self, *_: Any) -> None:
        launches[self.name] += 1


def _real_launcher() -> Callable[[Any, Any], Any]:
    """The class that builds what launches a kernel on hardware; its helpers are built at once.

    They are linked to the GPU driver's library by name alone: one without code does.
    """
    import ctypes

    from triton import knobs
    from triton.backends.nvidia import driver

    sources = "".join(path.read_text() for path in Path(driver.__file__).parent.glob("*.[cp]*"))
    names = sorted(set(re.findall(r"\bcu[A-Z]\w*", sources)))
    folder = Path(tempfile.mkdtemp(prefix="no-cuda-"))
    code, library = folder / "cuda.c", folder / "libcuda.so.1"
    code.write_text("".join(f"int {name}(void) {{ return 0; }}\n" for name in names))
    command = [os.environ.get("CC", "gcc"), "-shared", "-fPIC", "-w", f"-Wl,-soname,{library.name}"]
    subprocess.run([*command, str(code), "-o", str(library)], check=True)
    ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)
    knobs.nvidia.libcuda_path = str(folder)
    driver.CudaUtils()
    return driver.CudaLauncher


# --- The record ---


def _record(
    compiled: bool, *, key: str, fn: Any, compile: dict[str, Any], **_: Any
) -> bool:  # a hook of Triton's: whether not to compile
    function = fn.jit_function
    kernel = f"{fn.module}.{function.__name__}"
    if compiled or not any((kernel, key) == (each.kernel, each.key) for each in compilations):
        names = function.arg_names
        options = ("num_warps", "num_ctas", "num_stages", "enable_fp_fusion")
        compilations.append(
            Compilation(
                kernel,
                dict(compile["signature"]),
                {names[path[0]]: str(value) for path, value in compile["constants"].items()},
                [names[path[0]] for path in compile["configs"][0]],
                {name: compile[name] for name in options},
                key,
                test=_test,
            )
        )
    return not compiled


def _complete(*, metadata: dict[str, Any], times: Any, cache_hit: bool, **_: Any) -> None:
    latest = compilations[-1]
    latest.hash, latest.hit, latest.seconds = metadata["hash"], cache_hit, times.total / 1e6


# --- The package and PyTorch ---


def _let_triton_compute(results: bool) -> None:
    """Have the ``triton`` backend work on the CPU's tensors, and "auto" prefer it."""
    import amalgam.kernels.choice_step
    import amalgam.kernels.student_step
    from amalgam.backends import triton
    from amalgam.operations import registry

    backend, reference = triton.backend, registry.reference
    changes = {"devices": frozenset({"cuda", "cpu"}), "probe": lambda: None, "rank": 100}
    for name, value in changes.items():
        object.__setattr__(backend, name, value)
    for module in (amalgam.kernels.choice_step, amalgam.kernels.student_step):
        module.processors = lambda _device: PROCESSORS  # type: ignore[attr-defined]
    if results:
        for operation, entry in backend.kernels.items():
            theirs = reference.kernels[operation].function
            computed = functools.partial(_launched_and_computed, entry.function, theirs)
            backend.kernels[operation] = dataclasses.replace(entry, function=computed)


def _launched_and_computed(
    ours: Callable[..., Any], theirs: Callable[..., Any], *args: Any, **numerics: Any
) -> Any:
    # The kernel wrote nothing sensible into what it reads and writes: put the old values back.
    read = args[1] if ours.__name__.endswith("backward_into") else ()
    before = [tensor.clone() for tensor in read]
    nothing = ours(*args, **numerics)
    if _coordinates(args) > MOST_COMPUTED:
        return nothing
    for tensor, value in zip(read, before, strict=True):
        tensor.copy_(value)
    return theirs(*args)


def _coordinates(arguments: Any) -> int:
    """Of the operation: those of its first tensor."""
    from amalgam.operations.student_step_in_place import InPlaceStep
    from amalgam.operations.teacher_distance import DistanceArguments

    first = arguments[0]
    if isinstance(first, InPlaceStep):
        first = first.tensors.params
    if isinstance(first, DistanceArguments):
        first = first.students
    return first.numel() if isinstance(first, Tensor) else sum(each.numel() for each in first)


class _CPUForCUDA(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.cuda:
            return args[0]
        kwargs = {name: _at_home(value) for name, value in (kwargs or {}).items()}
        return func(*map(_at_home, args), **kwargs)


def _at_home(value: Any) -> Any:
    if isinstance(value, (str, torch.device)) and str(value).startswith("cuda"):
        return "cpu" if isinstance(value, str) else torch.device("cpu")
    return value


_mode = _CPUForCUDA()  # kept: it stays entered


def _redirect() -> None:
    cuda: Any = torch.cuda
    cuda.synchronize = lambda *_: None
    cuda.empty_cache = lambda: None
    cuda.mem_get_info = lambda *_: (0, 0)
    cuda.get_rng_state = torch.get_rng_state
    for name in ("current_device", "memory_allocated", "memory_reserved"):
        setattr(cuda, name, lambda *_: 0)
    cuda.stream = cuda.graph = lambda *_, **__: contextlib.nullcontext()
    for name in ("Stream", "CUDAGraph", "Event", "current_stream"):
        setattr(cuda, name, MagicMock())
    _mode.__enter__()


# --- For pytest ---


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("compile_only")
    group.addoption("--keys-only", action="store_true", help="compile nothing, count what would be")
    group.addoption("--launchers", action="store_true", help="build launchers too")
    group.addoption("--compilations", help="a file to append compilations to, as lines of JSON")


def pytest_configure(config: pytest.Config) -> None:
    keys_only, launchers = config.getoption("--keys-only"), config.getoption("--launchers")
    install(compile=not keys_only, launchers=launchers)


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    others = [item for item in items if not item.get_closest_marker("gpu")]
    config.hook.pytest_deselected(items=others)
    items[:] = [item for item in items if item.get_closest_marker("gpu")]
    from amalgam.meta.trainer import NothingLearned

    # Of a graph, which replays nothing, and of kernels, which leave what was there.
    wrong = (AssertionError, NothingLearned, pytest.fail.Exception)
    for item in items:
        item.own_markers = [mark for mark in item.own_markers if mark.name != "skip"]
        item.add_marker(pytest.mark.xfail(raises=wrong, strict=False, reason="nothing is launched"))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    global _test
    _test = item.nodeid
    result = yield
    _test = ""
    return result


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    if path := config.getoption("--compilations"):
        dump(path)
    terminalreporter.section("compilations")
    for kernel, count in sorted(Counter(each.kernel for each in compilations).items()):
        terminalreporter.write_line(f"{count:4} {kernel}")
    seconds = sum(each.seconds for each in compilations)
    hits = sum(each.hit for each in compilations)
    terminalreporter.write_line(f"{len(compilations):4} in all, {hits} kept, {seconds:.1f} s")


# pytest knows the plug-in by this name, and tests that import it must see the same lists.
sys.modules.setdefault("compile_only", sys.modules[__name__])
