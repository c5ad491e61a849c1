"""Children die with their parent, stop when it is asked to stop, and take their siblings with them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from dpo_cache.errors import DpoCacheError
from dpo_cache.stages.child_processes import run_children


def python(code: str) -> list[str]:
    return [sys.executable, "-c", code]


def is_alive(pid: int) -> bool:
    try:
        return "Z" not in Path(f"/proc/{pid}/stat").read_text().split()[2]
    except FileNotFoundError:
        return False


def wait_for(path: Path) -> str:
    for _ in range(200):
        if path.exists() and path.read_text():
            return path.read_text()
        time.sleep(0.05)
    raise AssertionError(f"{path} did not appear")


def test_children_that_end_well_are_waited_for(tmp_path: Path) -> None:
    commands = [python(f"open({str(tmp_path / name)!r}, 'w').write('x')") for name in "ab"]
    run_children(commands, [{}, {}])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b"]


def test_a_child_that_fails_stops_its_siblings_and_its_message_is_raised_once(tmp_path: Path) -> None:
    fails = python("import os, sys; open(os.environ['DPO_CACHE_FAULT_FILE'], 'w').write('Error: no'); sys.exit(1)")
    waits = python(f"import os, time; open({str(tmp_path / 'pid')!r}, 'w').write(str(os.getpid())); time.sleep(60)")
    with pytest.raises(DpoCacheError, match=r"^no$"):
        run_children([waits, fails, fails], [{}, {}, {}])
    pid = tmp_path / "pid"
    assert not pid.exists() or not is_alive(int(pid.read_text() or 0))


def test_a_child_killed_from_outside_is_named_by_its_signal() -> None:
    with pytest.raises(DpoCacheError, match="SIGKILL"):
        run_children([python("import os, signal; os.kill(os.getpid(), signal.SIGKILL)")], [{}])


PARENT = """
import sys
from pathlib import Path
from dpo_cache.stages.child_processes import run_children
code = "import os, time; from dpo_cache.stages.child_processes import die_with_parent; die_with_parent();" \\
       "open({path!r}, 'w').write(str(os.getpid())); time.sleep(60)"
run_children([[sys.executable, "-c", code]], [{{}}])
"""


@pytest.mark.parametrize("signum", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_no_child_outlives_its_parent(tmp_path: Path, signum: signal.Signals) -> None:
    pid_file = tmp_path / "pid"
    parent = subprocess.Popen(python(PARENT.format(path=str(pid_file))), env={**os.environ}, stderr=subprocess.DEVNULL)
    child = int(wait_for(pid_file))
    parent.send_signal(signum)
    parent.wait(timeout=40)
    for _ in range(100):
        if not is_alive(child):
            return
        time.sleep(0.05)
    raise AssertionError("the child is still there")
