"""A finished run as one page, and its charts as PNGs."""

import functools
import json
import os
import pathlib
import platform
from typing import Any, NamedTuple

import jax
import numpy as np

import bbqrec_jax
from bbqrec_jax.data.dataset import statistics
from bbqrec_jax.errors import as_given
from bbqrec_jax.layers.apply import apply
from bbqrec_jax.recommender.candidate_similarity import stream_vectors
from bbqrec_jax.recommender.items import item_features
from bbqrec_jax.recommender.settings import has_network
from bbqrec_jax.recommender.signals import is_fitted
from bbqrec_jax.recommender.train import tokenizer_folder
from bbqrec_jax.reporting import figures
from bbqrec_jax.runs.restore import Restored
from bbqrec_jax.runs.workdir import SHOWN, load_results
from bbqrec_jax.utils.files import is_given, read_archive, unfinished
from bbqrec_jax.utils.json_files import read_json
from bbqrec_jax.utils.settings import flatten

_PARTS = (
  ("popularity", "popularity, test"),
  ("validation", "validation"),
  ("test", "test"),
  ("test_without_history", "test, seen items left out"),
)
_SPLITS = {
  "leave-one-out": "leave-one-out: each user's last item is the test item, the one before it that of validation",
  "temporal": "temporal: what came after a moment that is the same for everybody is held out",
  "none": "none: nothing is held out, and figures are on what was learned from",
}


class Chart(NamedTuple):
  """A chart of the page.

  Attributes:
    name: of its file.
    title: that stands above it.
    text: what it shows, for who reads it and for who cannot see it.
    made: of Altair.
  """

  name: str
  title: str
  text: str
  made: Any


def training_charts(rows: figures.Rows) -> list[Chart]:
  """Loss and validation metrics of both stages, as far as there are any."""
  from bbqrec_jax.reporting import charts

  made = []
  watched = {"tokenizer": ("contrast_recall@10", "collision_rate"), "recommender": ("ndcg@10", "recall@10")}
  for stage, names in watched.items():
    loss = [row for row in rows if (row["stage"], row["kind"]) == (stage, "train") and row["metric"] in ("loss", "nll")]
    if {row["metric"] for row in loss} == {"loss", "nll"}:
      loss = [row for row in loss if row["metric"] == "loss"]
    if loss:
      text = f"Training loss of the {stage} by step, from {loss[0]['value']:.3g} to {loss[-1]['value']:.3g}."
      chart = charts.lines(loss, y="training loss", colour="metric", legend=False)
      made.append(Chart(f"{stage}_loss", f"Training loss, {stage}", text, chart))
    kept = [row for row in rows if (row["stage"], row["kind"]) == (stage, "validation") and row["metric"] in names]
    if kept:
      text = f"Validation metrics of the {stage} by step: {', '.join(sorted({row['metric'] for row in kept}))}."
      made.append(Chart(f"{stage}_validation", f"Validation, {stage}", text, charts.lines(kept, y="", colour="metric")))
  return made


def gather(workdir: pathlib.Path, restored: Restored) -> dict[str, Any]:
  """All that the page shows, by the names of its template.

  Args:
    workdir: of the run.
    restored: the run.

  Raises:
    InputError: if a file of the run is damaged.
  """
  from bbqrec_jax.reporting import charts

  dataset, ids, split = restored.dataset, restored.ids, restored.split
  results = load_results(workdir)
  names, counts = figures.names_of(restored), figures.popularity(split, num_items=dataset.num_items)
  ranks = read_archive(workdir / "ranks.npz")["test"]
  codes = None if ids is None else ids.codes
  if ids is None:
    vectors = np.asarray(apply(restored.model, restored.params, "item_vectors", restored.catalogue))
  else:
    vectors = ids.vectors("fused")
  training = training_charts(figures.curves(workdir / "metrics.jsonl"))
  groups = [
    Chart("by_length", "By length of the history", "Test metrics of users, grouped by the length of their history.",
          charts.groups(figures.by_group(ranks, split.history("test").lengths), title="items in the history")),
    Chart("by_popularity", "By popularity of the next item",
          "Test metrics of users, grouped by how often their next item is in training.",
          charts.groups(figures.by_group(ranks, counts[split.test_target]), title="times in training")),
  ]  # fmt: skip
  what = "the recommender's own vectors of the items" if ids is None else "the quantized vectors of the items"
  drawn = figures.item_map(vectors, codes, names, counts)
  share = "" if len(drawn) == dataset.num_items else f", {len(drawn):,} of {dataset.num_items:,} drawn"
  colour = "" if ids is None else "; the colour is the first code, the size how often the item is in training"
  mapped = Chart("map", "Map of the items", f"The first two principal components of {what}{share}{colour}.",
                 charts.item_map(drawn))  # fmt: skip
  coded: list[Chart] = []
  health, groups_of_items = None, None
  if ids is not None:
    rows = figures.code_use(ids.codes, num_codes=ids.num_codes)
    text = "How many items have each code of a level: a flat line is a codebook that is used evenly."
    coded.append(Chart("code_use", "Codebook use per level", text, charts.code_use(rows)))
    groups_of_items = figures.prefixes(ids.codes, names, counts)
    folder = tokenizer_folder(restored.config, workdir)
    health = read_json(folder / "health.json") if is_given(folder / "health.json") else None
  similarity: list[Chart] = []
  special: figures.Rows = []
  if restored.model.settings.num_streams:
    tables, edges = figures.learned_tables(restored.params), np.asarray(restored.catalogue.edges)
    rows, special = figures.similarity_curves(tables, edges, figures.pair_names(restored))
    for place, panel in enumerate(dict.fromkeys(row["panel"] for row in rows)):
      text = f"What is added to the attention score of two items by the similarity of {panel}, per head."
      own = [row for row in rows if row["panel"] == panel]
      similarity.append(Chart(f"similarity_{place + 1}", f"Similarity of {panel}", text, charts.similarity(own)))
  compared: list[Chart] = []
  special_compared: figures.Rows = []
  network = False
  if restored.catalogue.candidates is not None:
    settings = restored.model.settings.candidate_similarity
    streams = list(stream_vectors(settings, ids, item_features(restored.config, dataset.store)))
    tables_of_candidates = restored.params["candidate_similarity"]
    network = has_network(settings) and bool(is_fitted(tables_of_candidates))
    rows, special_compared = figures.candidate_curves(tables_of_candidates, streams)
    for place, panel in enumerate(dict.fromkeys(row["panel"] for row in rows)):
      text = (
        f"What similarity to an item of the history, by {panel}, adds to a candidate's score; a line for each place."
      )
      own = [row for row in rows if row["panel"] == panel]
      compared.append(Chart(f"candidates_{place + 1}", panel.capitalize(), text, charts.candidate_similarity(own)))
  shown = [name for name in SHOWN if name in results["test"]]
  return {
    "name": results["data"]["name"],
    "model": results["model"],
    "results": results,
    "metrics": shown,
    "parts": [(label, results[part]) for part, label in _PARTS if part in results],
    "data": statistics(dataset, split),
    "split": _SPLITS[split.kind],
    "learned": split.kind == "none",
    "ranked": len(ranks),
    "repeats": figures.repeats(split),
    "training": training,
    "coded": coded,
    "health": health,
    "map": mapped,
    "prefixes": groups_of_items,
    "similarity": similarity,
    "special": special,
    "compared": compared,
    "special_compared": special_compared,
    "network": network,
    "groups": groups,
    "extremes": figures.extremes(restored, split, ranks, names),
    "config": flatten(restored.config),
    "semantic_ids": None if ids is None else ids.fingerprint,
    "workdir": as_given(str(workdir)),
    "versions": {
      "bbqrec_jax": bbqrec_jax.__version__,
      "jax": jax.__version__,
      "numpy": np.__version__,
      "python": platform.python_version(),
    },
  }


def charts_of(told: dict[str, Any]) -> list[Chart]:
  """All charts that the page shows."""
  return [*told["training"], *told["coded"], told["map"], *told["similarity"], *told["compared"], *told["groups"]]


@functools.cache
def _library() -> str:
  """Vega, Vega-Lite and what puts their charts into a page, as one script."""
  import vl_convert

  return vl_convert.javascript_bundle("window.vegaEmbed = vegaEmbed;").replace("</script", "<\\/script")


def render(told: dict[str, Any]) -> str:
  """The page: one HTML file that fetches nothing.

  Args:
    told: what `gather` gives.
  """
  import jinja2

  from bbqrec_jax.reporting import charts

  environment = jinja2.Environment(
    loader=jinja2.FileSystemLoader(pathlib.Path(__file__).parent),
    autoescape=True,
    undefined=jinja2.StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
  )
  specifications = {chart.name: charts.specification(chart.made) for chart in charts_of(told)}
  # "</" would end the script that holds it, wherever a title has it.
  data = json.dumps(specifications, ensure_ascii=True, separators=(",", ":")).replace("<", "\\u003c")
  return environment.get_template("report.html").render(told, specifications=data, library=_library())


def write_report(folder: pathlib.Path, told: dict[str, Any], *, pictures: bool = True) -> list[pathlib.Path]:
  """Writes `report.html` and a PNG per chart into a folder; each file is whole or not there.

  Args:
    folder: that is made; files of an earlier report are replaced.
    told: what `gather` gives.
    pictures: whether PNGs are written.

  Returns:
    What was written.
  """
  import vl_convert

  from bbqrec_jax.reporting import charts

  folder.mkdir(parents=True, exist_ok=True)
  contents: dict[str, bytes] = {"report.html": render(told).encode()}
  for chart in charts_of(told) if pictures else []:
    made = charts.specification(chart.made) | {"width": 640, "background": "white", "title": chart.title}
    contents[f"{chart.name}.png"] = vl_convert.vegalite_to_png(made, scale=1.5)
  for name, content in contents.items():
    unfinished(folder / name).write_bytes(content)
    os.replace(unfinished(folder / name), folder / name)
  return [folder / name for name in contents]
