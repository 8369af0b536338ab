"""Makes the pictures of the documentation: a report and the server's page, as a browser shows them.

    python docs/screenshots.py --report=runs/mine/report/report.html --server=http://127.0.0.1:8765 --output=docs/images

Needs playwright and Chromium (`--chromium=PATH`). The server is one that was started with `bbqrec serve`.
"""

import argparse
import pathlib
import shutil

from playwright.sync_api import sync_playwright

SIZES = {"desktop": (1280, 900), "phone": (390, 844)}


def main():
  """Takes each picture at both widths, light and dark."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--report", type=pathlib.Path)
  parser.add_argument("--server")
  parser.add_argument("--output", type=pathlib.Path, required=True)
  parser.add_argument("--chromium", default=shutil.which("chromium"))
  parser.add_argument("--words", default="", help="Searched for on the page; an example of the page's own if empty.")
  parser.add_argument("--whole", action="store_true", help="The whole height of a page, not the first screen alone.")
  options = parser.parse_args()
  options.output.mkdir(parents=True, exist_ok=True)
  with sync_playwright() as play:
    browser = play.chromium.launch(executable_path=options.chromium, args=["--no-sandbox"])
    for size, (width, height) in SIZES.items():
      for scheme in ("light", "dark"):
        page = browser.new_page(viewport={"width": width, "height": height}, color_scheme=scheme)
        faults = []
        page.on("pageerror", lambda error, faults=faults: faults.append(str(error)))
        page.on("console", lambda line, faults=faults: faults.append(line.text) if line.type == "error" else None)
        if options.report:
          page.goto(options.report.absolute().as_uri())
          page.wait_for_selector("body[data-drawn=all]", timeout=120_000)
          page.screenshot(path=options.output / f"report_{size}_{scheme}.png", full_page=options.whole)
        if options.server:
          page.goto(options.server)
          if options.words:
            page.get_by_role("combobox").fill(options.words)
            page.wait_for_selector("[role=option]")
            page.keyboard.press("Enter")
          page.get_by_role("button", name="as an example").click()
          page.wait_for_selector("#history > li:nth-child(3)", timeout=30_000)
          page.wait_for_selector("#items > li", timeout=30_000)
          page.wait_for_timeout(1000)
          page.screenshot(path=options.output / f"page_{size}_{scheme}.png", full_page=options.whole)
        if faults:
          raise SystemExit(f"{size}, {scheme}: {faults}")
        page.close()
    browser.close()


if __name__ == "__main__":
  main()
