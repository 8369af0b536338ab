"""What a report is made of: figures from a finished run, as plain lists and dictionaries."""

import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from bbqrec_jax.data.interactions import Split, distinct_items, select_users
from bbqrec_jax.ops.candidate_similarity import principal_axes
from bbqrec_jax.ops.ranking import MISS, user_ndcg
from bbqrec_jax.recommender.items import similarity_streams
from bbqrec_jax.runs.restore import Restored
from bbqrec_jax.runs.tracking import read_records
from bbqrec_jax.serving.recommend import recommend_all

Rows = list[dict[str, Any]]

_DRAWN = 5000  # Items of a map: more make the page heavy and tell no more.
_SHOWN = 4  # Users at each end.
_PLACES = {0: "last item", 1: "second last", 4: "fifth last", 9: "tenth last"}  # Of a history, that have a line.


def curves(path: pathlib.Path) -> Rows:
  """The records of `metrics.jsonl` as rows of stage, kind, step, metric and value; lines that are none are left out."""
  rows: Rows = []
  for record in read_records(path):
    about = {name: record.pop(name) for name in ("stage", "kind", "step")}
    record.pop("time", None)
    rows += [
      about | {"metric": name, "value": value}
      for name, value in record.items()
      if isinstance(value, int | float) and not isinstance(value, bool) and np.isfinite(value)
    ]
  return rows


def code_use(codes: np.ndarray, *, num_codes: int) -> Rows:
  """How many items have each code, most used first, per level: codes [N, L] -> rows of level, rank, items."""
  rows: Rows = []
  for level in range(codes.shape[1]):
    counts = np.sort(np.bincount(codes[:, level], minlength=num_codes))[::-1]
    rows += [{"level": f"level {level + 1}", "rank": rank, "items": int(count)} for rank, count in enumerate(counts, 1)]
  return rows


def plane(vectors: np.ndarray) -> np.ndarray:
  """The first two principal components of vectors [N, d]: [N, 2], each of unit variance."""
  centred = vectors - vectors.mean(axis=0)
  flat = centred @ principal_axes(centred, 2)
  flat = np.pad(flat, ((0, 0), (0, 2 - flat.shape[1])))
  spread = flat.std(axis=0)
  return flat / np.where(spread > 0, spread, 1)


def item_map(
  vectors: np.ndarray, codes: np.ndarray | None, names: Sequence[str], counts: np.ndarray, *, seed: int = 0
) -> Rows:
  """Items in a plane, with what is to be said of each; drawn ones where there are many.

  Args:
    vectors: [N, d].
    codes: [N, L], or None.
    names: what to call the items.
    counts: [N] how often each was in training.
    seed: of the draw.
  """
  chosen = np.sort(np.random.default_rng(seed).permutation(len(vectors))[:_DRAWN])
  places = plane(vectors)[chosen]
  rows: Rows = []
  for row, (x, y) in zip(chosen.tolist(), places.round(3).tolist(), strict=True):
    one = {"x": x, "y": y, "item": names[row], "in training": int(counts[row])}
    if codes is not None:
      first = int(codes[row, 0])
      # Codes have no order: steps of the golden ratio put neighbouring numbers far apart on the colour wheel.
      one |= {"code": first, "hue": round(first * 0.618034 % 1, 3), "ID": " ".join(map(str, codes[row].tolist()))}
    rows.append(one)
  return rows


def prefixes(codes: np.ndarray, names: Sequence[str], counts: np.ndarray, *, groups: int = 6, most: int = 6) -> Rows:
  """Items that share the beginning of their IDs: for popular items, the longest prefix that a few others have.

  Args:
    codes: [N, L].
    names: what to call the items.
    counts: [N] how often each was in training.
    groups: how many.
    most: items of one.

  Returns:
    Rows of prefix, how many items share it, and `items`: some of them, with their IDs.
  """
  found: Rows = []
  taken: set[int] = set()
  for item in np.argsort(-counts, kind="stable").tolist():
    if len(found) == groups:
      break
    if int(codes[item, 0]) in taken:
      continue
    for length in range(codes.shape[1] - 1, 0, -1):
      same = np.flatnonzero(np.all(codes[:, :length] == codes[item, :length], axis=1))
      if len(same) >= 4 or length == 1:
        break
    taken.add(int(codes[item, 0]))
    others = [row for row in same[np.argsort(-counts[same], kind="stable")].tolist() if row != item][: most - 1]
    shown = [{"id": codes[row].tolist(), "item": names[row], "count": int(counts[row])} for row in (item, *others)]
    found.append({"prefix": codes[item, :length].tolist(), "count": len(same), "items": shown})
  return found


def bucket_centres(edges: np.ndarray) -> np.ndarray:
  """A similarity for each bucket to stand at: edges [n - 1] -> [n], midway between edges.

  The two at the ends stand as far out as their neighbours are wide.
  """
  if len(edges) < 2:
    return np.array([edges[0] - 0.5, edges[0] + 0.5]) if len(edges) else np.zeros(1)
  return np.concatenate([
    [edges[0] - (edges[1] - edges[0]) / 2], (edges[1:] + edges[:-1]) / 2, [edges[-1] + (edges[-1] - edges[-2]) / 2]
  ])  # fmt: skip


def learned_tables(params: Mapping[str, Any]) -> np.ndarray:
  """The bias tables among a recommender's parameters; of two towers the generative one has them."""
  return np.asarray(params.get("generative", params)["similarity_tables"])


def similarity_curves(tables: np.ndarray, edges: np.ndarray, names: Sequence[str]) -> tuple[Rows, Rows]:
  """Bias of attention against similarity, per stream pair and head.

  Args:
    tables: [P, H, n + 2]; the last two columns are an item with itself and a missing stream. [P, H, 3]
      where the bias is continuous: slope, itself, missing.
    edges: [P, n - 1] bucket edges; [P, 0] where the bias is continuous.
    names: of the P pairs.

  Returns:
    Rows of panel, head, similarity, bias; and rows of panel, head, itself, missing.
  """
  rows: Rows = []
  special: Rows = []
  for pair, name in enumerate(names):
    for head, values in enumerate(tables[pair].astype(float)):
      about = {"panel": name, "head": f"head {head + 1}"}
      centres, biases = bucket_centres(edges[pair]), values[:-2]
      if not edges.shape[1]:
        centres, biases = np.array([-1.0, 1.0]), np.array([-values[0], values[0]])
      rows += [about | {"similarity": float(at), "bias": float(bias)} for at, bias in zip(centres, biases, strict=True)]
      special.append(about | {"itself": float(values[-2]), "missing": float(values[-1])})
  return rows, special


def candidate_curves(tables: Mapping[str, Any], names: Sequence[str]) -> tuple[Rows, Rows]:
  """What candidate similarity adds to scores, by stream, bucket and place of the history's item.

  More than for the lowest bucket: what a whole row of a table has in common changes no list.

  Args:
    tables: parameters of `CandidateSimilarity`: `tables` [S, R, n + 2], the last two columns being an item with itself
      and a missing vector, and, where there is behaviour, `neighbour_table` [R, n].
    names: of the S streams of vectors.

  Returns:
    Rows of panel, place, bucket, added; and rows of panel, place, itself, missing. What are no neighbours stand at -1
    of behaviour, where nothing is added.
  """
  rows: Rows = []
  special: Rows = []
  for panel, table in zip(names, np.asarray(tables["tables"], np.float64), strict=True):
    for place, label in _PLACES.items():
      if place < len(table):
        own, about = table[place] - table[place, 0], {"panel": panel, "place": label}
        rows += [about | {"bucket": bucket, "added": float(added)} for bucket, added in enumerate(own[:-2])]
        special.append(about | {"itself": float(own[-2]), "missing": float(own[-1])})
  for place, label in _PLACES.items():
    if place < len(tables.get("neighbour_table", ())):
      own = [0.0, *np.asarray(tables["neighbour_table"][place], np.float64)]
      about = {"panel": "behaviour", "place": label}
      rows += [about | {"bucket": bucket, "added": float(added)} for bucket, added in enumerate(own, start=-1)]
  return rows, special


def by_group(ranks: np.ndarray, values: np.ndarray, *, groups: int = 5) -> Rows:
  """Recall@10 and NDCG@10 of users in groups of about equal size by a whole number: rows, ascending.

  Args:
    ranks: [U] of each user's target, from 0.
    values: [U] int, that users are grouped by.
    groups: at most.
  """
  edges = np.unique(np.quantile(values, np.linspace(0, 1, groups + 1)[1:-1], method="lower"))
  place = np.searchsorted(edges, values, side="left")
  rows: Rows = []
  for group in range(len(edges) + 1):
    own = place == group
    if not own.any():
      continue
    least, most = int(values[own].min()), int(values[own].max())
    rows += [
      {
        "group": str(least) if least == most else f"{least}–{most}",
        "users": int(own.sum()),
        "metric": metric,
        "value": float(of[own].mean()),
        "error": float(1.96 * of[own].std() / np.sqrt(own.sum())),
      }
      for metric, of in (("Recall@10", (ranks < 10).astype(float)), ("NDCG@10", user_ndcg(ranks)))
    ]
  return rows


def extremes(restored: Restored, split: Split, ranks: np.ndarray, names: Sequence[str]) -> dict[str, Rows]:
  """The users that are served best and worst: what they had, what came next, and what was recommended."""
  histories = split.history("test")
  lengths = histories.lengths
  order = np.lexsort((-lengths, ranks))  # By rank, the longer histories first.
  ends = {"best": order[:_SHOWN], "worst": order[::-1][:_SHOWN]}
  found: dict[str, Rows] = {}
  for end, users in ends.items():
    own = select_users(histories, users)
    lists = recommend_all(
      restored.model, restored.params, restored.catalogue, own, top=5,
      beam_width=restored.config.evaluation.beam_width, repeat=True, batch_size=16,
    )  # fmt: skip
    found[end] = [
      {
        "user": user,
        "history": [names[item] for item in own.history(place)[-8:]],
        "more": max(0, int(own.lengths[place]) - 8),
        "next": names[split.test_target[users[place]]],
        "rank": None if ranks[users[place]] == MISS else int(ranks[users[place]]) + 1,
        "recommended": [names[item] for item in items],
        "hit": int(split.test_target[users[place]]) in items.tolist(),
      }
      for place, (user, items, _) in enumerate(lists)
    ]
  return found


def names_of(restored: Restored) -> list[str]:
  """What to call each item: its title, or its id where it has none."""
  dataset = restored.dataset
  return [title or f"item {dataset.item_ids[row]}" for row, title in enumerate(dataset.titles)]


def pair_names(restored: Restored) -> list[str]:
  """Names of the stream pairs whose similarity reweights attention."""
  streams = similarity_streams(restored.config, restored.ids)
  return [streams[a] if a == b else f"{streams[a]} with {streams[b]}" for a, b in restored.model.settings.pairs]


def popularity(split: Split, *, num_items: int) -> np.ndarray:
  """[N] how often each item is in the training histories."""
  return np.bincount(split.train.items, minlength=num_items)


def repeats(split: Split) -> float:
  """The share of users whose test item is one that they had before."""
  own = distinct_items(split.history("test"))
  owners = np.repeat(np.arange(own.num_users), own.lengths)
  return float(np.isin(np.arange(own.num_users), owners[own.items == split.test_target[owners]]).mean())
