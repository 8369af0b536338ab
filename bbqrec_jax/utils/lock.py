"""A lock per workdir, so that one process at a time trains there; a second is told which process holds it."""

import contextlib
import datetime
import errno
import fcntl
import os
import pathlib
import socket
from collections.abc import Iterator

from bbqrec_jax.errors import InputError
from bbqrec_jax.utils import processes
from bbqrec_jax.utils.messages import warn

# What a file system answers that knows no locks, or whose server gives none.
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)

# Who holds what in this process: POSIX's locks keep no thread out. A child that is forked inherits none of them.
_held: dict[str, str] = {}
os.register_at_fork(after_in_child=_held.clear)


@contextlib.contextmanager
def locked(folder: pathlib.Path) -> Iterator[None]:
  """Keeps every other process and thread out of a folder, as far as they ask for the same.

  The lock is POSIX's, on the file `lock` in the folder, which says who holds it. It ends with its process, in whatever
  way that ends, and counts on other hosts too if the file system is one that passes it on, as NFS does. One that knows
  no locks gets a warning and no lock. Of several processes of a run the first holds it for all.

  Args:
    folder: that is there.

  Raises:
    InputError: in all processes of the run, if somebody else holds it; names host, process and time.
  """
  with contextlib.ExitStack() as stack:
    refusal = ""
    if processes.is_first():
      try:
        stack.enter_context(_locked(folder))
      except InputError as error:
        refusal = str(error)
    refusal = processes.text_of_the_first(refusal)
    if refusal:
      raise InputError(refusal)
    yield


@contextlib.contextmanager
def _locked(folder: pathlib.Path) -> Iterator[None]:
  now = datetime.datetime.now().astimezone().isoformat(" ", "seconds")
  place, me = os.path.realpath(folder), f"process {os.getpid()} on {socket.gethostname()} since {now}"
  holder = _held.setdefault(place, me)
  if holder is not me:
    # The file is not even opened: to close it would give up the lock of this process.
    raise _taken(folder, holder)
  try:
    with open(folder / "lock", "a+", encoding="utf-8", errors="replace") as file:
      try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
      except OSError as error:
        if error.errno in (errno.EAGAIN, errno.EACCES):
          file.seek(0)
          raise _taken(folder, file.read(200).strip() or "another process") from None
        if error.errno not in _NO_LOCKS:
          raise
        warn(
          f"{folder}: its file system knows no locks ({error.strerror}): nothing keeps out a second start of this run"
        )
      file.truncate(0)
      file.write(me)
      file.flush()
      try:
        yield
      finally:
        file.truncate(0)
  finally:
    _held.pop(place, None)


def _taken(folder: pathlib.Path, holder: str) -> InputError:
  return InputError(
    f"{folder} is taken: {holder} works there; wait until that has ended, or stop it, or use another --workdir"
  )
