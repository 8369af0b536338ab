"""Why a process of a run ends when another is lost: one line, in place of the twenty that JAX's libraries log.

JAX's client of the coordination service ends the process (SIGABRT) from a thread that Python neither hears of nor can
keep from it. So what is written to standard error goes through another small process, which is still there afterwards:

    python -I last_words.py SECONDS < what the libraries wrote

passes on everything else as it comes. It imports nothing of the project, to be there at once.
"""

import re
import sys
from collections.abc import Iterable, Iterator

_LOGGED = re.compile(r"[IWEF]\d{4} [\d:.]+ +\d+ ([\w.]+):\d+\] ")
# The files of JAX's libraries that tell of other processes.
_TELL = re.compile(r"client\.(?:h|cc)|service\.cc|coordination_\w+\.cc|preemption_\w+\.cc")
_ENDS = "Terminating process because the JAX distributed service detected fatal errors"


def reason(logged: str, seconds: int) -> str:
  """The line that stands for what the libraries logged when they ended the process.

  Args:
    logged: all of it.
    seconds: without a sign of life after which a process counts as lost.
  """
  silent = re.search(r"stopped sending heartbeats\):(.*?)The tasks have crashed", logged, re.DOTALL)
  early = re.search(r"Shutdown barrier has failed.*?first task at the barrier: \D*(\d+)\. ", logged, re.DOTALL)
  names = sorted({int(number) for number in re.findall(r"(\d+)\s*$", silent[1], re.MULTILINE)}) if silent else []
  if names:
    which = f"process{'es' * (len(names) > 1)} {', '.join(map(str, names))} of this run gave no sign of life for"
    what = f"{which} {seconds} s"
  elif early:
    what = f"process {early[1]} of this run has ended by itself and waited for the others in vain: see what it says"
  else:  # All signs of life go through the first.
    what = f"process 0 of this run cannot be reached any more (it is given {seconds} s to answer)"
  return f"error: {what}; start all processes again, and the same command goes on from the last checkpoint\n"


def passed_on(lines: Iterable[str], seconds: int) -> Iterator[str]:
  """What is to be shown of what a process writes to standard error.

  Args:
    lines: as they come.
    seconds: see `reason`.

  Yields:
    Every line that is not of the coordination service, at once; at the end the reason, if that ended the process, and
    otherwise what was held back.
  """
  held: list[str] = []
  telling = False
  for line in lines:
    beginning = _LOGGED.match(line)
    if beginning:
      telling = bool(_TELL.fullmatch(beginning[1]))
    if telling:  # Its messages have several lines, of which only the first says so.
      held.append(line)
    else:
      yield line
  logged = "".join(held)
  yield reason(logged, seconds) if _ENDS in logged else logged


if __name__ == "__main__":
  with open(0, encoding="utf-8", errors="backslashreplace") as written:
    for shown in passed_on(written, int(sys.argv[1])):
      sys.stderr.write(shown)
      sys.stderr.flush()
