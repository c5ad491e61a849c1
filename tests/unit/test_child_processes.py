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
from dpo_cache.stages.processes import child_processes
from dpo_cache.stages.processes.child_processes import Job, leave_fault, python_command, run_children, run_jobs

FAILS = """
import sys
from dpo_cache.errors import DpoCacheError
from dpo_cache.stages.processes.child_processes import leave_fault
assert leave_fault(DpoCacheError("no", expected="yes", next_step="say yes"))
sys.exit(1)
"""
NO = "no\n  expected: yes\n  next: say yes"


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
    fails = python(FAILS)
    waits = python(f"import os, time; open({str(tmp_path / 'pid')!r}, 'w').write(str(os.getpid())); time.sleep(60)")
    with pytest.raises(DpoCacheError) as raised:
        run_children([waits, fails, fails], [{}, {}, {}])
    assert raised.value.to_json() == {"found": "no", "expected": "yes", "next_step": "say yes"}
    pid = tmp_path / "pid"
    assert not pid.exists() or not is_alive(int(pid.read_text() or 0))


STOPPED = """
import signal, time
from dpo_cache.errors import DpoCacheError
from dpo_cache.stages.processes.child_processes import leave_fault
def stop(*_):
    leave_fault(DpoCacheError("Stopped."))
    raise SystemExit(1)
signal.signal(signal.SIGTERM, stop)
open({ready!r}, "w").write("x")
time.sleep(60)
"""
KILLED = """
import os, signal, time
while not os.path.exists({ready!r}): time.sleep(0.01)
os.kill(os.getpid(), signal.{signal})
"""
SIGKILL_MESSAGE = (
    "a process of this job ended with SIGKILL, which mostly means that the system ran out of memory; its own output"
)


@pytest.mark.parametrize(
    ("signum", "message"),
    [("SIGKILL", SIGKILL_MESSAGE), ("SIGSEGV", "a process of this job ended with SIGSEGV; its own output")],
)
def test_a_child_killed_from_outside_is_named_and_not_the_siblings_stopped_for_it(
    tmp_path: Path, signum: str, message: str
) -> None:
    ready = str(tmp_path / "ready")
    says_that_it_was_stopped = python(STOPPED.format(ready=ready))
    ends_by_sigterm = python("import time; time.sleep(60)")
    killed = python(KILLED.format(ready=ready, signal=signum))
    with pytest.raises(DpoCacheError) as fault:
        run_children([says_that_it_was_stopped, ends_by_sigterm, killed], [{}, {}, {}])
    assert str(fault.value) == f"{message} is above"


def test_the_child_that_says_why_is_heard_though_one_that_failed_for_it_was_quicker(tmp_path: Path) -> None:
    ended = str(tmp_path / "ended")
    quicker = python(f"import sys; open({ended!r}, 'w').write('x'); sys.exit(1)")
    says_why = python(f"import os, time\nwhile not os.path.exists({ended!r}): time.sleep(0.01)\ntime.sleep(1)\n{FAILS}")
    with pytest.raises(DpoCacheError) as fault:
        run_children([quicker, says_why], [{}, {}])
    assert str(fault.value) == NO


def test_a_child_killed_from_outside_is_named_beside_those_that_failed_for_it() -> None:
    killed = python("import os, signal; os.kill(os.getpid(), signal.SIGKILL)")
    faults = run_children([python(FAILS), python("import sys; sys.exit(1)"), killed], [{}] * 3, survivors_go_on=True)
    assert faults == [f"{SIGKILL_MESSAGE} is above", NO]


PARENT = """
import sys
from pathlib import Path
from dpo_cache.stages.processes.child_processes import run_children
code = "import os, time; from dpo_cache.stages.processes.child_processes import die_with_parent; die_with_parent();" \\
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


STUBBORN = """
import os, signal, time
signal.signal(signal.SIGTERM, lambda *_: os.kill(os.getppid(), signal.SIGINT))
open({pid!r}, "w").write(str(os.getpid()))
os.kill(os.getppid(), signal.SIGINT)
while True: time.sleep(60)
"""


def test_a_second_ctrl_c_kills_the_children_that_have_not_stopped_for_the_first(tmp_path: Path) -> None:
    pid_file = tmp_path / "pid"
    with pytest.raises(KeyboardInterrupt):
        run_children([python(STUBBORN.format(pid=str(pid_file)))], [{}])
    assert not is_alive(int(pid_file.read_text()))


def test_a_fault_whose_parent_has_stopped_listening_is_no_further_fault(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(child_processes.FAULT_FILE, str(tmp_path / "removed" / "fault-0"))
    assert leave_fault(DpoCacheError("Stopped."))


def test_a_fault_that_a_full_disk_keeps_from_the_parent_is_told_by_the_child(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(child_processes.FAULT_FILE, "/dev/full")
    assert not leave_fault(DpoCacheError("No space left on device"))


def test_scripts_in_the_current_folder_are_not_taken_for_modules_of_python(tmp_path: Path) -> None:
    (tmp_path / "tokenize.py").write_text("raise SystemExit('a script of the user')")
    asked = subprocess.run(python_command("--help"), cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (asked.returncode, asked.stderr) == (0, "")


# ---- jobs that have nothing to do with each other ---------------------------------------------------------------


class Journal:
    """What a run of jobs tells, in order."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.events: list[str] = []
        self.faults: dict[str, str | None] = {}

    def run(self, codes: dict[str, str], places: int) -> None:
        jobs = [Job(name=name, command=python(code), log=self.folder / f"{name}.log") for name, code in codes.items()]
        run_jobs(
            jobs,
            [{"PLACE": str(number)} for number in range(places)],
            grace_s=30,
            on_start=lambda job: self.events.append(f"+{job.name}"),
            on_end=self._ended,
        )

    def _ended(self, job: Job, fault: str | None) -> None:
        self.events.append(f"-{job.name}")
        self.faults[job.name] = fault

    def most_at_once(self) -> int:
        running = [
            sum(1 if event[0] == "+" else -1 for event in self.events[: end + 1]) for end in range(len(self.events))
        ]
        return max(running)


SAY_PLACE = "import os, time; print(os.environ['PLACE'], flush=True); time.sleep(0.3)"


@pytest.mark.parametrize("places", [1, 2])
def test_there_are_never_more_jobs_than_places_and_all_get_their_turn(tmp_path: Path, places: int) -> None:
    journal = Journal(tmp_path)
    journal.run({name: SAY_PLACE for name in "abcd"}, places)
    assert [event for event in journal.events if event[0] == "+"] == ["+a", "+b", "+c", "+d"]
    assert journal.most_at_once() == places
    assert journal.faults == dict.fromkeys("abcd")
    said = [(tmp_path / f"{name}.log").read_text().strip() for name in "abcd"]
    assert set(said) == set(map(str, range(places)))
    assert said[:places] == list(map(str, range(places)))


def test_a_job_that_fails_leaves_the_others_alone_and_says_why(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    journal.run({"a": SAY_PLACE, "b": FAILS, "c": "import sys; sys.exit(3)", "d": SAY_PLACE}, 2)
    assert journal.faults["a"] is None
    assert journal.faults["b"] == NO
    assert journal.faults["c"] == f"c ended with exit code 3; its output is in {tmp_path / 'c.log'}"
    assert journal.faults["d"] is None


SAVES_WHEN_ASKED = """
import os, signal, sys, time
def save(*_):
    time.sleep({seconds})
    open({path!r}, "a").write("saved")
    sys.exit(1)
signal.signal(signal.SIGTERM, save)
open({path!r}, "w").write("started ")
{then}
time.sleep(60)
"""


def test_jobs_asked_to_stop_each_get_their_time_to_save_and_no_further_one_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(child_processes, "GRACE_S", 0.1)  # for the siblings of a rank that failed: not for jobs
    paths = [tmp_path / name for name in "ab"]
    both_run = f"while not os.path.exists({str(paths[0])!r}): time.sleep(0.01)"
    codes = {
        "quick": SAVES_WHEN_ASKED.format(seconds=0, path=str(paths[0]), then=""),
        # Asks the parent once both have started, and takes its time itself.
        "slow": SAVES_WHEN_ASKED.format(
            seconds=1,
            path=str(paths[1]),
            then=f"{both_run}\nos.kill(os.getppid(), signal.SIGTERM)",
        ),
        "waiting": SAY_PLACE,
    }
    journal = Journal(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        journal.run(codes, 2)
    assert [path.read_text() for path in paths] == ["started saved"] * 2
    assert journal.events == ["+quick", "+slow", "-quick", "-slow"]
    assert journal.faults == {"quick": None, "slow": None}
