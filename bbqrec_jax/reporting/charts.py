"""The charts of a report, as Vega-Lite: the page draws them in the browser, and the same make its PNGs."""

from collections.abc import Sequence
from typing import Any

import altair as alt

Rows = Sequence[dict[str, Any]]
HEIGHT = 240


def _data(rows: Rows) -> alt.Data:
  return alt.Data(values=list(rows))


def _field(name: str, kind: str) -> str:
  """A field in the shorthand, which gives brackets, dots and colons a meaning."""
  for character in "[].:":
    name = name.replace(character, f"\\{character}")
  return f"{name}:{kind}"


def lines(rows: Rows, *, y: str, colour: str, legend: bool = True) -> alt.Chart:
  """Values over steps, a line each."""
  return (
    alt.Chart(_data(rows))
    .mark_line(point={"size": 18}, strokeWidth=1.8)
    .encode(
      x=alt.X("step:Q", title="step"),
      y=alt.Y("value:Q", title=y, scale=alt.Scale(zero=False)),
      color=alt.Color(_field(colour, "N"), title=None, legend=alt.Legend(orient="top") if legend else None),
      tooltip=[alt.Tooltip(_field(colour, "N")), "step:Q", alt.Tooltip("value:Q", format=".4~g")],
    )
    .properties(width="container", height=HEIGHT)
  )


def code_use(rows: Rows) -> alt.Chart:
  """How many items have each code, by rank, a line a level."""
  return (
    alt.Chart(_data(rows))
    .mark_line(interpolate="step-after", strokeWidth=1.8)
    .encode(
      x=alt.X("rank:Q", title="codes, the most used first"),
      y=alt.Y("items:Q", title="items"),
      color=alt.Color("level:N", title=None, legend=alt.Legend(orient="top")),
      tooltip=["level:N", "rank:Q", "items:Q"],
    )
    .properties(width="container", height=HEIGHT)
  )


def item_map(rows: Rows) -> alt.Chart:
  """Items in a plane, to be zoomed and moved; what is said of each shows on hover."""
  coded = bool(rows) and "hue" in rows[0]
  tooltip = ["item:N", *(["ID:N"] if coded else []), "in training:Q"]
  encoding: dict[str, Any] = {
    "x": alt.X("x:Q", axis=None), "y": alt.Y("y:Q", axis=None), "tooltip": tooltip,
    "size": alt.Size("in training:Q", scale=alt.Scale(type="sqrt", range=[10, 220]), legend=None),
  }  # fmt: skip
  if coded:
    encoding["color"] = alt.Color("hue:Q", scale=alt.Scale(scheme="sinebow", domain=[0, 1]), legend=None)
  return (
    alt.Chart(_data(rows))
    .mark_circle(opacity=0.75)
    .encode(**encoding)
    .properties(width="container", height=460)
    .interactive()
  )


def similarity(rows: Rows) -> alt.Chart:
  """The learned bias of attention against similarity, of one pair of streams; a line a head."""
  return (
    alt.Chart(_data(rows))
    .mark_line(point={"size": 14}, strokeWidth=1.8)
    .encode(
      x=alt.X("similarity:Q", title="similarity of two items"),
      y=alt.Y("bias:Q", title="bias of the attention score"),
      color=alt.Color("head:N", title=None, legend=alt.Legend(orient="top")),
      tooltip=["head:N", alt.Tooltip("similarity:Q", format=".3f"), alt.Tooltip("bias:Q", format="+.3f")],
    )
    .properties(width="container", height=HEIGHT)
  )


def candidate_similarity(rows: Rows) -> alt.Chart:
  """What is added to a candidate's score against the bucket of its similarity; a line a place of the history."""
  order = list(dict.fromkeys(row["place"] for row in rows))
  return (
    alt.Chart(_data(rows))
    .mark_line(point={"size": 22}, strokeWidth=1.8)
    .encode(
      x=alt.X("bucket:Q", title="bucket, the more similar the higher", axis=alt.Axis(tickMinStep=1, format="d")),
      y=alt.Y("added:Q", title="added to the score"),
      color=alt.Color("place:N", title=None, sort=order, legend=alt.Legend(orient="top")),
      tooltip=["place:N", "bucket:Q", alt.Tooltip("added:Q", format="+.3f")],
    )
    .properties(width="container", height=HEIGHT)
  )


def groups(rows: Rows, *, title: str) -> Any:
  """Metrics of groups of users, with 95 % intervals."""
  order = list(dict.fromkeys(row["group"] for row in rows))
  base = alt.Chart(_data(rows)).encode(
    x=alt.X("group:N", sort=order, title=title, axis=alt.Axis(labelAngle=0)),
    xOffset=alt.XOffset("metric:N", sort=["Recall@10", "NDCG@10"]),
  )
  bars = base.mark_bar().encode(
    y=alt.Y("value:Q", title=None),
    color=alt.Color("metric:N", title=None, sort=["Recall@10", "NDCG@10"], legend=alt.Legend(orient="top")),
    tooltip=[
      "group:N",
      "users:Q",
      "metric:N",
      alt.Tooltip("value:Q", format=".4f"),
      alt.Tooltip("error:Q", format=".4f"),
    ],
  )
  ends = (
    base.transform_calculate(low="max(0, datum.value - datum.error)", high="datum.value + datum.error")
    .mark_rule(strokeWidth=1.5)
    .encode(y=alt.Y("low:Q"), y2="high:Q")
  )
  return alt.layer(bars, ends).properties(width="container", height=HEIGHT)


def specification(chart: Any) -> dict[str, Any]:
  """A chart as Vega-Lite."""
  with alt.data_transformers.enable("default", max_rows=None):
    made: dict[str, Any] = chart.to_dict()
  made.pop("config", None)  # The page has its own, light and dark.
  return made
