"""Signals: where they are raised immediately, where they are deferred, and that a second Ctrl-C always exits."""

import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from bbqrec_jax.utils.signals import Interrupted, deferred_signals, exit_on_second_interrupt, immediate_signals


@pytest.fixture(autouse=True)
def unchanged_handlers():
  numbers = (signal.SIGTERM, signal.SIGINT)
  before = [signal.getsignal(number) for number in numbers]
  yield
  assert [signal.getsignal(number) for number in numbers] == before
  assert signal.set_wakeup_fd(-1) == -1


def send(signum=signal.SIGTERM):
  os.kill(os.getpid(), signum)


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_is_heard_at_once_or_noted_as_the_innermost_says(signum):
  def work():
    with immediate_signals():
      send(signum)
      pytest.fail("not heard")

  with deferred_signals() as caught:
    with pytest.raises(Interrupted) as stop:
      work()
    assert stop.value.signum == signum
    assert caught == []
    # SIGTERM comes again and again from some schedulers.
    send(signal.SIGTERM)
    send(signal.SIGTERM)
    assert caught == [signal.SIGTERM, signal.SIGTERM]
  with deferred_signals() as caught:
    send(signum)
    assert caught == [signum]


@pytest.mark.parametrize("first", [signal.SIGTERM, signal.SIGINT])
def test_whoever_presses_ctrl_c_once_more_is_not_kept_waiting(first):
  with deferred_signals():
    send(first)
    with pytest.raises(KeyboardInterrupt):
      send(signal.SIGINT)

  def work():
    try:
      send(first)
    finally:
      send(signal.SIGINT)

  with pytest.raises(KeyboardInterrupt), immediate_signals():
    work()


def test_an_interruption_is_no_error_that_a_library_would_catch():
  caught = []

  def library():
    try:
      send()
    except Exception as error:
      caught.append(error)

  with pytest.raises(Interrupted), immediate_signals():
    library()
  assert not caught


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_an_interruption_that_python_drops_is_raised_in_the_end():
  class Dropped:
    def __del__(self):
      send()

  with pytest.raises(Interrupted), immediate_signals():
    Dropped()


def test_an_interruption_that_became_another_error_is_one_still():
  def library():
    try:
      send()
    except BaseException:
      raise RuntimeError("a library failed") from None

  with pytest.raises(Interrupted), immediate_signals():
    library()


def test_watching_leaves_nothing_behind():
  def watchers():
    return sum(thread.name == "second Ctrl-C" for thread in threading.enumerate())

  with exit_on_second_interrupt(), deferred_signals() as caught:
    assert watchers() == 1
    send(signal.SIGTERM)
    send(signal.SIGTERM)
  assert caught == [signal.SIGTERM] * 2
  assert watchers() == 0


DEAF = """
import hashlib
from bbqrec_jax.utils.signals import immediate_signals, exit_on_second_interrupt, deferred_signals
with exit_on_second_interrupt(), {context}():
  print("deaf", flush=True)
  hashlib.pbkdf2_hmac("sha256", b"", b"", 2_000_000_000)  # No handler of Python's runs before it returns.
"""


@pytest.mark.parametrize("context", ["deferred_signals", "immediate_signals"])
def test_a_second_ctrl_c_ends_the_process_even_while_it_is_deaf(context):
  command = [sys.executable, "-c", DEAF.format(context=context)]
  with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
    assert process.stdout.readline() == "deaf\n"
    for signum in (signal.SIGTERM, signal.SIGTERM):
      time.sleep(0.3)  # Until it is deaf.
      process.send_signal(signum)
    time.sleep(0.1)
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    try:
      _, said = process.communicate(timeout=20)
    finally:
      process.kill()
    assert process.returncode == 130
    assert said == "stopped at once; the same command goes on from the last checkpoint\n"
