"""Where compiled programs are kept, and that a choice made before is left alone."""

import os
import pathlib

import jax
import pytest

from bbqrec_jax.utils.compilation import _kind_of_cpu, keep_compiled

OPTIONS = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs", "jax_enable_compilation_cache")


@pytest.fixture(autouse=True)
def options():
  before = {name: jax.config.values[name] for name in OPTIONS}
  jax.config.update("jax_compilation_cache_dir", None)
  yield
  for name, value in before.items():
    jax.config.update(name, value)


def test_programs_are_kept_in_the_cache_folder_of_the_user(tmp_path, monkeypatch):
  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
  keep_compiled()
  folder = pathlib.Path(jax.config.jax_compilation_cache_dir)
  assert folder == tmp_path / "bbqrec_jax" / _kind_of_cpu()
  monkeypatch.delenv("XDG_CACHE_HOME")
  jax.config.update("jax_compilation_cache_dir", None)
  keep_compiled()
  assert pathlib.Path(jax.config.jax_compilation_cache_dir).parent == pathlib.Path.home() / ".cache" / "bbqrec_jax"


def test_a_folder_that_was_chosen_stays_and_none_is_used_where_that_was_chosen(tmp_path):
  jax.config.update("jax_compilation_cache_dir", str(tmp_path))
  keep_compiled()
  assert jax.config.jax_compilation_cache_dir == str(tmp_path)
  jax.config.update("jax_compilation_cache_dir", None)
  jax.config.update("jax_enable_compilation_cache", False)
  keep_compiled()
  assert jax.config.jax_compilation_cache_dir is None


def test_a_place_that_can_hold_nothing_is_named_and_not_used(tmp_path, monkeypatch, capsys):
  (tmp_path / "file").write_text("")
  for place in (str(tmp_path / "file"), str(tmp_path / "file" / "below"), "http://nowhere/cache"):
    jax.config.update("jax_compilation_cache_dir", place)
    keep_compiled()
    assert jax.config.jax_compilation_cache_dir is None
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith(f"warning: JAX_COMPILATION_CACHE_DIR={place} cannot be used")
  # Nobody chose the usual one.
  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
  keep_compiled()
  assert jax.config.jax_compilation_cache_dir is None
  assert not capsys.readouterr().out


def test_a_user_without_a_home_folder_keeps_nothing(monkeypatch):
  monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
  monkeypatch.setattr(os.path, "expanduser", lambda path: path)
  keep_compiled()
  assert jax.config.jax_compilation_cache_dir is None


def test_cpus_that_can_do_different_things_have_different_folders(tmp_path):
  names = []
  for number, flags in enumerate(["sse avx", "sse avx amx", "sse avx"]):
    path = tmp_path / str(number)
    path.write_text(f"processor: 0\nflags: {flags}\nbogomips: {number}\nprocessor: 1\nflags: {flags}\n")
    names.append(_kind_of_cpu(path))
  assert names[0] == names[2] != names[1]
  assert _kind_of_cpu(tmp_path / "nosuch") == os.uname().machine
