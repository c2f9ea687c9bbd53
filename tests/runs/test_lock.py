"""One writer a folder: the second refused, the dead passed over, of this machine and of others."""

import errno
import json
import os
import signal
import subprocess
import sys
import time

import pytest

from sisa_model.utils import lock
from sisa_model.utils.lock import LOCK, only_writer

HOLD = """
import sys, time
from pathlib import Path
from sisa_model.utils.lock import only_writer
with only_writer(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(600)
"""


@pytest.fixture
def holder(tmp_path):
    """A process that writes into tmp_path."""
    process = subprocess.Popen([sys.executable, "-c", HOLD, tmp_path], stdout=subprocess.PIPE)
    assert process.stdout.readline() == b"held\n"
    yield process
    process.kill()
    process.wait()


def test_a_second_writer_is_refused_at_once_with_who_holds_it(tmp_path, holder):
    begun = time.monotonic()
    refused = pytest.raises(BlockingIOError, match=rf"process {holder.pid} on .* is writing here")
    with refused, only_writer(tmp_path):
        pytest.fail("two writers")
    assert time.monotonic() - begun < 5
    assert holder.poll() is None


def test_a_killed_writer_blocks_nobody(tmp_path, holder):
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    assert (tmp_path / LOCK).exists()
    with only_writer(tmp_path):
        assert json.loads((tmp_path / LOCK).read_text())["pid"] == os.getpid()
    assert list(tmp_path.iterdir()) == []


def test_a_process_number_that_came_again_is_another_process(tmp_path):
    with only_writer(tmp_path):
        record = json.loads((tmp_path / LOCK).read_text())
    (tmp_path / LOCK).write_text(json.dumps({**record, "begun": "12"}))
    with only_writer(tmp_path):
        pass


@pytest.mark.parametrize(("silent", "free"), [(5.0, False), (lock.LOST + 5, True)])
def test_another_machines_writer_lives_by_its_signs_of_life(tmp_path, silent, free):
    record = {"host": "elsewhere pid:[1]", "pid": 1, "begun": "1", "id": "x"}
    (tmp_path / LOCK).write_text(json.dumps(record))
    touched = time.time() - silent
    os.utime(tmp_path / LOCK, (touched, touched))
    if free:
        with only_writer(tmp_path):
            pass
        return
    refused = pytest.raises(BlockingIOError, match="process 1 on elsewhere is writing here")
    with refused, only_writer(tmp_path):
        pytest.fail("two writers")
    assert [path.name for path in tmp_path.iterdir()] == [LOCK]


def test_a_writer_gives_signs_of_life(tmp_path, monkeypatch):
    monkeypatch.setattr(lock, "REFRESHED", 0.02)
    with only_writer(tmp_path):
        os.utime(tmp_path / LOCK, (0, 0))
        deadline = time.monotonic() + 20
        while (tmp_path / LOCK).stat().st_mtime == 0 and time.monotonic() < deadline:
            time.sleep(0.02)
        assert (tmp_path / LOCK).stat().st_mtime > 0


@pytest.mark.parametrize("content", ["", "{", "[]", '{"host": "x"}'])
def test_what_is_no_record_blocks_nobody(tmp_path, content):
    (tmp_path / LOCK).write_text(content)
    with only_writer(tmp_path):
        pass
    assert not (tmp_path / LOCK).exists()


def test_who_takes_a_dead_ones_place_first_keeps_it(tmp_path):
    dead = {"host": "x", "pid": 1, "begun": "1", "id": "dead"}
    quick = {"host": "y", "pid": 2, "begun": "2", "id": "quick"}
    (tmp_path / LOCK).write_text(json.dumps(quick))
    lock._take_away(tmp_path / LOCK, dead)
    assert json.loads((tmp_path / LOCK).read_text()) == quick
    lock._take_away(tmp_path / LOCK, quick)
    assert list(tmp_path.iterdir()) == []


def test_a_block_that_fails_lets_go(tmp_path):
    with pytest.raises(ValueError, match="inside"), only_writer(tmp_path):
        raise ValueError("inside")
    assert list(tmp_path.iterdir()) == []


def test_a_disk_without_links(tmp_path, monkeypatch):
    def link(*args):
        raise OSError(errno.EPERM, "no links here")

    monkeypatch.setattr(lock.os, "link", link)
    with only_writer(tmp_path):
        assert json.loads((tmp_path / LOCK).read_text())["pid"] == os.getpid()
        with pytest.raises(BlockingIOError), only_writer(tmp_path):
            pytest.fail("two writers")
    assert list(tmp_path.iterdir()) == []
