"""Files that appear whole, and the lock of a folder."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from amalgam import files

pytestmark = pytest.mark.skipif(files.fcntl is None, reason="needs flock, which Windows lacks")

HOLDER = """
import sys, time
from amalgam import files
with files.locked(sys.argv[1]):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def holder(tmp_path: Path):
    """Another process that holds the folder."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(tmp_path)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()


def test_one_process_at_a_time_has_a_folder(holder, tmp_path) -> None:
    with (
        pytest.raises(BlockingIOError, match=rf"is in use by process {holder.pid} on .*; wait"),
        files.locked(tmp_path),
    ):
        pass
    (tmp_path / ".x.1.part").touch()
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    assert (tmp_path / files.LOCK).exists()
    with files.locked(tmp_path):  # of the dead one
        assert f"process {os.getpid()} " in (tmp_path / files.LOCK).read_text()
        files.clear_leftovers(tmp_path)
        with files.locked(tmp_path / "."):  # within one process, any number
            pass
        assert (tmp_path / files.LOCK).exists()
    assert not list(tmp_path.iterdir())


def test_without_locks_a_warning_says_so(tmp_path, monkeypatch) -> None:
    def none(*_: object) -> None:
        raise OSError(37, "No locks available")

    monkeypatch.setattr(files.fcntl, "flock", none)
    with pytest.warns(UserWarning, match="can't be locked .*No locks"), files.locked(tmp_path):
        pass


def test_leftovers_of_every_folder_go(tmp_path) -> None:
    for name in (".a.1.part", "plots/.b.png.22.part", "replicate-0/.s.3.part"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "kept.part").touch()
    files.clear_leftovers(tmp_path)
    assert [p.name for p in tmp_path.rglob("*") if p.is_file()] == ["kept.part"]


@pytest.mark.parametrize("path", ["/dev/null", "folder"])
def test_what_is_no_regular_file_is_not_replaced(path, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("folder").mkdir()
    with pytest.raises(ValueError, match="is no regular file"), files.whole(path) as beside:
        beside.write_text("x")
    assert not Path(path).is_file()
    assert [p.name for p in tmp_path.iterdir()] == ["folder"]


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="needs /proc")
def test_the_folder_is_synced_after_the_file(tmp_path, monkeypatch) -> None:
    """Or a power cut could take back the name of a file that others rely on."""
    synced: list[str] = []
    sync = os.fsync

    def note(descriptor: int) -> None:
        synced.append(Path(f"/proc/self/fd/{descriptor}").resolve().name)
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", note)
    with files.whole(tmp_path / "a") as beside:
        beside.write_text("x")
    assert synced == [f".a.{os.getpid()}.part", tmp_path.name]
