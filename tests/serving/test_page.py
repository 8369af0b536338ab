"""The page in a real browser, by keyboard, at phone and desktop width, light and dark."""

import importlib.util
import pathlib
import shutil
import socket
import threading
import time

import pytest
import uvicorn

from bbqrec_jax.serving.gate import Options
from bbqrec_jax.serving.server import Serving, make_app

playwright = pytest.importorskip("playwright.sync_api")
CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(not CHROMIUM, reason="no chromium")


@pytest.fixture(scope="module")
def stub():
  spec = importlib.util.spec_from_file_location("test_server", pathlib.Path(__file__).with_name("test_server.py"))
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  made = module.Stub()
  made.titles = (*made.titles[:3], '<img src=x onerror="document.title=1">', *made.titles[4:])
  return made


@pytest.fixture(scope="module")
def url(stub, tmp_path_factory):
  """A server with a token, on a socket of the loopback interface."""
  listener = socket.create_server(("127.0.0.1", 0))
  serving = Serving(tmp_path_factory.mktemp("bundle"), Options(access_log=False, token="sesame"), load=lambda _: stub)
  server = uvicorn.Server(uvicorn.Config(make_app(serving), log_level="error"))
  thread = threading.Thread(target=server.run, args=([listener],), daemon=True)
  thread.start()
  while not server.started:
    time.sleep(0.01)
  yield f"http://127.0.0.1:{listener.getsockname()[1]}"
  server.should_exit = True
  thread.join(10)


@pytest.fixture(scope="module")
def browser():
  with playwright.sync_playwright() as play:
    made = play.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
    yield made
    made.close()


@pytest.mark.parametrize(("width", "scheme"), [(390, "dark"), (1280, "light")])
def test_a_history_is_built_by_keyboard_and_answered(browser, url, width, scheme):
  page = browser.new_page(viewport={"width": width, "height": 800}, color_scheme=scheme)
  faults = []
  page.on("pageerror", lambda error: faults.append(str(error)))
  page.goto(url)
  page.get_by_text("This server wants its token.").wait_for()
  page.get_by_label("Token of this server").fill("sesame")
  page.keyboard.press("Tab")
  page.get_by_text("teas: 6 items").wait_for()
  box = page.get_by_role("combobox", name="Add an item")
  box.focus()
  page.keyboard.type("tea")
  page.get_by_role("option").first.wait_for()
  assert box.get_attribute("aria-expanded") == "true"
  page.keyboard.press("ArrowDown")
  active = box.get_attribute("aria-activedescendant")
  assert page.locator(f"#{active}").get_attribute("aria-selected") == "true"
  page.keyboard.press("Enter")
  page.locator("#items > li").first.wait_for()
  assert "green tea" in page.locator("#history").inner_text()
  first = page.locator("#items > li").first.inner_text()
  assert "Green Tea pot" in first
  assert "like green tea" in first
  assert "items in" in page.locator("#status[role=status]").inner_text()
  # Titles are text, whatever they hold.
  assert page.title() == "Recommendations"
  assert page.locator("img").count() == 0
  brand = page.get_by_label("Brand")
  assert brand.locator("option").all_inner_texts() == ["any", "Leaf", "Bean", "Pot & Co"]
  assert not page.get_by_label("Category").is_visible(), "no item has one"
  brand.select_option("Leaf")
  page.locator("#items > li").nth(2).wait_for(state="detached")
  assert [one.split()[0] for one in page.locator("#items .id").all_inner_texts()] == ["T5", "T0"]
  page.get_by_label("Price up to").fill("4")
  page.keyboard.press("Tab")
  page.locator("#items > li").nth(1).wait_for(state="detached")
  assert page.locator("#items .id").all_inner_texts()[0].startswith("T0")
  page.get_by_label("Price up to").fill("")
  page.keyboard.press("Tab")  # One change after the other: an answer that comes later makes the list anew.
  page.locator("#items > li").nth(1).wait_for()
  brand.select_option("any")
  page.locator("#items > li").nth(3).wait_for()
  page.get_by_role("button", name="Not this one: Green").focus()
  page.keyboard.press("Enter")
  page.get_by_text("1 left out.").wait_for()
  assert "Green Tea pot" not in page.locator("#items").inner_text()
  page.get_by_role("button", name="Remove: green tea").focus()
  page.keyboard.press("Enter")
  page.get_by_text("No items yet.").wait_for()
  assert page.evaluate("document.documentElement.scrollWidth") <= width, "nothing is wider than the screen"
  unnamed = page.evaluate(
    "[...document.querySelectorAll('button, input, select')].filter(one => !(one.innerText ||"
    " one.getAttribute('aria-label') || one.labels?.length)).length"
  )
  assert unnamed == 0, "a screen reader has a name for every control"
  assert faults == []
  page.close()


def test_the_focus_stays_near_what_was_pressed(browser, url):
  page = browser.new_page()
  page.goto(url)
  page.get_by_label("Token of this server").fill("sesame")
  page.keyboard.press("Tab")
  page.get_by_text("teas: 6 items").wait_for()
  box = page.get_by_role("combobox", name="Add an item")

  def press(name):
    page.get_by_role("button", name=name).first.focus()
    page.keyboard.press("Enter")

  def has_focus(label):
    page.wait_for_function(
      "label => (document.activeElement.getAttribute('aria-label') || document.activeElement.id) === label", arg=label
    )

  box.fill("no such thing")
  page.get_by_role("status").filter(has_text="Nothing found.").wait_for()
  assert box.get_attribute("aria-expanded") == "false"
  for words in ("green tea", "red tea"):
    box.fill(words)
    page.locator("#found > li").first.click()
  assert page.locator("#nothing").inner_text() == ""
  page.locator("#items > li").nth(3).wait_for()
  assert [one.split()[0] for one in page.locator("#items .id").all_inner_texts()] == ["T2", "T3", "T4", "T5"]
  press("Not this one: T5")
  page.get_by_text("1 left out.").wait_for()
  has_focus("Not this one: red tea")
  press("Not this one: Green")
  page.get_by_text("2 left out.").wait_for()
  has_focus("Not this one: " + page.locator("#items .title").first.inner_text())
  press("Show them again")
  page.get_by_text("2 left out.").wait_for(state="hidden")
  has_focus("Not this one: Green  Tea pot")
  press("Add to the history: T5")
  page.locator("#items > li").nth(3).wait_for(state="detached")
  has_focus("Add to the history: red tea")
  press("Move earlier: red tea")
  has_focus("Move earlier: red tea")
  page.keyboard.press("Enter")
  assert page.locator("#history .title").all_inner_texts() == ["red tea", "green tea", "T5"]
  press("Remove: green tea")
  has_focus("Remove: T5")
  page.keyboard.press("Enter")
  has_focus("Remove: red tea")
  page.keyboard.press("Enter")
  has_focus("search")
  page.close()
