"""The persistent compilation cache, so that the same command starts faster the second time."""

import hashlib
import os
import pathlib

import jax
from etils import epath

from bbqrec_jax.utils.messages import warn


def keep_compiled() -> None:
  """Points JAX's persistent compilation cache at a folder of the user's, unless one is set already.

  `JAX_COMPILATION_CACHE_DIR` chooses another folder, `JAX_ENABLE_COMPILATION_CACHE=0` does without. Programs for a CPU
  use all that it can do, and a home folder may be shared by different machines: each kind of CPU has a folder. One that
  cannot be written to is left alone; one line says so, if it was chosen.
  """
  chosen = jax.config.values["jax_compilation_cache_dir"]
  if not jax.config.values["jax_enable_compilation_cache"]:
    return
  if chosen:
    problem = _cannot_hold(chosen)
    if problem:
      warn(f"JAX_COMPILATION_CACHE_DIR={chosen} cannot be used: {problem}; compiled programs are not kept")
      jax.config.update("jax_compilation_cache_dir", None)
    return
  home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
  if home.startswith("~"):  # A user without a home folder, as in some containers.
    return
  folder = os.path.join(home, "bbqrec_jax", _kind_of_cpu())
  if _cannot_hold(folder):
    return
  jax.config.update("jax_compilation_cache_dir", folder)
  # What compiles in less than this is not worth a file.
  jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)


def _cannot_hold(folder: str) -> str:
  """Why JAX could not keep files in a folder, which is made if need be, or under a URL; "" if it can."""
  try:
    path = epath.Path(folder)
    path.mkdir(parents=True, exist_ok=True)
    if "://" not in folder and not os.access(folder, os.W_OK):
      return "it cannot be written to"
  except Exception as error:  # Every kind of storage has errors of its own.
    return f"{type(error).__name__}: {error}"
  return ""


def _kind_of_cpu(cpuinfo: pathlib.Path = pathlib.Path("/proc/cpuinfo")) -> str:
  """A short name that differs where CPUs can do different things."""
  try:
    lines = cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines()
  except OSError:
    return os.uname().machine
  abilities = sorted({line for line in lines if line.startswith(("flags", "Features", "model name"))})
  return f"{os.uname().machine}-{hashlib.sha256('|'.join(abilities).encode()).hexdigest()[:8]}"
