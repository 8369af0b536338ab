"""What stands before the routes of a server: the token, limits of size and time, the log and the figures."""

import asyncio
import contextlib
import hmac
import json
import pathlib
import secrets
import sys
import time
import traceback
from typing import Any, NamedTuple

import prometheus_client
from fastapi.responses import JSONResponse, Response

import bbqrec_jax
from bbqrec_jax.errors import printable

_PROBES = ("/health", "/ready", "/metrics")  # Routes that are answered however many ask, and not logged.
_OPEN = ("/", *_PROBES)  # Routes that need no token: they tell nothing of the items.


class Options(NamedTuple):
  """How a server behaves.

  Attributes:
    waiting: requests that may wait; beyond them 429.
    window: seconds that requests are gathered for before they are answered together.
    timeout: seconds until a request that waits is refused with 503.
    connections: that may be open; beyond them 503, but for probes.
    head_bytes: of a request's path and headers; beyond them 431.
    head_seconds: until they must be there; then the connection is closed.
    body_bytes: of a request; beyond them 413.
    body_seconds: until the body of a request must be there; then 408.
    token: that requests must bear; "" for none.
    access_log: whether a line is written for each request.
  """

  waiting: int = 256
  window: float = 0.002
  timeout: float = 5.0
  connections: int = 1024
  head_bytes: int = 2**16
  head_seconds: float = 10.0
  body_bytes: int = 2**18
  body_seconds: float = 10.0
  token: str = ""
  access_log: bool = True


class Meters:
  """What /metrics tells."""

  def __init__(self) -> None:
    """Registers them, and those of the process, apart from any others."""
    self.registry = prometheus_client.CollectorRegistry()
    prometheus_client.ProcessCollector(registry=self.registry)
    about: dict[str, Any] = {"registry": self.registry}
    self.requests = prometheus_client.Counter("bbqrec_requests", "Requests.", ["route", "status"], **about)
    buckets = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.035, 0.05, 0.075, 0.1, 0.2, 0.5, 1, 2, 5)
    self.seconds = prometheus_client.Histogram(
      "bbqrec_request_seconds", "From the first byte to the last.", ["route"], buckets=buckets, **about
    )
    self.batch = prometheus_client.Histogram(
      "bbqrec_batch_queries", "Requests that were answered together.", buckets=(1, 2, 4, 8, 16, 32, 64), **about
    )
    self.search = prometheus_client.Histogram(
      "bbqrec_batch_seconds", "That answering a batch took.", buckets=buckets, **about
    )
    self.waiting = prometheus_client.Gauge("bbqrec_waiting", "Requests that wait.", **about)
    self.reloads = prometheus_client.Counter(
      "bbqrec_reloads", "New bundles, by what became of them.", ["outcome"], **about
    )
    self.bundle = prometheus_client.Info("bbqrec_bundle", "The bundle that answers.", **about)


def say(**fields: Any) -> None:
  """A line of JSON on standard error."""
  now = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime())
  with contextlib.suppress(OSError, ValueError):  # Nobody reads it any more.
    sys.stderr.write(json.dumps({"time": now} | fields) + "\n")
    sys.stderr.flush()


class Gate:
  """What stands before the routes: the token, the size and the time of the body, and what is noted of each request.

  The body is read here, so that a slow or broken client holds nothing but its own connection. HEAD is answered as GET
  is; that a body is left out is the business of what sends it. What goes wrong here and behind is answered here, too:
  whoever stands before would print what was asked.
  """

  def __init__(self, app: Any, options: Options, meters: Meters):
    """Stands before an ASGI application."""
    self._app, self._options, self._meters = app, options, meters
    self._routes = {"/", "/recommend", "/similar", "/items", "/about", "/health", "/ready", "/metrics", "/reload",
                    "/openapi.json"}  # fmt: skip

  async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
    """One request."""
    if scope["type"] != "http":
      await self._app(scope, receive, send)
      return
    start, status, options = time.perf_counter(), 0, self._options
    route = scope["path"] if scope["path"] in self._routes else "other"
    request = secrets.token_hex(6)

    async def noted(message: Any) -> None:
      nonlocal status
      if message["type"] == "http.response.start":
        status = message["status"]
        message["headers"] = [
          *message["headers"], (b"x-request-id", request.encode()), (b"x-content-type-options", b"nosniff")
        ]  # fmt: skip
      await send(message)

    try:
      refusal, body = self._refusal(scope), b""
      if refusal is None:
        refusal, body = await self._body(scope, receive)
      if refusal is not None:
        await refusal(scope, receive, noted)
        return
      # A body is JSON, whatever a client calls it: curl's -d calls it a form.
      headers = [(name, value) for name, value in scope["headers"] if name != b"content-type"]
      method = "GET" if scope["method"] == "HEAD" else scope["method"]
      inner = scope | {"headers": [*headers, (b"content-type", b"application/json")], "method": method}
      sent = False

      async def replay() -> Any:
        nonlocal sent
        if sent:
          return await receive()
        sent = True
        return {"type": "http.request", "body": body, "more_body": False}

      await self._app(inner, replay, noted)
    except _Gone:
      status = 499  # As nginx has it: nobody is left to hear.
    except asyncio.CancelledError:  # The server stops, and has waited long enough.
      if not status:
        await refused(503, "stopping", {"Retry-After": "5"})(scope, receive, noted)
    except Exception as error:
      say(event="error", request=request, kind=type(error).__name__, where=_place(error))  # It may quote the request.
      if not status:
        await refused(500, "something went wrong here")(scope, receive, noted)
    finally:
      seconds = time.perf_counter() - start
      self._meters.requests.labels(route, str(status)).inc()
      self._meters.seconds.labels(route).observe(seconds)
      if options.access_log and route not in _PROBES:
        say(request=request, method=scope["method"], route=route, status=status, ms=round(1000 * seconds, 1))

  def _refusal(self, scope: Any) -> Response | None:
    """What is wrong with a request before its body is read."""
    token, headers = self._options.token, dict(scope["headers"])
    if scope.get("state", {}).get("crowded") and scope["path"] not in _PROBES:
      return refused(503, "too many connections; try again later", {"Retry-After": "1", "Connection": "close"})
    size = len(scope["raw_path"]) + len(scope["query_string"])
    if size + sum(len(name) + len(value) for name, value in scope["headers"]) > self._options.head_bytes:
      most = self._options.head_bytes
      return refused(431, f"expected a head of at most {most} bytes, got more", {"Connection": "close"})
    if token and scope["path"] not in _OPEN:
      scheme, _, given = headers.get(b"authorization", b"").partition(b" ")
      if scheme.lower() != b"bearer" or not hmac.compare_digest(given.strip(), token.encode()):
        return refused(401, "expected the header Authorization: Bearer TOKEN", {"WWW-Authenticate": "Bearer"})
    if int(headers.get(b"content-length", b"0")) > self._options.body_bytes:
      return self._too_large()
    return None

  def _too_large(self) -> Response:
    most = self._options.body_bytes
    return refused(413, f"expected a body of at most {most} bytes, got more", {"Connection": "close"})

  async def _body(self, scope: Any, receive: Any) -> tuple[Response | None, bytes]:
    """The whole body, or what is wrong with it."""
    parts, size = [], 0
    try:
      async with asyncio.timeout(self._options.body_seconds):
        while True:
          message = await receive()
          if message["type"] == "http.disconnect":
            raise _Gone
          parts.append(message.get("body", b""))
          size += len(parts[-1])
          if size > self._options.body_bytes:
            return self._too_large(), b""
          if not message.get("more_body"):
            return None, b"".join(parts)
    except TimeoutError:
      seconds = self._options.body_seconds
      return refused(408, f"the body did not come within {seconds:g} s", {"Connection": "close"}), b""


class _Gone(Exception):
  """The client has left."""


def _place(error: Exception) -> str:
  """The last line of this package that an exception came through."""
  package = pathlib.Path(bbqrec_jax.__file__).parent
  lines = [(pathlib.Path(frame.f_code.co_filename), line) for frame, line in traceback.walk_tb(error.__traceback__)]
  path, line = [(path, line) for path, line in lines if path.is_relative_to(package)][-1]
  return f"{path.relative_to(package.parent)}:{line}"


def refused(status: int, error: str, headers: dict[str, str] | None = None) -> JSONResponse:
  """A refusal: a status and a line that says why."""
  return JSONResponse({"error": printable(error)}, status, headers=headers)
