"""Makes a data set of logs, a product table and pictures, with a card that says what is in it.

    bbqrec prepare clicks.csv --items=products.csv --images=pictures --output=shop
    bbqrec prepare ratings.parquet --user=customer --min_rating=4 --min_per_user=5 --min_per_item=5 --output=shop

The log is CSV, TSV, Parquet or JSON lines (plain or .gz), or a folder of RecBole's atomic files. Which columns are what
is guessed from their names, and said; the flags say it where the guess is wrong. Rows that cannot be used are set aside
in `quarantine.jsonl`, never dropped silently. Open `card.html` in the output, then go on with `bbqrec features`.
"""

from absl import flags

from bbqrec_jax.command_line import define_path, define_settings, given_settings, parse_flags, start, writing
from bbqrec_jax.errors import InputError, refuse
from bbqrec_jax.utils.files import check_new


def main(argv: list[str]) -> None:
  """Prepares what the flags name."""
  from bbqrec_jax.data.preparation.prepare import prepare
  from bbqrec_jax.data.preparation.settings import PreparationSettings
  from bbqrec_jax.utils.messages import say

  options = flags.FLAGS
  try:
    if len(argv) != 2:
      raise InputError(f"expected one log, as in bbqrec prepare clicks.csv --output=shop, got {len(argv) - 1}")
    check_new(options.output)
    with writing(options.output):
      prepare(
        argv[1],
        options.output,
        items=options["items"].value,
        images=options.images,
        **given_settings(PreparationSettings),
      )
  except InputError as error:
    refuse(error)
  say(f"look at {options.output / 'card.html'}; next: bbqrec features {options.output}")


def program() -> None:
  """Defines the flags and runs the program."""
  from bbqrec_jax.data.preparation.settings import PreparationSettings

  define_path("items", "The item table: ids and titles, descriptions, brands, categories, prices, pictures' names.")
  define_path("images", "A folder of pictures, called like the items' ids or as the item table says.")
  define_path("output", "The folder for the data set, which must not be there yet.")
  define_settings(PreparationSettings())
  flags.mark_flag_as_required("output")
  start(main, flags_parser=lambda argv: parse_flags(argv, words=True), prints=False)
