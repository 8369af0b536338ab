"""What kind of data a folder holds."""

import pytest

from bbqrec_jax.data.sources import recognise_source
from bbqrec_jax.errors import InputError


@pytest.mark.parametrize(
  ("files", "source"),
  [
    (["sequences.txt", "items.jsonl"], "directory"),
    (["shop.inter"], "recbole"),
    (["shop.inter.gz", "shop.item"], "recbole"),
    (["sequences.txt", "shop.inter"], "directory"),
  ],
)
def test_a_folder_is_recognised(tmp_path, files, source):
  for name in files:
    (tmp_path / name).touch()
  assert recognise_source(tmp_path) == source


def test_what_is_no_data_is_refused(tmp_path):
  (tmp_path / "interactions.csv").touch()
  with pytest.raises(InputError, match=r"sequences\.txt.*\.inter.*neither"):
    recognise_source(tmp_path)
  with pytest.raises(InputError, match="expected a folder of data"):
    recognise_source(tmp_path / "interactions.csv")
