"""Answers over HTTP from a bundle of `bbqrec export`, with a page to try it.

    bbqrec serve runs/bundle --port=8765
    curl localhost:8765/recommend --json '{"history": ["SKU-1", "SKU-2"], "k": 5}'

The page is at http://127.0.0.1:8765/, what can be asked at /openapi.json. All programs are compiled before the port is
opened. SIGHUP takes the bundle that is at the path by then (a link may lead elsewhere); SIGTERM answers what waits,
then stops. A token that requests must bear comes from --token_file or the variable BBQREC_TOKEN.
"""

import contextlib
import functools
import os
import pathlib
from typing import Any

from absl import flags

from bbqrec_jax.command_line import define_path, parse_flags, quiet_flags, start
from bbqrec_jax.errors import InputError, as_given, refuse
from bbqrec_jax.utils.files import check_file, is_url, local_path


def read_token(path: pathlib.Path | None) -> str:
  """The token of a file, or of BBQREC_TOKEN; "" where there is neither.

  Raises:
    InputError: if it is none that a header can hold.
  """
  token, where = os.environ.get("BBQREC_TOKEN", ""), "BBQREC_TOKEN"
  if path is not None:
    check_file(path, what="a file with a token", most=10_000)
    token, where = path.read_text(encoding="utf-8", errors="replace").strip(), f"--token_file={path}"
  if (path is not None and not token) or not all("!" <= character <= "~" for character in token):
    raise InputError(f"{where}: expected a token of printable ASCII characters without blanks; write another")
  return token


def load_again(given: str, folder: pathlib.Path) -> Any:
  """The bundle of a folder; one that was given as a URL is copied anew, as far as it has changed."""
  from bbqrec_jax.serving.bundle import Bundle

  return Bundle(local_path(given, flag="bundle", use="read") if is_url(given) else folder)


def main(argv: list[str]) -> None:
  """Loads the bundle and serves until it is told to stop."""
  options = quiet_flags()
  try:
    import asyncio
    import signal

    import uvicorn

    from bbqrec_jax.serving.connection import listening
    from bbqrec_jax.serving.gate import Options, say
    from bbqrec_jax.serving.server import Serving, make_app, set_aside
  except ModuleNotFoundError as error:
    refuse(InputError(f"{error}: serving needs FastAPI and uvicorn; pip install 'bbqrec_jax[serve]'"))
  from bbqrec_jax.utils.compilation import keep_compiled
  from bbqrec_jax.utils.environment import settle_jax, start_devices

  settle_jax()
  keep_compiled()
  try:
    if len(argv) != 2:
      raise InputError(f"expected one bundle, got {len(argv) - 1}: bbqrec serve runs/bundle --port=8765")
    for name in ("queue", "timeout", "head_seconds", "body_kib"):
      if getattr(options, name) <= 0:
        raise InputError(f"--{name}: expected a number above 0, got {getattr(options, name)}")
    folder, token = local_path(argv[1], flag="bundle", use="read"), read_token(options.token_file)
    start_devices()
    if (folder / "bundle.json").is_file():
      say(event="loading", note="its programs are compiled, which takes a minute or two the first time, and is kept")
    serving = Serving(
      folder,
      Options(
        waiting=options.queue,
        window=options.window_ms / 1000,
        timeout=options.timeout,
        connections=options.connections,
        head_seconds=options.head_seconds,
        body_bytes=int(options.body_kib * 1024),
        token=token,
        access_log=options.access_log,
      ),
      load=lambda folder: load_again(argv[1], folder),
    )
  except InputError as error:
    refuse(error)
  set_aside()
  say(event="loaded", bundle=serving.engine.bundle.version, items=serving.engine.bundle.num_items)
  print(
    f"http://{options.host}:{options.port}/  {serving.engine.bundle.num_items} items, {as_given(str(folder))}",
    flush=True,
  )
  config = listening(make_app(serving), serving.options, host=options.host, port=options.port)

  async def serve() -> None:
    """Serves, and listens for SIGHUP."""
    server, reloads = uvicorn.Server(config), set()

    async def reload() -> None:
      with contextlib.suppress(InputError):  # It is told of where that is found out.
        await serving.reload()

    def heard() -> None:
      task = asyncio.create_task(reload())
      reloads.add(task)
      task.add_done_callback(reloads.discard)

    asyncio.get_running_loop().add_signal_handler(signal.SIGHUP, heard)
    await server.serve()

  # uvicorn, told to stop, stops in order, and then raises the signal again.
  signal.signal(signal.SIGTERM, lambda *_: None)
  try:
    with asyncio.Runner(loop_factory=config.get_loop_factory()) as runner:  # uvloop's, where that is installed.
      runner.run(serve())
  except KeyboardInterrupt:
    pass
  except SystemExit:  # uvicorn has told what the matter is: as a rule, that the port is taken.
    refuse(InputError(f"--host={options.host} --port={options.port} cannot be opened: choose another"))


def program() -> None:
  """Defines the flags and runs the program."""
  flags.DEFINE_string("host", "127.0.0.1", "The address to listen on; 0.0.0.0 for all, as in a container.")
  flags.DEFINE_integer("port", 8765, "The port.", lower_bound=1, upper_bound=65535)
  define_path("token_file", "A file with the token that requests must bear; BBQREC_TOKEN holds one, too.")
  flags.DEFINE_integer("queue", 256, "How many requests may wait; beyond them 429.")
  flags.DEFINE_integer("connections", 1024, "How many connections may be open; beyond them 503.", lower_bound=1)
  flags.DEFINE_float("window_ms", 2.0, "How long requests are gathered for before they are answered together.", 0, 1000)
  flags.DEFINE_float("timeout", 5.0, "Seconds after which a request that waits is refused with 503.")
  flags.DEFINE_float("head_seconds", 10.0, "Seconds until a request's head must be there; then it is cut off.")
  flags.DEFINE_float("body_kib", 256.0, "The largest body of a request, in KiB.")
  flags.DEFINE_bool("access_log", True, "Whether a line of JSON is written for each request, without what it asks.")
  start(main, flags_parser=functools.partial(parse_flags, words=True))
