"""The data card: a page that says what a data set is, and what is odd about it, with pictures of its distributions."""

import contextlib
import html
from collections import Counter
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from bbqrec_jax.data.dataset import Dataset, statistics
from bbqrec_jax.data.interactions import Split
from bbqrec_jax.data.preparation.alike import alike
from bbqrec_jax.data.preparation.items import FIELDS, ItemFigures
from bbqrec_jax.utils.files import is_given
from bbqrec_jax.utils.json_files import read_json, write_json

_BARS = 24  # Of a histogram of times or prices.
_FEATURES = "<!--features-->", "<!--end of features-->"  # Around what `note_features` writes.
_EXAMPLES = 10  # Of items like another.
_FIRST, _LAST = -62_000_000_000, 250_000_000_000  # Seconds of the years that a calendar has.


class Histogram(NamedTuple):
  """Counts of values in bins.

  Attributes:
    name: of its picture's file.
    title: what is counted.
    labels: of the bins, n.
    counts: of the bins, n.
  """

  name: str
  title: str
  labels: tuple[str, ...]
  counts: tuple[int, ...]


def counted(name: str, title: str, values: np.ndarray) -> Histogram:
  """A histogram of whole numbers: each by itself where they are few, else in bins 0, 1, 2, 3-4, 5-8, 9-16 and so on.

  Args:
    name: of the picture.
    title: what is counted.
    values: [n] int.
  """
  low, high = (int(values.min()), int(values.max())) if len(values) else (0, 0)
  if high - low < _BARS:
    counts = np.bincount(values - low, minlength=1)
    return Histogram(name, title, tuple(map(str, range(low, high + 1))), tuple(counts.tolist()))
  bins = np.where(values > 0, np.ceil(np.log2(np.maximum(values, 1))).astype(np.int64) + 1, 0)
  counts = np.bincount(bins)
  labels = ["0", "1", "2", *(f"{2**power // 2 + 1}–{2**power}" for power in range(2, len(counts)))]
  first = int(np.argmax(counts > 0))
  return Histogram(name, title, tuple(labels[first : len(counts)]), tuple(counts[first:].tolist()))


def evenly(name: str, title: str, values: np.ndarray, label: Any) -> Histogram:
  """A histogram of numbers in bins of one width.

  Args:
    name: of the picture.
    title: what is counted.
    values: [n] float, finite.
    label: (lower edge of a bin) -> what to call it.
  """
  counts, edges = np.histogram(values, bins=_BARS if np.ptp(values) > 0 else 1)
  return Histogram(name, title, tuple(map(label, edges[:-1])), tuple(counts.tolist()))


def _date(second: float) -> str:
  return datetime.fromtimestamp(min(max(second, _FIRST), _LAST), UTC).strftime("%Y-%m-%d")


def histograms(dataset: Dataset, figures: ItemFigures) -> Iterator[Histogram]:
  """What the card shows of a data set and its items."""
  interactions = dataset.interactions
  yield counted("history_length", "Users by number of interactions", interactions.lengths)
  yield counted(
    "item_popularity",
    "Items by number of interactions",
    np.bincount(interactions.items, minlength=dataset.num_items),
  )
  if interactions.times is not None:
    dated = np.abs(interactions.times).max(initial=0) > 1e8
    label = _date if dated else lambda second: f"{second:.3g} s"
    yield evenly("time", "Interactions over time", interactions.times, label)
  for field, lengths in figures.lengths.items():
    if lengths:
      yield counted(f"{field}_words", f"Items by words in their {field}", np.array(lengths))
  if figures.prices:
    logs = np.log10(np.maximum(figures.prices, 0.01))
    yield evenly("price", "Items by price", logs, lambda power: f"{10**power:,.2f}")
  for name, counts in (("language", figures.languages), ("category", figures.categories), ("brand", figures.brands)):
    if counts:
      yield _most_common(name, f"Items by {name}" + (" of their text, guessed" if name == "language" else ""), counts)


def _most_common(name: str, title: str, counts: Counter[str]) -> Histogram:
  most = counts.most_common(12)
  rest = counts.total() - sum(count for _, count in most)
  labels = [label if len(label) <= 28 else label[:27] + "…" for label, _ in most]
  return Histogram(
    name,
    title,
    (*labels, *(["all others"] if rest else [])),
    (*(count for _, count in most), *([rest] if rest else [])),
  )


def findings(dataset: Dataset, split: Split, report: dict[str, Any], figures: ItemFigures) -> dict[str, Any]:
  """What is odd about a data set, as figures, ready for JSON."""
  interactions = dataset.interactions
  trained = np.bincount(split.train.items, minlength=dataset.num_items) > 0
  held_out = np.zeros(dataset.num_items, bool)
  held_out[split.test_target] = held_out[split.validation_target] = True
  user = np.repeat(np.arange(interactions.num_users), interactions.lengths)
  pairs = alike(dataset.titles, np.array(figures.brand_numbers))
  seen = len(np.unique(user * dataset.num_items + interactions.items))
  return {
    "items_only_held_out": int(np.sum(held_out & ~trained)),
    "items_without_interactions": int(np.sum(np.bincount(interactions.items, minlength=dataset.num_items) == 0)),
    "test_targets_unseen_in_training": float(np.mean(~trained[split.test_target])),
    "repeated_interactions": interactions.num_interactions - seen,
    "same_time_as_the_one_before": report["same_time"],
    "items_like_another": len(pairs),
    "items_like_another_examples": [
      [f(item) for item in pair for f in (lambda item: str(dataset.item_ids[item]), dataset.titles.__getitem__)]
      for pair in pairs[:_EXAMPLES]
    ],
    "items_that_have": {field: figures.have[field] for field in FIELDS},
    "not_taken_over": dict(figures.unread),
    "languages": dict(figures.languages.most_common()),
    "rows_set_aside": {file: sum(reasons.values()) for file, reasons in report["quarantine"].items()},
  }


def write_card(folder: Path, dataset: Dataset, split: Split, report: dict[str, Any], figures: ItemFigures) -> None:
  """Writes `card.html` and `card.json` and, where matplotlib is installed, `card/*.png`.

  Args:
    folder: of the data set.
    dataset: what is in it.
    split: of it.
    report: what `preparation.json` holds.
    figures: of the items.
  """
  shown = list(histograms(dataset, figures))
  about = statistics(dataset, split) | {"source": report["log"]}
  odd = findings(dataset, split, report, figures)
  if dataset.interactions.times is not None and len(dataset.interactions.times):
    about["first"], about["last"] = (float(f(dataset.interactions.times)) for f in (np.min, np.max))
  write_json(
    folder / "card.json",
    {"statistics": about, "findings": odd, "histograms": [histogram._asdict() for histogram in shown]},
  )
  (folder / "card.html").write_text(_page(about, odd, report, shown, figures.count), encoding="utf-8")
  with contextlib.suppress(ImportError):  # The page has the same pictures.
    _draw(folder / "card", shown)


def note_features(folder: Path, made: Sequence[tuple[str, str, int, dict[str, int]]]) -> None:
  """Adds to the card of a data set what features were made of its items; does nothing where there is no card.

  Args:
    folder: of the data set.
    made: name, how it was made, how many items have it, and how much was left out, of each modality.
  """
  page, facts = folder / "card.html", folder / "card.json"
  if not (is_given(page) and is_given(facts)):
    return
  rows = [
    (html.escape(name), html.escape(by), count, html.escape("; ".join(f"{n:,} {what}" for what, n in out.items())))
    for name, by, count, out in made
  ]
  begin, end = _FEATURES
  before, _, rest = page.read_text(encoding="utf-8").partition(begin)
  table = f"<h2>Features</h2>{_table(('Modality', 'Made by', 'Items', 'Left out'), rows)}"
  page.write_text(f"{before}{begin}{table}{end}{rest.partition(end)[2]}", encoding="utf-8")
  told = {name: {"made_by": by, "items": count, "left_out": out} for name, by, count, out in made}
  write_json(facts, read_json(facts, mend="prepare the data set again") | {"features": told})


def _draw(folder: Path, shown: Sequence[Histogram]) -> None:
  """One PNG a histogram."""
  from matplotlib.figure import Figure

  folder.mkdir(exist_ok=True)
  for histogram in shown:
    figure = Figure(figsize=(6, 3), layout="constrained")
    axes = figure.add_subplot()
    axes.bar(range(len(histogram.counts)), histogram.counts, color="#3b6ea5")
    step = -(-len(histogram.labels) // 12)
    plain = [label.replace("$", r"\$") for label in histogram.labels]
    axes.set_xticks(range(0, len(plain), step), plain[::step], rotation=45, ha="right", fontsize=8)
    axes.set_title(histogram.title, fontsize=10)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(folder / f"{histogram.name}.png", dpi=120)


def _svg(histogram: Histogram) -> str:
  """A histogram as a picture within the page."""
  width, height, top, foot = 460, 220, 22, 70
  count, most = len(histogram.counts), max(*histogram.counts, 1)
  slot = min(width / count, 70)
  every = -(-count // 13)
  bars, labels = [], []
  for place, (label, value) in enumerate(zip(histogram.labels, histogram.counts, strict=True)):
    tall = (height - top - foot) * value / most
    x, y = place * slot, height - foot - tall
    bars.append(
      f'<rect x="{x + 0.1 * slot:.1f}" y="{y:.1f}" width="{0.8 * slot:.1f}"'
      f' height="{max(tall, 0.5 * (value > 0)):.1f}"><title>{html.escape(label)}: {value:,}</title></rect>'
    )
    if count <= 8 or value == most:
      bars.append(f'<text x="{x + slot / 2:.1f}" y="{y - 5:.1f}" text-anchor="middle">{value:,}</text>')
    if place % every == 0:
      middle = x + slot / 2
      short = label if len(label) <= 13 else label[:12] + "…"
      labels.append(
        f'<text x="{middle:.1f}" y="{height - foot + 14}" transform="rotate(-38 {middle:.1f} {height - foot + 14})"'
        f' text-anchor="end">{html.escape(short)}</text>'
      )
  return (
    f'<figure><figcaption>{html.escape(histogram.title)}</figcaption><svg viewBox="-45 0 {width + 50} {height}"'
    f' role="img" aria-label="{html.escape(histogram.title)}"><line x1="0" x2="{width}" y1="{height - foot}"'
    f' y2="{height - foot}"/>{"".join(bars)}{"".join(labels)}</svg></figure>'
  )


_STYLE = """
:root{--ink:#1d2530;--soft:#5d6877;--line:#dde2e8;--page:#fbfcfd;--card:#fff;--bar:#3b6ea5;--warn:#9a5b00}
@media(prefers-color-scheme:dark){:root{--ink:#e4e8ee;--soft:#9aa5b3;--line:#343c47;--page:#15191f;--card:#1c222a;
--bar:#76a9dd;--warn:#e0a24a}}
body{font:15px/1.5 system-ui,sans-serif;color:var(--ink);background:var(--page);margin:0 auto;max-width:1080px;
padding:28px 24px 60px}h1{font-size:26px;margin:0}h2{font-size:18px;margin:34px 0 10px}
.soft,figcaption,th{color:var(--soft)}.tiles{display:flex;flex-wrap:wrap;gap:12px;margin-top:18px}
.tile{background:var(--card);border:1px solid var(--line);border-radius:8px;padding:10px 16px;min-width:104px}
.tile b{display:block;font-size:21px;font-variant-numeric:tabular-nums}
.grid{display:grid;grid-template-columns:repeat(auto-fill,minmax(330px,1fr));gap:14px}
figure{background:var(--card);border:1px solid var(--line);border-radius:8px;margin:0;padding:10px 12px}
svg{width:100%;height:auto}rect{fill:var(--bar)}line{stroke:var(--line)}text{fill:var(--soft);font-size:13px}
table{border-collapse:collapse;width:100%;background:var(--card);border:1px solid var(--line)}
th,td{text-align:left;padding:6px 12px;border-bottom:1px solid var(--line);vertical-align:top}
td.n,th.n{text-align:right;font-variant-numeric:tabular-nums;white-space:nowrap}th{font-weight:500}
.warn{color:var(--warn);font-weight:600}.meter{background:var(--line);border-radius:4px;height:8px;min-width:90px}
.meter i{display:block;background:var(--bar);height:8px;border-radius:4px}.wide{overflow-x:auto}code{font-size:13px}
"""


def _table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
  """A table; numbers to the right."""
  right = [bool(rows) and all(isinstance(row[place], int) for row in rows) for place in range(len(header))]

  def cell(tag: str, value: object, place: int) -> str:
    text = f"{value:,}" if isinstance(value, int) else str(value)
    return f"<{tag}{' class=n' if right[place] else ''}>{text}</{tag}>"

  head = "".join(cell("th", html.escape(name), place) for place, name in enumerate(header))
  body = "".join(f"<tr>{''.join(cell('td', value, place) for place, value in enumerate(row))}</tr>" for row in rows)
  return f'<div class="wide"><table><tr>{head}</tr>{body}</table></div>'


def _checks(odd: dict[str, Any], interactions: int, items: int) -> Iterator[tuple[bool, str, str]]:
  """(whether it calls for a look, what it is, what it means) of each thing that may be odd."""
  if odd["items_only_held_out"]:
    yield (
      odd["test_targets_unseen_in_training"] > 0.02,
      f"{odd['items_only_held_out']:,} items are in no training history, only held out;"
      f" {odd['test_targets_unseen_in_training']:.1%} of the test items are such",
      "only what is told by features can find them; raise --min_per_item to leave them out",
    )
  if odd["items_without_interactions"]:
    yield (
      True,
      f"{odd['items_without_interactions']:,} items have no interactions",
      "kept by --unseen_items: they can be recommended by their features alone",
    )
  tied = odd["same_time_as_the_one_before"]
  if tied:
    yield (
      tied > 0.05 * interactions,
      f"{tied:,} interactions ({tied / interactions:.1%}) came at the very time of the one before them",
      "their order is by the rule of --ties, and tells nothing; times of days rather than seconds do so",
    )
  repeats = odd["repeated_interactions"]
  if repeats:
    yield (
      repeats > 0.2 * interactions,
      f"{repeats:,} interactions ({repeats / interactions:.1%}) are of an item that the user had before",
      "if they are no true repeats, --duplicates=first leaves them out",
    )
  if odd["items_like_another"]:
    yield (
      odd["items_like_another"] > 0.01 * items,
      f"{odd['items_like_another']:,} items have nearly the title of another, with the same numbers and no other brand",
      "they split what is known of one thing; join their ids if they are one",
    )
  for what, count in odd["not_taken_over"].items():
    yield (
      True,
      f"{count:,} {what} are not taken over",
      "the items stay, without them; correct the table if it means them",
    )
  for file, count in odd["rows_set_aside"].items():
    yield True, f"{count:,} rows of {file} could not be used", "see quarantine.jsonl: row, reason and text of each"


def _page(
  about: dict[str, Any], odd: dict[str, Any], report: dict[str, Any], shown: Sequence[Histogram], items: int
) -> str:
  length = about["history_length"]
  tiles = {
    "users": f"{about['users']:,}",
    "items": f"{about['items']:,}",
    "interactions": f"{about['interactions']:,}",
    "density": f"{about['density']:.3%}",
    "median history": f"{length['median']:g}",
    "held by the top 10 % of items": f"{about['head_share']:.0%}",
  }
  if about.get("last", 0) > 1e8:
    tiles["from, to"] = f"{_date(about['first'])} – {_date(about['last'])}"
  boxes = "".join(
    f'<div class="tile"><b>{value}</b><span class="soft">{name}</span></div>' for name, value in tiles.items()
  )
  steps = _table(
    ("Step", "Interactions", "Users", "Items"),
    [(html.escape(one["name"]), one["interactions"], one["users"], one["items"]) for one in report["steps"]],
  )
  have = []
  for field, count in odd["items_that_have"].items():
    share = count / items
    have.append((field, f'<div class="meter"><i style="width:{100 * share:.1f}%"></i></div>', count, items - count))
  found = [
    (f'<span class="warn">{"look" if warns else ""}</span>', html.escape(what), html.escape(means))
    for warns, what, means in _checks(odd, about["interactions"], items)
  ]
  checks = _table(("", "What was found", "What it means"), found) if found else "<p>Nothing odd was found.</p>"
  alike = _table(
    ("Item", "Title", "Another like it", "Title"),
    [tuple(map(html.escape, row)) for row in odd["items_like_another_examples"]],
  )
  aside = [
    (html.escape(file), html.escape(reason), count)
    for file, reasons in report["quarantine"].items()
    for reason, count in reasons.items()
  ]
  read = [(html.escape(str(report["log"])), html.escape(report["columns"]["log"]), html.escape(report["times"]))]
  if report["item_table"]:
    read.append((html.escape(report["item_table"]), html.escape(report["columns"]["items"]), ""))
  parts = [
    f"<h1>{html.escape(about['name'])}</h1>",
    '<div class="soft">data card; split'
    f" <code>{about['split_hash']}</code>, ids <code>{about['ids_hash']}</code></div>",
    f'<div class="tiles">{boxes}</div>',
    "<h2>From the log to the data set</h2>",
    steps,
    "<h2>Worth a look</h2>",
    checks,
    "<h2>Distributions</h2>",
    f'<div class="grid">{"".join(map(_svg, shown))}</div>',
    "<h2>What items have</h2>",
    _table(("Field", "Share", "Have it", "Lack it"), have),
    "<h2>What was read</h2>",
    _table(("File", "Columns", "Times"), read),
  ]
  if odd["items_like_another_examples"]:
    parts += ["<h2>Items like another</h2>", alike]
  if aside:
    parts += ["<h2>Rows set aside</h2>", _table(("File", "Reason", "Rows"), aside)]
  parts += _FEATURES
  return (
    '<!doctype html><html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">'
    f"<title>{html.escape(about['name'])}: data card</title><style>{_STYLE}</style>"
    f"<body>{''.join(parts)}</body></html>\n"
  )
