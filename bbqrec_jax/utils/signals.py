"""SIGTERM and Ctrl-C: raised immediately where work can be repeated, deferred to the end of a training step."""

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

  Not a subclass of `Exception`, so that no library catches it and continues.

  Attributes:
    signum: the signal.
  """

  def __init__(self, signum: int):
    super().__init__(signal.Signals(signum).name)
    self.signum = signum


@contextlib.contextmanager
def immediate_signals() -> Iterator[None]:
  """Raises `Interrupted` in the main thread at the first SIGTERM or Ctrl-C.

  A second Ctrl-C raises `KeyboardInterrupt`. Must be entered by the main thread. May be nested with itself and with
  `deferred_signals`: the innermost applies.
  """
  if processes.several():
    yield  # One of several processes must not stop alone: the others would wait for it in a collective.
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
    except BaseException:  # A library may have replaced `Interrupted` by an error of its own,
      if not heard:
        raise
    if heard:  # and Python ignores exceptions raised in a finaliser.
      raise Interrupted(heard[0])


@contextlib.contextmanager
def deferred_signals() -> Iterator[list[int]]:
  """Yields a list that SIGTERM and Ctrl-C are appended to; a second Ctrl-C raises `KeyboardInterrupt`.

  Otherwise as `immediate_signals`. With several processes JAX handles SIGTERM (see `processes.told_to_stop`), and
  Ctrl-C is passed on to it as SIGTERM; the list stays empty.
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
  """Raises `KeyboardInterrupt` at a second Ctrl-C, but not at a second SIGTERM: schedulers may repeat that."""
  if signum == signal.SIGINT:
    raise KeyboardInterrupt


@contextlib.contextmanager
def _handled(handler: Callable[[int, Any], None], numbers: tuple[int, ...] = _SIGNALS) -> Iterator[None]:
  """Installs a handler for signals, and restores the previous ones afterwards."""
  previous = {number: signal.signal(number, handler) for number in numbers}
  try:
    yield
  finally:
    for number, before in previous.items():
      signal.signal(number, before)


@contextlib.contextmanager
def exit_on_second_interrupt() -> Iterator[None]:
  """Exits the process, from a separate thread, at a Ctrl-C that follows another signal; for programs.

  Python's handlers run in the main thread, which is blocked while XLA compiles or computes.
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
