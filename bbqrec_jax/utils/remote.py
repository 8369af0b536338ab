"""Data, workdirs and outputs at URLs such as `gs://bucket/runs/mine`: local copies of them, and the way back.

Object stores know no locks, no appending, no memory-mapping and no renaming of folders, all of which a run relies on.
So nothing works at a URL itself: what is read there is first copied to a folder of this machine, a workdir is worked on
in such a folder and sent to its URL at every checkpoint, and an output is sent when it is whole. `files.local_path`
makes local paths of URLs, which is all that most of the package knows of them.

A folder that was sent holds `mirror.json`, which names the files that count. It is written last and in one piece, so
what is sent counts altogether or not at all; where there is none, as in a folder that was put there by other means,
everything counts. It also says who writes there.
"""

import concurrent.futures
import contextlib
import datetime
import fcntl
import functools
import hashlib
import json
import os
import pathlib
import re
import shutil
import socket
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

from bbqrec_jax.errors import LOCAL_COPIES, Diverged, InputError, StorageError, as_given
from bbqrec_jax.utils import object_store, processes
from bbqrec_jax.utils.files import Use, is_url, unfinished
from bbqrec_jax.utils.lock import locked
from bbqrec_jax.utils.messages import say, warn
from bbqrec_jax.utils.object_store import MANIFEST, Object, ObjectStore
from bbqrec_jax.utils.signals import Interrupted

_AT_ONCE = 8  # Requests.
_WORTH_TELLING = 2**26  # Bytes that take a while.
# What stands in a workdir for a moment, or means something on this machine alone.
_PASSING = re.compile(r"(?:^|/)[^/]*(?:\.unfinished|\.orbax-checkpoint-tmp[^/]*)(?:/|$)|^lock$|^mirror\.json$")
_OWN = ("checkpoints/", "tensorboard/", "tokenizer/")  # What of a workdir is a run's own, whoever put it there.

_Signature = tuple[int, int]  # Size and time of a local file.


_made: list[tempfile.TemporaryDirectory[str]] = []  # Each is gone when the program ends.


def _until_the_end(parent: pathlib.Path | None) -> str:
  _made.append(tempfile.TemporaryDirectory(dir=parent, prefix="bbqrec-", ignore_cleanup_errors=True))
  return _made[-1].name


_without_home = functools.cache(lambda: _until_the_end(None))


def _root() -> pathlib.Path:
  """The folder of all local copies."""
  home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
  if home.startswith("~"):  # A user without a home folder, as in some containers.
    home = _without_home()
  return pathlib.Path(home, "bbqrec_jax", "urls").absolute()


def _place(store: ObjectStore) -> pathlib.Path:
  """The folder for all copies of a URL, of a short and plain name."""
  digest = hashlib.sha256(store.url.encode()).hexdigest()[:10]
  words = re.sub("[^A-Za-z0-9]+", "-", store.url)[:80]
  return _root() / f"{words}-{digest}"


def _of_url(folder: pathlib.Path, store: ObjectStore) -> pathlib.Path:
  """A local copy's path, which ends as the URL does: runs and data sets are called by the last names of theirs."""
  path = folder.joinpath(*store.parts[-2:])
  LOCAL_COPIES[str(path)] = store.url
  return path


def local_copy(url: str, *, use: Use, without: str = "") -> pathlib.Path:
  """The local path that stands for a URL.

  Args:
    url: of a file or a folder.
    use: "read": what is there is copied to it, as far as it has changed since the last time. "write": nothing is there
      yet; `deliver` sends what will be. "run": for `mirrored`.
    without: the beginning of names that are not needed, if they are not there already.

  Raises:
    InputError: if the URL or its scheme is none, a package is missing, there is nothing, or it cannot be read; or
      nothing can be written there, if that is its use.
  """
  store = ObjectStore(url)
  place = _place(store)
  try:
    place.mkdir(parents=True, exist_ok=True)
    if use == "run":
      return _of_url(place / "run", store)
    if use == "write":
      store.try_to_write()
      path = _of_url(pathlib.Path(_until_the_end(place)), store)
      path.parent.mkdir(parents=True, exist_ok=True)
      return path
    path = _of_url(place / "read", store)
    with _alone(place):
      _fetch(store, path, place / "read.json", without=without)
    return path
  except OSError as error:
    raise InputError(f"{url}: no copy can be kept in {place}: {error}; mend that, or set XDG_CACHE_HOME") from error


@contextlib.contextmanager
def _alone(place: pathlib.Path) -> Iterator[None]:
  """Waits for other processes and threads of this machine that copy to the same place."""
  with open(place / "copying", "w", encoding="utf-8") as file:
    with contextlib.suppress(OSError):  # A file system without locks.
      fcntl.flock(file, fcntl.LOCK_EX)
    yield


def _all(calls: Iterable[Callable[[], None]]) -> None:
  """Makes calls side by side; the first error ends them."""
  pool = concurrent.futures.ThreadPoolExecutor(_AT_ONCE)
  try:
    for future in [pool.submit(call) for call in calls]:
      future.result()
  finally:
    pool.shutdown(wait=True, cancel_futures=True)


def _signature(path: pathlib.Path) -> _Signature | None:
  try:
    status = path.stat()
  except OSError:
    return None
  return status.st_size, status.st_mtime_ns


def _files(folder: pathlib.Path) -> dict[str, _Signature]:
  """The files in a folder that are to be sent, by name; "" if it is a file itself."""
  if folder.is_file():
    paths = [folder]
  else:
    paths = [pathlib.Path(parent, name) for parent, _, names in os.walk(folder) for name in names]
  found = {"" if path == folder else path.relative_to(folder).as_posix(): _signature(path) for path in paths}
  return {name: signature for name, signature in found.items() if signature and not _PASSING.search(name)}


class _Note(NamedTuple):
  """What is known of a local copy: the manifest that it was made by, and of its files the stamps and signatures."""

  manifest: str
  files: dict[str, list[Any]]

  @classmethod
  def read(cls, path: pathlib.Path) -> "_Note":
    try:
      value = json.loads(path.read_text(encoding="utf-8"))
      return cls(str(value["manifest"]), {str(name): list(known) for name, known in value["files"].items()})
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
      return cls("", {})

  def write(self, path: pathlib.Path) -> None:
    partial = unfinished(path)
    partial.write_text(json.dumps(self._asdict()), encoding="utf-8")
    os.replace(partial, path)


def _fetch(store: ObjectStore, into: pathlib.Path, note: pathlib.Path, *, without: str = "") -> None:
  """Makes a local path hold what is at a URL; what it holds already stays.

  Raises:
    InputError: if there is nothing, or it cannot be read.
  """
  for _ in range(object_store.ATTEMPTS):
    manifest, objects = store.manifest(), store.objects()
    objects.pop(MANIFEST, None)
    if manifest.files is not None:
      objects = {name: objects[name] for name in manifest.files if name in objects}
    if not objects:
      raise InputError(
        f"{store.url}: expected a file or a folder of files, found nothing; check the URL and whose account it is"
      )
    try:
      _update(store, objects, into, note, manifest=manifest.text, without=without)
      return
    except FileNotFoundError:  # Somebody has written there meanwhile.
      time.sleep(object_store.WAIT)
  raise InputError(f"{store.url}: its files change while they are read; wait until whoever writes there is done")


def _update(
  store: ObjectStore,
  objects: dict[str, Object],
  into: pathlib.Path,
  note: pathlib.Path,
  *,
  manifest: str,
  without: str,
) -> None:
  """Copies what has changed, and removes what is gone."""
  known = _Note.read(note).files
  if into.exists() and into.is_file() != ("" in objects):
    shutil.rmtree(into) if into.is_dir() else into.unlink()
  for name in _files(into):
    if name not in objects:
      (into / name).unlink()
  for parent, _, _ in os.walk(into, topdown=False):
    with contextlib.suppress(OSError):  # All but the empty ones.
      os.rmdir(parent)

  def is_current(name: str) -> bool:
    signature = _signature(into / name)
    return signature is not None and known.get(name) == [objects[name].stamp, *signature]

  wanted = [name for name in objects if not is_current(name) and not (without and name.startswith(without))]
  total = sum(objects[name].size for name in wanted)
  if total >= _WORTH_TELLING:
    say(f"copying {len(wanted)} files of {store.url}, {total / 2**20:,.0f} MiB ...")
  _all(functools.partial(store.get, name, into / name, size=objects[name].size) for name in wanted)
  files = {name: [one.stamp, *signature] for name, one in objects.items() if (signature := _signature(into / name))}
  _Note(manifest, files).write(note)


def exists(path: pathlib.Path) -> bool:
  """Whether there is something at the URL that a local path stands for; False of a path that stands for none.

  Raises:
    InputError: if that cannot be found out.
  """
  url = as_given(str(path))
  return is_url(url) and ObjectStore(url).holds()


def deliver(path: pathlib.Path) -> None:
  """Sends a file or a folder to the URL that its path stands for; does nothing with a path that stands for none.

  Raises:
    StorageError: if it cannot be sent. What arrived of a folder counts for nothing then.
  """
  url = as_given(str(path))
  if not is_url(url) or not path.exists():
    return
  store, files = ObjectStore(url), _files(path)
  store.error = StorageError
  if "" in files:
    store.put(path, "")
    return
  before = store.manifest()
  store.write_manifest((), writer=_me(), works=True, turn=before.turn + 1)
  _all(functools.partial(store.put, path / name, name) for name in files)
  store.write_manifest(files, writer=_me(), works=False, turn=before.turn + 2)
  for name in set(before.files or ()) - files.keys():
    store.remove(name)


def _me() -> str:
  now = datetime.datetime.now().astimezone().isoformat(" ", "microseconds")
  return f"process {os.getpid()} on {socket.gethostname()} since {now}"


class _Mirror:
  """A workdir that is worked on in a local folder and sent to its URL."""

  def __init__(self, store: ObjectStore, folder: pathlib.Path, note: pathlib.Path):
    """Makes the folder hold what the URL does, or what this machine added to that when it was last stopped."""
    self.folder, self._store, self._note = folder, store, note
    self._manifest, self._writer, self._claimed = store.manifest(), _me(), False
    objects = store.objects()
    if "" in objects:
      raise InputError(f"--workdir={store.url}: expected a folder, or a place for one, but it is a file; use another")
    objects.pop(MANIFEST, None)
    mine = _Note.read(note)
    if not (folder.is_dir() and self._manifest.text and mine.manifest == self._manifest.text):
      note.unlink(missing_ok=True)
      shutil.rmtree(folder, ignore_errors=True)
      if self._manifest.files or (self._manifest.files is None and objects):
        _fetch(store, folder, note)
      mine = _Note("", {name: list(signature) for name, signature in _files(folder).items()})
    counting = objects.keys() if self._manifest.files is None else self._manifest.files
    # What an upload that was cut off has left there is cleared away in time.
    self._there = {*counting, *(name for name in objects if name.startswith(_OWN))}
    self._sent = {name: tuple(known[-2:]) for name, known in mine.files.items() if name in counting}

  def send(self, *, last: bool = False) -> None:
    """Sends what has changed since the last time, then the manifest; then removes there what is gone here.

    Args:
      last: whether nothing more will come.

    Raises:
      InputError, StorageError: if that fails, or another start of the run writes there by now. What is there is what
        was sent the last time.
    """
    files = _files(self.folder)
    changed = [name for name in files if self._sent.get(name) != files[name]]
    if not changed and self._sent.keys() == files.keys() and (last or self._claimed) and not self._manifest.works:
      return
    now = self._store.manifest()
    if now.text != self._manifest.text:
      raise StorageError(
        f"{self._store.url}: {now.writer or 'somebody'} has written there since; one start at a time can have this"
        " workdir, and this one ends here"
      )
    # Before anything else: a second writer finds out, and so does one without rights.
    if not self._claimed and not last:
      self._manifest = self._store.write_manifest(
        self._there if now.files is None else now.files, writer=self._writer, works=True, turn=now.turn + 1
      )
      self._claimed, self._store.error = True, StorageError
      self._store.mend = "mend that, and the same command goes on from the last checkpoint"
    self._there |= files.keys()
    _all(functools.partial(self._store.put, self.folder / name, name) for name in changed)
    self._manifest = self._store.write_manifest(
      files, writer=self._writer, works=not last, turn=self._manifest.turn + 1
    )
    self._sent = files
    _Note(self._manifest.text, {name: list(signature) for name, signature in files.items()}).write(self._note)
    gone = self._there - files.keys()
    _all(functools.partial(self._store.remove, name) for name in gone)
    self._there -= gone

  def end(self) -> None:
    """Sends what is left, if the run has come so far that anything was sent."""
    if self._claimed:
      self.send(last=True)

  def tell(self) -> None:
    """Names whoever has not said that it stopped."""
    if self._manifest.works:
      say(
        f"{self._store.url}: {self._manifest.writer} has not said that it ended; if it still works, it ends when it"
        " next writes there"
      )


_open: list[_Mirror] = []


@contextlib.contextmanager
def mirrored(workdir: pathlib.Path) -> Iterator[None]:
  """Keeps a workdir and its URL alike: fetched at the beginning, sent by `keep` and at the end.

  It is sent at the end if all went well, or the run was stopped or has diverged; after anything else what is there is
  what was sent the last time. Does nothing about a path that stands for no URL.

  Args:
    workdir: a path of `local_copy` for "run".

  Raises:
    InputError: if the URL cannot be read, the run has several processes, or another one of this machine works there.
    StorageError: if it cannot be written to.
  """
  url = LOCAL_COPIES.get(str(workdir))
  if url is None:
    yield
    return
  if processes.several():
    raise InputError(
      f"--workdir={url}: a run of several processes needs a workdir that all of them see; mount the bucket, as bbqrec"
      " launch does at /mnt/bbqrec, and give the folder there"
    )
  store = ObjectStore(url)
  place = _place(store)
  with contextlib.ExitStack() as stack:
    try:
      place.mkdir(parents=True, exist_ok=True)
      stack.enter_context(locked(place))
    except InputError as error:
      raise InputError(str(error).replace(str(place), url)) from None
    mirror = _Mirror(store, workdir, place / "run.json")
    mirror.tell()
    _open.append(mirror)
    try:
      yield
    except (Interrupted, Diverged):
      mirror.end()
      raise
    else:
      mirror.end()
    finally:
      _open.remove(mirror)


def is_mirrored(path: pathlib.Path) -> bool:
  """Whether a path lies in a workdir that is kept at a URL."""
  return any(path.is_relative_to(mirror.folder) for mirror in _open)


def keep(path: pathlib.Path, *, optional: bool = False) -> None:
  """Sends the workdir that a path lies in to its URL, if it has one.

  Args:
    path: the workdir, or something in it; nothing writes there meanwhile.
    optional: whether a warning will do if that fails.

  Raises:
    InputError, StorageError: if it fails: the former, if it was the first time.
  """
  for mirror in _open:
    if path.is_relative_to(mirror.folder):
      try:
        mirror.send(last=optional)
      except (InputError, StorageError) as error:
        if not optional:
          raise
        warn(str(error))
