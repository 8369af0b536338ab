"""Makes glibc reuse the memory that a training step frees, instead of returning it to the kernel."""

import ctypes
import os

# What glibc's mallopt(3) calls them.
_TRIM_THRESHOLD, _MMAP_MAX, _ARENA_MAX = -1, -4, -8


def keep_memory() -> bool:
  """Tells glibc's allocator to keep what is freed, all in one heap.

  On a CPU, XLA asks for a step's intermediate arrays at every execution. As glibc comes, they are mapped and unmapped
  each time, and the kernel fills every page with zeros: a third of a small step's time. To be called before threads are
  started; the process then holds on to the most memory that it has needed. Who has set `MALLOC_...` or
  `GLIBC_TUNABLES=glibc.malloc...` in the environment is left alone.

  Returns:
    Whether it was done: not without glibc.
  """
  if any(name.startswith("MALLOC_") for name in os.environ) or "malloc" in os.environ.get("GLIBC_TUNABLES", ""):
    return False
  try:
    library = ctypes.CDLL(None)
    library.gnu_get_libc_version  # noqa: B018, another C library has no such function, and may mean other things.
    mallopt = library.mallopt
  except (AttributeError, OSError, TypeError):
    return False
  return all(mallopt(option, value) == 1 for option, value in ((_ARENA_MAX, 1), (_MMAP_MAX, 0), (_TRIM_THRESHOLD, -1)))
