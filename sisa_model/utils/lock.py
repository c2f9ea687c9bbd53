"""One writer a folder, on one machine or several that share a disk."""

import contextlib
import errno
import json
import logging
import os
import socket
import threading
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

log = logging.getLogger(__name__)

LOCK = ".writer"
REFRESHED = 10.0  # seconds between two signs of life
LOST = 120.0  # seconds without one, after which a writer of another machine is taken for dead


@contextlib.contextmanager
def only_writer(folder: Path) -> Iterator[None]:
    """Be the only one to write into ``folder``, which is there, as long as the block runs.

    Raises BlockingIOError at once, naming who does, if somebody else is. What a dead process left
    behind is taken over: of this machine at once, of another one after 120 s without a sign of
    life, for which the file FOLDER/.writer is touched every 10 s."""
    path = folder / LOCK
    mine = {
        "host": _host(),
        "pid": os.getpid(),
        "begun": _begun(os.getpid()),
        "id": str(uuid.uuid4()),
    }
    while not _create(path, mine):
        holder = _read(path)
        if holder is not None and _is_alive(path, holder):
            raise BlockingIOError(
                errno.EAGAIN,
                f"process {holder['pid']} on {holder['host'].split()[0]} is writing here; "
                "let it finish, or stop it",
                str(folder),
            )
        _take_away(path, holder)
    ended = threading.Event()
    heart = threading.Thread(target=_beat, args=(path, ended), daemon=True)
    heart.start()
    try:
        yield
    finally:
        ended.set()
        heart.join()
        if _read(path) == mine:
            path.unlink(missing_ok=True)


def _create(path: Path, record: dict[str, Any]) -> bool:
    """Make the file with its content at once; False if there is one."""
    text = json.dumps(record)
    aside = path.with_name(f"{LOCK}.{record['id']}")
    aside.write_text(text, encoding="utf-8")
    try:
        os.link(aside, path)  # unlike a rename, it never replaces
    except FileExistsError:
        return False
    except OSError:  # a disk without links
        try:
            with open(path, "x", encoding="utf-8") as file:
                file.write(text)
        except FileExistsError:
            return False
    finally:
        aside.unlink()
    return True


def _read(path: Path) -> dict[str, Any] | None:
    """The record of who holds ``path``; None where there is none, or none that can be read."""
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        return record if record.keys() >= {"host", "pid", "begun", "id"} else None
    except (OSError, ValueError, AttributeError):
        return None


def _is_alive(path: Path, holder: dict[str, Any]) -> bool:
    if holder["host"] == _host():
        return _begun(holder["pid"]) == holder["begun"]
    probe = path.with_name(f"{LOCK}.{uuid.uuid4()}")
    try:
        probe.touch()  # the disk's clock, which is not this machine's
        return probe.stat().st_mtime - path.stat().st_mtime < LOST
    except FileNotFoundError:
        return False
    finally:
        probe.unlink(missing_ok=True)


def _take_away(path: Path, holder: dict[str, Any] | None) -> None:
    """Remove the file of a dead ``holder``, but not that of one who was quicker to replace it."""
    aside = path.with_name(f"{LOCK}.{uuid.uuid4()}")
    with contextlib.suppress(FileNotFoundError):
        os.rename(path, aside)
        if _read(aside) != holder:
            with contextlib.suppress(FileExistsError):
                os.link(aside, path)
        aside.unlink()


def _beat(path: Path, ended: threading.Event) -> None:
    while not ended.wait(REFRESHED):
        try:
            os.utime(path)
        except OSError as error:
            log.warning(f"{path} can no longer be kept: {error}")
            return


def _host() -> str:
    """This machine and, where there are several, its process numbers' space."""
    try:
        space = os.readlink("/proc/self/ns/pid")
    except OSError:
        space = ""
    return f"{socket.gethostname()} {space}"


def _begun(pid: int) -> str:
    """When process ``pid`` of this machine began, "" if there is none; known numbers come again."""
    try:
        after_name = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return "" if after_name[0] == "Z" else after_name[19]
    except FileNotFoundError:
        pass
    if os.path.isdir("/proc/self"):
        return ""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return ""
    except PermissionError:
        pass
    return "running"
