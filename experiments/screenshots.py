"""The pictures of the documentation: a shop that is made up, trained on, and looked at in a browser.

    python experiments/screenshots.py --workdir=/tmp/shop --output=docs/images   # needs playwright and chromium

Does what docs/tutorial.md tells, each command in a process of its own, and then opens the report and the page. What is
done already is not done again.
"""

import contextlib
import csv
import pathlib
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator

import numpy as np
from absl import flags

from bbqrec_jax.command_line import define_path, start

KINDS = {
  "Tea": ("Green tea", "Black tea", "Mint tea", "White tea", "Chai"),
  "Coffee": ("Espresso beans", "Filter coffee", "Decaf", "Cold brew", "Mocha"),
  "Pots": ("Teapot", "French press", "Kettle", "Mug", "Milk jug"),
  "Sweets": ("Shortbread", "Dark chocolate", "Honey", "Ginger biscuits", "Fudge"),
}
BRANDS = {"Tea": ("Leaf", "Hill"), "Coffee": ("Bean", "Roast"), "Pots": ("Clay", "Steel"), "Sweets": ("Oven", "Cane")}
SIZES = ("small", "large", "organic", "classic", "for two")
# Commands of the tutorial, smaller: a picture needs no good recommender.
SMALL = ("--config.tokenizer.quantizer=rq_kmeans", "--config.tokenizer.num_codes=16", "--config.recommender.epochs=12")


def write_shop(folder: pathlib.Path, *, users: int, seed: int) -> None:
  """Writes `interactions.csv` and `items.csv`: people who stay with a kind of thing for a while, and with a brand."""
  rng = np.random.default_rng(seed)
  items = []
  for category, names in KINDS.items():
    for name in names:
      for place, size in enumerate(SIZES):
        brand = BRANDS[category][place % 2]
        price = f"{rng.uniform(2, 30):.2f}"
        items.append((f"SKU-{len(items)}", f"{name}, {size}", brand, f"Home > {category}", price))
  with open(folder / "items.csv", "w", newline="", encoding="utf-8") as file:
    csv.writer(file).writerows([("id", "title", "brand", "category", "price"), *items])
  log: list[tuple[str, str, int]] = []
  for user in range(users):
    item = int(rng.integers(len(items)))
    for step in range(int(rng.integers(5, 12))):
      log.append((f"user-{user}", f"SKU-{item}", 1_700_000_000 + 86_400 * step + user))
      stays = rng.random() < 0.7
      item = int((item // 25 * 25 + rng.integers(25)) if stays else (item + 5) % len(items))
  with open(folder / "interactions.csv", "w", newline="", encoding="utf-8") as file:
    csv.writer(file).writerows([("user", "item", "time"), *log])


def make(folder: pathlib.Path) -> None:
  """From the CSVs to a report and a bundle."""
  folder.mkdir(parents=True, exist_ok=True)
  if not (folder / "interactions.csv").exists():
    write_shop(folder, users=600, seed=0)
  for made, command in (
    ("teas", ("prepare", "interactions.csv", "--items=items.csv", "--output=teas")),
    ("teas/text_features.npy", ("features", "teas")),
    ("run/results.json", ("train", "--config=dense", "--data=teas", "--workdir=run", *SMALL)),
    ("run/report", ("report", "--workdir=run")),
    ("bundle", ("export", "--workdir=run", "--output=bundle", "--top=20")),
  ):
    if not (folder / made).exists():
      subprocess.run([sys.executable, "-m", "bbqrec_jax", *command], check=True, cwd=folder)


@contextlib.contextmanager
def served(bundle: pathlib.Path) -> Iterator[str]:
  """The address of a server of the bundle on the loopback interface."""
  with socket.create_server(("127.0.0.1", 0)) as free:
    port = free.getsockname()[1]
  command = [sys.executable, "-m", "bbqrec_jax", "serve", str(bundle), f"--port={port}", "--noaccess_log"]
  process = subprocess.Popen(command)
  try:
    while True:
      try:
        urllib.request.urlopen(f"http://127.0.0.1:{port}/ready").close()
        break
      except urllib.error.URLError:
        if process.poll() is not None:
          sys.exit("the server ended")
        time.sleep(0.2)
    yield f"http://127.0.0.1:{port}/"
  finally:
    process.terminate()
    process.wait()


def shoot(report: str, page: str, output: pathlib.Path) -> None:
  """Takes the pictures.

  Args:
    report: the address of a report.
    page: the address of a server's page.
    output: the folder that gets them.
  """
  from playwright.sync_api import sync_playwright

  chromium = shutil.which("chromium") or shutil.which("google-chrome")
  with sync_playwright() as play:
    browser = play.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
    for name, width, height, scheme in (("desktop_light", 1280, 900, "light"), ("phone_dark", 390, 844, "dark")):
      own = browser.new_page(viewport={"width": width, "height": height}, color_scheme=scheme)  # type: ignore[arg-type]
      own.goto(report)
      own.wait_for_timeout(3000)  # Until the plots are drawn.
      if width > 1000:
        own.evaluate("document.getElementById('items').scrollIntoView()")
      own.screenshot(path=output / f"report_{name}.png")
      own.goto(page)
      box = own.get_by_role("combobox", name="Add an item")
      for title in ("Green tea, organic", "Teapot, classic", "Mint tea, large"):
        box.fill(title)
        own.get_by_role("option", name=title).click()
      own.locator("#items > li").nth(9).wait_for()
      own.get_by_label("Price up to").fill("25")
      own.keyboard.press("Tab")
      own.wait_for_timeout(1000)
      own.screenshot(path=output / f"page_{name}.png")
      own.close()
    browser.close()


def main(argv: list[str]) -> None:
  """Makes what is not there, and takes the pictures."""
  del argv
  options = flags.FLAGS
  make(options.workdir)
  options.output.mkdir(parents=True, exist_ok=True)
  with served(options.workdir / "bundle") as page:
    shoot((options.workdir / "run" / "report" / "report.html").resolve().as_uri(), page, options.output)


if __name__ == "__main__":
  define_path("workdir", "Gets the shop, its run and its bundle.")
  define_path("output", "The folder for the pictures.")
  flags.mark_flags_as_required(["workdir", "output"])
  start(main)
