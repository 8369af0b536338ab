"""SIGTERM and Ctrl-C: heard at once where nothing is lost by it, noted for later where a step is underway."""

import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterator
from typing import Any

from bbqrec_jax.utils import processes

_SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Interrupted(BaseException):
  """A signal asked the run to stop, and everything is saved.

  No `Exception`, so that no library takes it for an error of its own and goes on.

  Attributes:
    signum: the signal.
  """

  def __init__(self, signum: int):
    super().__init__(signal.Signals(signum).name)
    self.signum = signum


@contextlib.contextmanager
def heard_at_once() -> Iterator[None]:
  """Raises `Interrupted` wherever the first SIGTERM or Ctrl-C finds the main thread.

  A second Ctrl-C raises `KeyboardInterrupt`. Must be entered by the main thread. May be nested with itself and with
  `noted`: the innermost counts.
  """
  if processes.several():
    yield  # One of several processes alone must not leave the work that they share.
    return
  heard: list[int] = []

  def hear(signum: int, _frame: Any) -> None:
    heard.append(signum)
    if len(heard) == 1:
      raise Interrupted(signum)
    _refuse_to_wait(signum)

  with _handled(hear):
    try:
      yield
    except KeyboardInterrupt:
      raise
    except BaseException:  # A library may have made another error of it,
      if not heard:
        raise
    if heard:  # and Python drops what is raised in a finaliser.
      raise Interrupted(heard[0])


@contextlib.contextmanager
def noted() -> Iterator[list[int]]:
  """Gives a list of the signals that came since, SIGTERM or Ctrl-C; a second Ctrl-C raises `KeyboardInterrupt`.

  As `heard_at_once` in all else. Where there are several processes, JAX itself notes SIGTERM (see
  `processes.told_to_stop`), and gets Ctrl-C as one; the list stays empty.
  """
  caught: list[int] = []

  def note(signum: int, _frame: Any) -> None:
    caught.append(signum)
    if len(caught) > 1:
      _refuse_to_wait(signum)

  passed: list[int] = []

  def pass_on(signum: int, _frame: Any) -> None:
    passed.append(signum)
    if len(passed) > 1:
      raise KeyboardInterrupt
    os.kill(os.getpid(), signal.SIGTERM)

  with _handled(pass_on, (signal.SIGINT,)) if processes.several() else _handled(note):
    yield caught


def _refuse_to_wait(signum: int) -> None:
  """Schedulers may send SIGTERM again and again; whoever presses Ctrl-C once more means it."""
  if signum == signal.SIGINT:
    raise KeyboardInterrupt


@contextlib.contextmanager
def _handled(handler: Callable[[int, Any], None], numbers: tuple[int, ...] = _SIGNALS) -> Iterator[None]:
  """Handles signals; what handled them before does so again afterwards."""
  previous = {number: signal.signal(number, handler) for number in numbers}
  try:
    yield
  finally:
    for number, before in previous.items():
      signal.signal(number, before)


@contextlib.contextmanager
def impatient() -> Iterator[None]:
  """Ends the process at a Ctrl-C that follows another signal, from a thread of its own; for programs.

  Python's handlers wait for the main thread, which hears nothing while XLA compiles or computes.
  """
  reader, writer = os.pipe()
  os.set_blocking(writer, False)
  before = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)

  def watch() -> None:
    first = True
    while number := os.read(reader, 1):
      if number[0] == signal.SIGINT and not first:
        with contextlib.suppress(OSError):
          os.write(2, b"stopped at once; the same command goes on from the last checkpoint\n")
        os._exit(128 + signal.SIGINT)
      first = first and number[0] not in _SIGNALS

  thread = threading.Thread(target=watch, name="second Ctrl-C", daemon=True)
  thread.start()
  try:
    yield
  finally:
    signal.set_wakeup_fd(before)
    os.close(writer)  # The thread reads to the end and is done.
    thread.join()
    os.close(reader)
