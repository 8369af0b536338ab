"""How long a run without a split trains: as long as one of the same recipe that was validated."""

import json
import pathlib

import ml_collections

from bbqrec_jax.config import CHANGEABLE
from bbqrec_jax.errors import InputError
from bbqrec_jax.recommender.settings import trains_tokenizer
from bbqrec_jax.runs.workdir import PATHS, differences, load_results
from bbqrec_jax.utils.files import is_given, local_path
from bbqrec_jax.utils.json_files import read_json
from bbqrec_jax.utils.messages import say
from bbqrec_jax.utils.settings import flatten

# Fields that two runs of one recipe may differ in: what is learned from, for how long, and on what machine.
_OTHER = (
  *CHANGEABLE, *PATHS, "data.source", "data.split", "data.validation_from", "data.test_from", "seed", "partitioner",
  "shard_rows", "log_every", "tokenizer.evaluate_every", "recommender.steps", "recommender.evaluate_every",
  "recommender.epochs", "recommender.patience",
)  # fmt: skip


def _validated(config: ml_collections.ConfigDict) -> pathlib.Path:
  """The workdir of the validated run; of a URL a copy without the checkpoints."""
  return local_path(config.steps_of, flag="config.steps_of", use="read", without="checkpoints/")


def take_steps(config: ml_collections.ConfigDict) -> None:
  """Sets `recommender.steps` to the best step of the validated run that `steps_of` names.

  It is not scaled by what is learned from beyond that run's: nobody has validated longer training. The tokenizer
  trains as long as that run's, as `tokenizer.steps` of both is the same.

  Raises:
    InputError: if it is no finished run, was not validated, or `recommender.steps` says otherwise.
  """
  workdir = _validated(config)
  given = f"config field steps_of = {str(workdir)!r}"
  if not is_given(workdir / "results.json"):
    raise InputError(f"{given}: expected the workdir of a finished run, found no results.json there; give one")
  results = load_results(workdir)
  if results["data"].get("split") == "none":
    raise InputError(f"{given}: expected a run that was validated, got one of data.split = 'none'; give its steps_of")
  if config.recommender.steps not in (0, results["best_step"]):
    raise InputError(
      f"{given} and recommender.steps = {config.recommender.steps} both say how long to train; set the latter to 0"
    )
  config.recommender.steps = results["best_step"]
  say(f"steps of {workdir}: {results['best_step']:,}, where it was best of {results['steps']:,}")


def check_recipe(config: ml_collections.ConfigDict) -> None:
  """Refuses a validated run of another recipe, as its steps tell nothing of this one.

  Args:
    config: of this run, with all that follows from its data.

  Raises:
    InputError: if so; names the fields that differ.
  """
  theirs = flatten(read_json(_validated(config) / "config.json"))
  mine = flatten(json.loads(json.dumps(config.to_dict())))
  own = trains_tokenizer(config)
  differing = [
    name
    for name in differences(theirs, mine)
    if name not in _OTHER
    and not name.startswith(("evaluation.", "data.synthetic."))
    and (own or not name.startswith("tokenizer."))
  ]
  if differing:
    told = ", ".join(f"{name} (there {theirs.get(name)!r}, now {mine.get(name)!r})" for name in differing[:5])
    raise InputError(
      f"config field steps_of = {config.steps_of!r}: expected a run of the same recipe, which differs in {told}; set"
      " them alike, or set recommender.steps by hand"
    )
