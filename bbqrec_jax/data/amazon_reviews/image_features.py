"""The features of pictures that came with the release of 2014: records of an id of ten bytes and 4,096 float32."""

from collections.abc import Collection
from pathlib import Path

import numpy as np

from bbqrec_jax.errors import InputError, shown
from bbqrec_jax.utils.files import check_file

WIDTH = 4096
_ID = 10
_RECORD = np.dtype([("id", f"S{_ID}"), ("vector", "<f4", (WIDTH,))])


def read_image_features(path: Path, wanted: Collection[str]) -> tuple[list[str], np.ndarray]:
  """The vectors of some items.

  Args:
    path: a file `image_features_CATEGORY.b`.
    wanted: ids of items; the vectors of others are passed over.

  Returns:
    Ids [n] and vectors [n, 4096] float32, each item once, as the file has them.

  Raises:
    InputError: if the file is cut off, or is something else.
  """
  size = check_file(path)
  if not size or size % _RECORD.itemsize:
    raise InputError(
      f"{path}: expected records of {_RECORD.itemsize} bytes ({_ID} of an id, {WIDTH} float32), got {size} bytes, which"
      " is no whole number of them; download it again"
    )
  records = np.memmap(path, _RECORD, mode="r")
  rows: dict[str, int] = {}
  for row, one in enumerate(records["id"].tolist()):
    try:
      name = one.decode("ascii")
    except UnicodeDecodeError:
      name = ""
    if not name.strip() or not name.isprintable():
      raise InputError(f"{path} record {row}: expected the id of an item, got {shown(one)}; download the file again")
    if name in wanted:
      rows.setdefault(name, row)
  return list(rows), np.array(records["vector"][list(rows.values())])
