"""Messages and warnings on the terminal, from the first process alone."""

import contextlib
import sys

import tqdm

from bbqrec_jax.errors import as_given
from bbqrec_jax.utils import processes


def say(message: str) -> None:
  """One message to the person at the terminal, from the first process; does not break a progress bar.

  Where nobody hears it any more (no standard output, a pipe without a reader, a full disk), nothing comes of that.
  """
  if not processes.is_first() or not is_heard():
    return
  encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
  with contextlib.suppress(OSError):
    tqdm.tqdm.write(as_given(message).encode(encoding, "backslashreplace").decode(encoding), file=sys.stdout)
    sys.stdout.flush()


def is_heard() -> bool:
  """Whether there is a standard output: a daemon has none, or has closed it."""
  return sys.stdout is not None and not getattr(sys.stdout, "closed", False)


def warn(message: str) -> None:
  """Something that the person at the terminal did not expect, in one line."""
  say(f"warning: {' '.join(message.split())}")
