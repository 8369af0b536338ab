"""The learned bias of attention as a figure."""

from collections.abc import Mapping
from typing import Any

import numpy as np


def bucket_centres(edges: np.ndarray) -> np.ndarray:
  """A similarity for each bucket to stand at: edges [n - 1] -> [n], midway between edges.

  The two at the ends stand as far out as their neighbours are wide.
  """
  if len(edges) < 2:
    return np.array([edges[0] - 0.5, edges[0] + 0.5]) if len(edges) else np.zeros(1)
  return np.concatenate([
    [edges[0] - (edges[1] - edges[0]) / 2], (edges[1:] + edges[:-1]) / 2, [edges[-1] + (edges[-1] - edges[-2]) / 2]
  ])  # fmt: skip


def similarity_figure(tables: np.ndarray, edges: np.ndarray, names: list[str]) -> Any:
  """Bias against similarity, a panel for each layer that has tables of its own and each stream pair, a line a head.

  Args:
    tables: [P, H, n + 2], or one of these a layer; the last two columns, an item with itself and a missing stream, are
      given in the legend. [P, H, 3] where the bias is continuous: slope, itself, missing.
    edges: [P, n - 1] bucket edges; [P, 0] where the bias is continuous.
    names: of the P pairs.

  Returns:
    A matplotlib figure.
  """
  from matplotlib.figure import Figure

  layers = tables if tables.ndim == 4 else tables[None]
  rows, columns = len(layers), len(names)
  figure = Figure(figsize=(4 * columns, 3.2 * rows), layout="constrained")
  panels = figure.subplots(rows, columns, squeeze=False, sharey=True)
  for layer, own in enumerate(layers):
    for pair, name in enumerate(names):
      panel = panels[layer, pair]
      for head, row in enumerate(own[pair]):
        label = f"head {head + 1}: itself {row[-2]:+.2f}, missing {row[-1]:+.2f}"
        if edges.shape[1]:
          panel.plot(bucket_centres(edges[pair]), row[:-2], marker=".", label=label)
        else:
          panel.plot([-1, 1], [-row[0], row[0]], label=label)
      panel.axhline(0, color="grey", linewidth=0.5)
      panel.set_title(name if rows == 1 else f"layer {layer + 1}, {name}")
      panel.set_xlabel("similarity")
      panel.legend(fontsize="x-small")
    panels[layer, 0].set_ylabel("bias of the attention score")
  return figure


def learned_tables(params: Mapping[str, Any]) -> np.ndarray:
  """The bias tables among a recommender's parameters; of two towers the generative one has them."""
  return np.asarray(params.get("generative", params)["similarity_tables"])
