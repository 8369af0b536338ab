"""What lies below a URL of an object store, file by file: asked for again where a request fails, and told in one line.

The file systems are fsspec's, for the schemes of `etils.epath` the very ones that epath gives to orbax and TFDS.
"""

import contextlib
import hashlib
import json
import os
import pathlib
import time
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

from bbqrec_jax.errors import InputError
from bbqrec_jax.utils.files import is_plain_name, unfinished
from bbqrec_jax.utils.json_files import checksum

MANIFEST = "mirror.json"
ATTEMPTS, WAIT = 4, 1.0  # How often a request is made, and the seconds before the second time, doubled every time.
_EPATH = ("gs", "s3", "az")


class Object(NamedTuple):
  """Bytes of an object, and digits that change with whatever its store says of it."""

  size: int
  stamp: str


class Manifest(NamedTuple):
  """What is sent with a folder.

  Attributes:
    text: as it stands there; "" where there is none.
    files: that count; None where there is none.
    writer: who sent the folder the last time.
    works: whether the writer means to go on.
    turn: how often it was sent.
  """

  text: str = ""
  files: tuple[str, ...] | None = None
  writer: str = ""
  works: bool = False
  turn: int = 0


class ObjectStore:
  """What lies below one URL."""

  def __init__(self, url: str):
    """Checks that there is a way to it; nothing is asked of it yet.

    Raises:
      InputError: if the URL is none, its scheme is unknown, or the package for it is missing.
    """
    scheme, _, rest = url.rstrip("/").partition("://")
    self.url = f"{scheme.lower()}://{rest}"
    if any(part in ("", ".", "..") or not is_plain_name(f"x{part}") for part in rest.split("/")):
      raise InputError(
        f"{url}: expected a URL such as gs://bucket/folder, got one with an empty, odd or long part; correct it"
      )
    self._fs = _filesystem(self.url)
    self._root = self._fs._strip_protocol(self.url)
    self.error: type[Exception] = InputError  # What a failure is.
    self.mend = "mend that, and give the same command again"

  @property
  def parts(self) -> list[str]:
    """Bucket and folders."""
    return self.url.partition("://")[2].split("/")

  def _persist(self, doing: str, name: str, call: Callable[[], Any]) -> Any:
    """What a request answers, which is made again a few times if it fails.

    Raises:
      FileNotFoundError: if there is no such object.
      InputError, StorageError: if it fails again and again, or nothing speaks for trying again.
    """
    for attempt in range(ATTEMPTS):
      try:
        return call()
      except FileNotFoundError:
        raise
      except Exception as error:  # Every kind of store has errors of its own.
        if attempt + 1 < ATTEMPTS and not isinstance(error, PermissionError):
          time.sleep(WAIT * 2**attempt)
          continue
        raise self._failed(doing, name, error) from error

  def _failed(self, doing: str, name: str, error: Exception) -> Exception:
    reason = f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]
    return self.error(f"{self._path(name, self.url)} could not be {doing}: {reason}; {self.mend}")

  def _path(self, name: str, root: str | None = None) -> str:
    root = self._root if root is None else root
    return f"{root}/{name}" if name else root

  def objects(self) -> dict[str, Object]:
    """What there is, by name below the URL; "" if the URL itself is a file.

    Raises:
      InputError, StorageError: if it cannot be listed, or a name would lead out of a folder.
    """

    def find() -> dict[str, dict[str, Any]]:
      self._fs.invalidate_cache()
      return self._fs.find(self._root, detail=True)

    try:
      found = self._persist("listed", "", find)
    except FileNotFoundError:
      return {}
    listed = {}
    for path, about in found.items():
      name = path[len(self._root) :].removeprefix("/")
      if name and any(part in ("", ".", "..") or "\0" in part for part in name.split("/")):
        raise self.error(f"{self.url}: expected names that a folder can have, found {name!r}; rename that")
      stamp = hashlib.sha256(repr(sorted(about.items(), key=str)).encode()).hexdigest()[:16]
      listed[name] = Object(about["size"], stamp)
    return listed

  def manifest(self) -> Manifest:
    """What `mirror.json` says.

    Raises:
      InputError, StorageError: if it cannot be read, or is damaged.
    """
    try:
      text = self._persist("read", MANIFEST, lambda: self._fs.cat_file(self._path(MANIFEST))).decode(errors="replace")
    except (FileNotFoundError, NotADirectoryError):
      return Manifest()
    try:
      value = json.loads(text)
      if value.pop("checksum") != checksum(value):
        raise ValueError("its checksum is another")
      return Manifest(
        text, tuple(map(str, value["files"])), str(value["writer"]), bool(value["works"]), int(value["turn"])
      )
    except (ValueError, KeyError, TypeError, AttributeError) as error:
      raise self.error(
        f"{self.url}/{MANIFEST}: expected the names of the files there, got a damaged file ({error}); delete it, and"
        " every file there counts"
      ) from None

  def write_manifest(self, files: Iterable[str], *, writer: str, works: bool, turn: int) -> Manifest:
    """Makes these files count."""
    names = tuple(sorted(files))
    value = {"files": list(names), "writer": writer, "works": works, "turn": turn}
    text = json.dumps(value | {"checksum": checksum(value)}, indent=1)
    self.put_bytes(MANIFEST, text.encode())
    return Manifest(text, names, writer, works, turn)

  def get(self, name: str, path: pathlib.Path, *, size: int) -> None:
    """Copies an object to a file, which gets its name when it is whole.

    Raises:
      FileNotFoundError: if it is gone.
      InputError, StorageError: as `objects`.
    """
    partial = unfinished(path)

    def fetch() -> None:
      path.parent.mkdir(parents=True, exist_ok=True)
      self._fs.get_file(self._path(name), str(partial))
      if partial.stat().st_size != size:
        raise OSError(f"expected {size} bytes, got {partial.stat().st_size}")
      os.replace(partial, path)

    self._persist("copied to this machine", name, fetch)

  def put(self, path: pathlib.Path, name: str) -> None:
    """Sends a file."""
    self._sent(name, lambda: self._fs.put_file(str(path), self._path(name)))

  def put_bytes(self, name: str, content: bytes) -> None:
    """Sends a few bytes."""
    self._sent(name, lambda: self._fs.pipe_file(self._path(name), content))

  def _sent(self, name: str, call: Callable[[], Any]) -> None:
    try:
      self._persist("written", name, call)
    except FileNotFoundError as error:  # There is no such bucket.
      raise self._failed("written", name, error) from error

  def remove(self, name: str) -> None:
    """Removes an object; that it cannot be removed harms nobody."""
    with contextlib.suppress(Exception):
      self._fs.rm_file(self._path(name))

  def holds(self) -> bool:
    """Whether there is anything that counts."""
    manifest = self.manifest()
    return bool(self.objects() if manifest.files is None else manifest.files)

  def try_to_write(self) -> None:
    """Makes an empty object beside the URL and removes it.

    Raises:
      InputError: if it cannot be made.
    """
    probe = f"{self._root}.unfinished"
    self._sent("", lambda: self._fs.pipe_file(probe, b""))
    with contextlib.suppress(Exception):
      self._fs.rm_file(probe)


def _filesystem(url: str) -> Any:
  """The file system of a URL.

  Raises:
    InputError: if the scheme is unknown, the package for it is missing, or it cannot be made.
  """
  import fsspec
  from etils.epath import backend

  scheme = url.partition("://")[0]
  try:
    fsspec.get_filesystem_class(scheme)
    return backend.fsspec_backend.fs(url) if scheme in _EPATH else fsspec.filesystem(scheme)
  except ImportError as error:
    extra = {"gs": "gcs", "gcs": "gcs", "s3": "s3", "s3a": "s3"}.get(scheme)
    mend = f"pip install 'bbqrec_jax[{extra}]'" if extra else "install it"
    raise InputError(f"{url}: a package is missing: {error}; {mend}") from None
  except ValueError:
    raise InputError(
      f"{url}: expected a path, or a URL of a kind that fsspec knows (gs, s3, abfs, hdfs and others), got {scheme}://;"
      " correct it"
    ) from None
  except Exception as error:
    raise InputError(f"{url}: there is no way to it ({type(error).__name__}: {error}); check the account") from None
