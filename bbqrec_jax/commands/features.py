"""Makes the features of a data set's items, of their texts, pictures, brands, categories and prices.

    bbqrec features shop
    bbqrec features shop --text=sentence-transformers:all-MiniLM-L6-v2 --image=timm:resnet50
    bbqrec features shop --join=audio=audio.npz

By default no network is needed: texts and attributes become hashed TF-IDF, projected; pictures colours and edges.
`--text=sentence-transformers:NAME` takes a name or a folder (`pip install 'bbqrec_jax[text]'`), `--image=timm:NAME` or
`open_clip:NAME` a network for pictures (`'bbqrec_jax[image]'`). `--join` adds any vectors that come with ids. Stopped,
the same command goes on; broken pictures are told in `broken_pictures.jsonl`, and their items count as without one.
"""

from absl import flags

from bbqrec_jax.command_line import define_settings, given_settings, parse_flags, quiet_flags, start, writing
from bbqrec_jax.errors import InputError, refuse


def main(argv: list[str]) -> None:
  """Makes the features of the folder that the command line names."""
  from bbqrec_jax.data.encoding.encode import features
  from bbqrec_jax.data.encoding.settings import FeatureSettings
  from bbqrec_jax.utils.files import local_path
  from bbqrec_jax.utils.messages import say

  options = quiet_flags()
  try:
    if len(argv) != 2:
      raise InputError(f"expected one folder, as in bbqrec features shop, got {len(argv) - 1}")
    joined = {}
    for given in options.join:
      name, sign, file = given.partition("=")
      if not sign or not name or not file:
        raise InputError(f"--join={given}: expected NAME=FILE, as in --join=audio=audio.npz; correct it")
      joined[name] = local_path(file, flag="join")
    folder = local_path(argv[1], flag="data")
    with writing(folder):
      features(folder, join=joined, **given_settings(FeatureSettings))
  except InputError as error:
    refuse(error)
  say(f"next: bbqrec train --config=hybrid --data={folder} --workdir=runs/{folder.name or 'mine'}")


def program() -> None:
  """Defines the flags and runs the program."""
  from bbqrec_jax.data.encoding.settings import FeatureSettings

  define_settings(FeatureSettings())
  flags.DEFINE_multi_string(
    "join", [], "NAME=FILE: a modality NAME of vectors with ids, .npz (ids, vectors) or .parquet."
  )
  start(main, flags_parser=lambda argv: parse_flags(argv, words=True), prints=False)
