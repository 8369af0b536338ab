"""Tables of what was measured."""

from typing import Any


def utilisation(record: dict[str, Any], limits: dict[str, float], peak: dict[str, Any] | None) -> dict[str, Any]:
  """How near a record is to what the machine could do.

  Args:
    record: of `timing.measure`.
    limits: of `limits.measured_limits`, of one device.
    peak: the data sheet's, of all devices together; None where it is not known.

  Returns:
    `of_matmul` and `of_copy`, the share of the measured rates; `of_peak`, model FLOPs utilisation; None where unknown.
  """
  seconds, flops, moved = record["median_s"], record["flops"], record["bytes"]
  best = (peak or {}).get(record["dtype"])
  return {
    "of_matmul": flops and flops / seconds / limits[f"matmul_{record['dtype']}"],
    "of_copy": moved and moved / seconds / limits["copy"],
    "of_peak": flops and best and flops / seconds / best,
  }


def _cell(value: float | None, form: str) -> str:
  return "" if value is None else format(value, form)


def table(result: dict[str, Any]) -> str:
  """Markdown, a line per record."""
  head = ["what", "ms", "p90 ms", "a second", "GFLOP", "of matmul", "of peak", "of copy", "first call s"]
  lines = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
  for record in result["records"]:
    share = [_cell(record[name], ".0%") for name in ("of_matmul", "of_peak", "of_copy")]
    cells = [
      record["name"], f"{1e3 * record['median_s']:,.2f}", f"{1e3 * record['p90_s']:,.2f}",
      f"{record['rate']:,.0f} {record['unit']}", _cell(record["flops"] and record["flops"] / 1e9, ",.2f"), *share,
      f"{record['first_call_s']:.1f}",
    ]  # fmt: skip
    lines.append(f"| {' | '.join(cells)} |")
  about, limits = result["about"], result["limits"]
  where = (
    f"{about['config']} on {about['device_count']} x {about['device_kind']} ({about['backend']}), jax {about['jax']},"
    f" {about['cores']} cores, load {about['load']:.1f}; measured on one device: float32 products"
    f" {limits['matmul_float32'] / 1e9:,.0f} GFLOP/s, bfloat16 {limits['matmul_bfloat16'] / 1e9:,.0f} GFLOP/s, copies"
    f" {limits['copy'] / 1e9:,.1f} GB/s"
  )
  return "\n".join([where, "", *lines])


def records_table(results: list[dict[str, Any]]) -> str:
  """Markdown: what each machine does in a second, a line a record and a column a result.

  In brackets stands the share of the rate of matrix products that was measured in the same process.

  Args:
    results: what `--output` wrote, of one config.
  """
  names = list(dict.fromkeys(record["name"] for result in results for record in result["records"]))
  units = {record["name"]: record["unit"] for result in results for record in result["records"]}
  rows = [
    ["a second", *(f"{result['about']['device_count']} x {result['about']['device_kind']}" for result in results)],
    *(
      [f"measured {name} product, GFLOP", *(f"{result['limits'][f'matmul_{name}'] / 1e9:,.0f}" for result in results)]
      for name in ("float32", "bfloat16")
    ),
    ["measured copy, GB", *(f"{result['limits']['copy'] / 1e9:,.1f}" for result in results)],
  ]
  for name in names:
    cells = []
    for result in results:
      record = next((record for record in result["records"] if record["name"] == name), None)
      share = _cell(record and record["of_matmul"], ".0%")
      cells.append("" if record is None else f"{record['rate']:,.0f}" + (f" ({share})" if share else ""))
    rows.append([f"{name}, {units[name]}", *cells])
  lines = [f"| {' | '.join(row)} |" for row in rows]
  return "\n".join([lines[0], "|" + "---|" * len(rows[0]), *lines[1:]])
