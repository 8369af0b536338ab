"""One line stands for what JAX's libraries log of a lost process; all else is passed on as it comes."""

import os
import signal
import subprocess
import sys

import pytest

from bbqrec_jax.utils import last_words

SILENT = """\
E1201 03:28:23.768583   10567 coordination_service.cc:1549] [632] Use error polling to propagate the following error:
2
The tasks have crashed. Check the task logs for an earlier error, or scheduler events to debug further.
E1201 03:28:23.769000   10578 coordination_service_agent.cc:289] Polled an error from coordination service.
F1201 03:28:23.769129   10578 client.h:80] Terminating process because the JAX distributed service detected fatal \
errors. This most likely indicates that another task died. absl::Status: UNAVAILABLE: The following tasks are \
unhealthy (stopped sending heartbeats):
{}
The tasks have crashed. Check the task logs for an earlier error, or scheduler events to debug further.

RPC: /xla.coordination.CoordinationService/PollForError
*** Check failure stack trace: ***
    @     0x7f91e0c40634  absl::lts_20260107::log_internal::LogMessage::SendToLog()
    @     0x7f91e80a71f5  (unknown)
"""
UNREACHED = """\
W1201 03:20:52.534533    8626 preemption_sync_manager.cc:147] Failed to retrieve preemption notice: UNAVAILABLE: closed
:UNKNOWN:Error received from peer  {grpc_message:"Socket closed", grpc_status:14}. This is only expected
F1201 03:27:45.700808   10185 client.h:80] Terminating process because the JAX distributed service detected fatal \
errors. absl::Status: DEADLINE_EXCEEDED: Deadline Exceeded

RPC: /xla.coordination.CoordinationService/Heartbeat
*** Check failure stack trace: ***
    @     0x7fcfbc2a71f5  (unknown)
"""
EARLY = """\
E1201 05:02:24.161220   14757 coordination_service.cc:1520] [1688] Shutdown barrier in coordination service has failed:
DEADLINE_EXCEEDED: Barrier timed out. Id: Shutdown::1688::0.
# of tasks that reached the barrier: 1/3.
The first task at the barrier: 1. Some timed out task names:
2
0
F1201 05:02:24.161505   14768 client.h:80] Terminating process because the JAX distributed service detected fatal \
errors. absl::Status: INTERNAL: Shutdown barrier has failed.
# of tasks that reached the barrier: 1/3.
The first task at the barrier: 1. Some timed out task names:
2
0
*** Check failure stack trace: ***
"""
OF_ANOTHER_KIND = "E1201 03:20:52.534533    8626 gpu_timer.cc:12] Too slow\nand more of it\n"
REST = "; start all processes again, and the same command goes on from the last checkpoint\n"


def passed_on(text):
  return list(last_words.passed_on(text.splitlines(keepends=True), 40))


@pytest.mark.parametrize(
  ("names", "said"),
  [
    ("2", "process 2 of this run gave"),
    ("/job:jax_worker/replica:0/task:3", "process 3 of this run gave"),
    ("11\n2", "processes 2, 11 of this run gave"),
  ],
)
def test_silent_processes_are_named_in_one_line(names, said):
  assert passed_on(SILENT.format(names)) == [f"error: {said} no sign of life for 40 s{REST}"]


def test_a_first_process_that_cannot_be_reached_is_named():
  first = "error: process 0 of this run cannot be reached any more (it is given 40 s to answer)"
  assert passed_on(UNREACHED) == [first + REST]


def test_one_that_ended_by_itself_is_named():
  what = "process 1 of this run has ended by itself and waited for the others in vain: see what it says"
  assert passed_on(EARLY) == [f"error: {what}{REST}"]


def test_everything_else_is_passed_on():
  assert "".join(passed_on(f"warning: x\n{OF_ANOTHER_KIND}")) == f"warning: x\n{OF_ANOTHER_KIND}"
  shown = passed_on(f"warning: x\n{SILENT.format(2)[:500]}\n{OF_ANOTHER_KIND}{UNREACHED}")
  assert "".join(shown[:-1]) == f"warning: x\n{OF_ANOTHER_KIND}"
  assert shown[-1].startswith("error: process 0 ")
  # Nothing is lost of what did not end the process.
  harmless = UNREACHED[: UNREACHED.index("F1201")]
  assert "".join(passed_on(f"{harmless}{OF_ANOTHER_KIND}")) == f"{OF_ANOTHER_KIND}{harmless}"


ENDS = f"""
import os, signal, sys
from bbqrec_jax.utils import processes
processes._tell_in_one_line()
print("warning: still here", file=sys.stderr, flush=True)
os.kill(0, signal.SIGINT) if sys.argv[1:] else None
os.write(2, {UNREACHED!r}.encode())
os.abort()
"""


@pytest.mark.parametrize("interrupted", [False, True])
def test_the_line_comes_after_the_process_has_ended_and_outlives_a_signal_to_its_group(interrupted):
  code = "import signal; signal.signal(signal.SIGINT, lambda *_: None)" + ENDS
  ended = subprocess.run(
    [sys.executable, "-c", code, *["x"] * interrupted], capture_output=True, text=True, check=False,
    env=os.environ | {"JAX_PLATFORMS": "cpu"}, start_new_session=True,
  )  # fmt: skip
  assert ended.returncode == -signal.SIGABRT
  assert ended.stderr.splitlines() == ["warning: still here", *passed_on(UNREACHED)[0].splitlines()]
  assert ended.stdout == ""
