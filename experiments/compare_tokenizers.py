"""Tokenizers side by side: health, cohesion, and what a recommender makes of their semantic IDs.

    python experiments/compare_tokenizers.py --config=configs/scientific.py --config.data.path=DIR --workdir=runs/sci
    python experiments/compare_tokenizers.py --config=configs/scientific.py:dense ... (the same path and workdir)

trains every variant with every seed (`--variants`, `--seeds`), then the config's recommender on its IDs
(`--norecommender`: none), and prints the tables. What a recommender knows of items beside the variant is what the
config's `recommender.item_inputs` say. `--ids_alone` trains another recommender that knows items by their IDs
and by nothing else, with a full softmax: what the IDs themselves tell of behaviour. `--sequence_recall` trains the
history transformer of the contrast alone on what each tokenizer's codes stand for, frozen: a sequence-to-item Recall@10
that all tokenizers can be asked for, written to `sequence_recall.json` beside each. What is done already is not done
again, tokenizers are shared by the heads, and the work can be split over processes by seed or variant; `--report`
prints the tables of whatever is there. Semantic IDs published for the data set, `sid_*.npy` in its folder, are measured
by the same code.
"""

import copy
import pathlib
from typing import Any

import numpy as np
from absl import flags
from history_probe import id_vectors, train_probe
from ml_collections import config_flags

from bbqrec_jax.command_line import define_path, ready_to_train, start, training
from bbqrec_jax.data.interactions import Split
from bbqrec_jax.errors import InputError
from bbqrec_jax.runs.compare import mean, table
from bbqrec_jax.runs.run import load_ids, of_any_recommender, read_data, run, tokenize
from bbqrec_jax.runs.workdir import load_results, with_absolute_paths
from bbqrec_jax.semantic_ids.health import codebook_health
from bbqrec_jax.tokenizer.evaluate import cohesion
from bbqrec_jax.utils.files import read_array
from bbqrec_jax.utils.json_files import read_json, write_json

# Each changes what it names and nothing else, but for "fragmented": each modality is quantized on its own, with
# codebooks of its own and bound to nothing, and an ID is the modalities' codes one after the other (as in MQL4GRec).
VARIANTS: dict[str, dict[str, Any]] = {
  "bound": {},
  "rq_kmeans": {"tokenizer.quantizer": "rq_kmeans"},
  "fragmented": {
    "tokenizer.codebooks": "per_stream",
    "tokenizer.semantic_id": "concatenated",
    "tokenizer.item_id": "none",
    "tokenizer.weights.contrast": 0.0,
    "tokenizer.weights.modality_contrast": 0.0,
    "tokenizer.weights.fused_reconstruction": 0.0,
    "tokenizer.weights.disentangle": 0.0,
  },
  "own_codebooks": {"tokenizer.codebooks": "per_stream"},
  "no_disentangle": {"tokenizer.weights.disentangle": 0.0},
  "disentangle_1": {"tokenizer.weights.disentangle": 1.0},
  "no_item_id": {"tokenizer.item_id": "none"},
  "no_contrast": {"tokenizer.weights.contrast": 0.0, "tokenizer.weights.modality_contrast": 0.0},
}

IDS_ALONE = {
  "recommender.head": "dense",
  "recommender.item_inputs": ("fused",),
  "recommender.item_dropout": 0.0,
  "recommender.similarity": (),
}
SEQUENCE_RECALL = "sequence_recall.json"
HEADS = ("generative", "dense", "ids_alone")


def change(config: Any, changes: dict[str, Any]) -> Any:
  """A copy of a config with fields changed."""
  changed = copy.deepcopy(config)
  changed.update_from_flattened_dict(changes)
  return changed


def probe(config: Any, folder: pathlib.Path) -> None:
  """Writes the sequence-to-item Recall@10 of the frozen tokenizer in a folder, if it is not there yet."""
  output = folder / SEQUENCE_RECALL
  if output.exists():
    return
  dataset, split, figures = read_data(config, for_tokenizer=True)
  ids = load_ids(config, folder, dataset, figures)
  write_json(output, train_probe(config, id_vectors(ids), split)._asdict())


def do(
  config: Any, workdir: pathlib.Path, *, variants: list[str], seeds: list[int], recommender: bool, ids_alone: bool,
  sequence_recall: bool = False,
) -> None:  # fmt: skip
  """Trains what is asked for and not there yet."""
  for seed in seeds:
    for variant in variants:
      own = change(config, {"seed": seed} | VARIANTS[variant])
      folder = workdir / variant / str(seed)
      tokenize(of_any_recommender(own), folder)
      if sequence_recall:
        probe(of_any_recommender(own), folder)
      artefact = {"tokenizer.artefact": str(folder / "tokenizer")}
      if recommender:
        run(change(own, artefact), folder / own.recommender.head)
      if ids_alone:
        run(change(own, artefact | IDS_ALONE), folder / "ids_alone")


def measure(codes: np.ndarray, split: Split) -> dict[str, Any]:
  """The health of semantic IDs [N, L] that were made elsewhere."""
  return codebook_health(codes, codes, num_codes=int(codes.max()) + 1) | {"cohesion": cohesion(codes, split)}


def read_health(folder: pathlib.Path) -> dict[str, Any]:
  """The health report of the tokenizer in a folder, with `frozen`, what the probe has found, where it is there."""
  health, found = read_json(folder / "tokenizer" / "health.json"), folder / SEQUENCE_RECALL
  return health | ({"frozen": read_json(found)} if found.exists() else {})


def health_row(name: str, healths: list[dict[str, Any]]) -> list[str]:
  """A line of the first table."""

  def column(read, form):
    return mean([read(health) for health in healths], form)

  return [
    name,
    str(len(healths)),
    column(lambda h: 100 * min(h["usage"]), ".1f"),
    column(lambda h: h["perplexity"][0], ".0f"),
    column(lambda h: 100 * h["collision_rate_before"], ".1f"),
    column(lambda h: 100 * h["cohesion"]["level1"], ".1f"),
    column(lambda h: h["cohesion"]["level1"] / h["cohesion"]["floor1"], ".1f"),
    column(lambda h: 100 * h["cohesion"]["training1"] if "training1" in h["cohesion"] else None, ".1f"),
    column(lambda h: 100 * h["cohesion"]["level2"], ".2f"),
    column(lambda h: h["cohesion"]["level2"] / h["cohesion"]["floor2"], ".1f"),
    column(lambda h: h.get("contrast_recall@10"), ".4f"),
    column(lambda h: h.get("frozen", {}).get("validation"), ".4f"),
    column(lambda h: h.get("frozen", {}).get("test"), ".4f"),
    column(lambda h: np.mean(list(h["specific_r2"].values())) if "specific_r2" in h else None, ".3f"),
  ]


def report(config: Any, workdir: pathlib.Path) -> str:
  """The tables of all that is done."""
  dataset, split, figures = read_data(config)
  healths = [
    ["tokenizer", "seeds", "least usage %", "perplexity, level 1", "collisions %", "cohesion 1 %", "times chance",
     "in training %", "cohesion 2 %", "times chance", "S2I Recall@10", "S2I Recall@10, frozen", "on test",
     "probe R²"]
  ]  # fmt: skip
  metrics = [["tokenizer", "head", "seeds", "validation Recall@10", "NDCG@10", "test Recall@10", "NDCG@10"]]
  for variant in VARIANTS:
    # An unfinished tokenizer has a health report too, but no artefact.
    done = sorted((workdir / variant).glob("*/tokenizer/semantic_ids.json"))
    if done:
      healths.append(health_row(variant, [read_health(path.parents[1]) for path in done]))
    for head in HEADS:
      results = [load_results(path.parent) for path in sorted((workdir / variant).glob(f"*/{head}/results.json"))]
      if results:
        cells = [
          mean([result[part][name] for result in results], ".4f")
          for part in ("validation", "test")
          for name in ("recall@10", "ndcg@10")
        ]
        metrics.append([variant, head, str(len(results)), *cells])
  for path in sorted(pathlib.Path(dataset.source).glob("sid_*.npy")):
    codes = read_array(path)
    if len(codes) != dataset.num_items:
      raise InputError(f"{path}: expected the codes of {dataset.num_items} items, got {len(codes)}; move it elsewhere")
    healths.append(health_row(f"published: {path.stem}", [measure(codes, split)]))
  head = (
    f"{figures['name']}: {figures['users']:,} users, {figures['items']:,} items, {figures['interactions']:,}"
    f" interactions, split {figures['split_hash']}; cohesion over {len(split.validation_target):,} held-out pairs"
  )
  return "\n\n".join([head, table(healths), *([table(metrics)] if len(metrics) > 1 else [])])


def main(argv: list[str]) -> None:
  """Does the work that the flags ask for, and prints the tables."""
  del argv
  ready_to_train()
  options = flags.FLAGS
  workdir = options.workdir
  with training(workdir):
    config = with_absolute_paths(options.config)
    for name in options.variants:
      if name not in VARIANTS:
        raise InputError(f"--variants: expected some of {', '.join(VARIANTS)}, got {name!r}")
    for seed in options.seeds:
      if not seed.isdecimal():
        raise InputError(f"--seeds: expected whole numbers from 0, got {seed!r}")
    if not options.report:
      do(
        config, workdir,
        variants=options.variants, seeds=[int(seed) for seed in options.seeds], recommender=options.recommender,
        ids_alone=options.ids_alone, sequence_recall=options.sequence_recall,
      )  # fmt: skip
    print(report(config, workdir))


if __name__ == "__main__":
  config_flags.DEFINE_config_file("config", None, "The config that every variant starts from.")
  define_path("workdir", "Gets a folder for each variant and seed.")
  flags.DEFINE_list("variants", list(VARIANTS), "Which tokenizers.")
  flags.DEFINE_list("seeds", ["0", "1", "2"], "Seeds of everything random.")
  flags.DEFINE_bool("recommender", True, "Whether to train the config's recommender on each tokenizer's IDs.")
  flags.DEFINE_bool("ids_alone", False, "Whether to train a recommender that knows items by their IDs alone.")
  flags.DEFINE_bool("sequence_recall", False, "Whether to train a history transformer on frozen quantized vectors.")
  flags.DEFINE_bool("report", False, "Train nothing; print the tables of what is there.")
  flags.mark_flags_as_required(["config", "workdir"])
  start(main)
