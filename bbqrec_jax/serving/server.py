"""HTTP in front of a bundle: `bbqrec serve`.

What it promises: a request is answered or refused, with a proper status and a line that says why, within the timeout;
a new bundle takes over between two requests, and one that is not good never does; what people ask about is in no log.
"""

import asyncio
import base64
import concurrent.futures
import contextlib
import gc
import hashlib
import hmac
import json
import pathlib
import re
import secrets
import sys
import time
from collections.abc import AsyncIterator, Callable
from typing import Annotated, Any, NamedTuple

import fastapi
import numpy as np
import prometheus_client
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse, Response
from starlette.exceptions import HTTPException

import bbqrec_jax
from bbqrec_jax.errors import InputError, printable, shown
from bbqrec_jax.serving.batching import Batcher, Overloaded
from bbqrec_jax.serving.bundle import Answer, Bundle
from bbqrec_jax.serving.engine import Engine, Unknown
from bbqrec_jax.serving.messages import Asked, Found, Recommendations, Refusal, Similar

_OPEN = ("/", "/health", "/ready", "/metrics")  # Routes that need no token: they tell nothing of the items.


class Options(NamedTuple):
  """How a server behaves.

  Attributes:
    waiting: requests that may wait; beyond them 429.
    window: seconds that requests are gathered for before they are answered together.
    timeout: seconds until a request that waits is refused with 503.
    body_bytes: of a request; beyond them 413.
    body_seconds: until the body of a request must be there; then 408.
    token: that requests must bear; "" for none.
    access_log: whether a line is written for each request.
  """

  waiting: int = 256
  window: float = 0.002
  timeout: float = 5.0
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


class Serving:
  """The bundle in use, and the way to another."""

  def __init__(self, folder: pathlib.Path, options: Options, *, load: Callable[[pathlib.Path], Bundle] = Bundle):
    """Loads the bundle, compiled.

    Args:
      folder: of the bundle, or a link to it, which is followed again when a new one is taken.
      options: of the server.
      load: makes a bundle of a folder.

    Raises:
      InputError: if it is not good.
    """
    self.folder, self.options, self.meters = folder, options, Meters()
    self.stopping = False
    self._load, self._turn = load, asyncio.Lock()
    self._thread = concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix="search")
    self.engine = self._engine(load(folder.resolve()))

  def _engine(self, bundle: Bundle) -> Engine:
    batcher = Batcher(
      bundle.answer,
      largest=bundle.limits["batch_sizes"][-1],
      waiting=self.options.waiting,
      window=self.options.window,
      timeout=self.options.timeout,
      thread=self._thread,
      observe=self._observe,
    )
    self.meters.bundle.info(
      {"version": bundle.version, "items": str(bundle.num_items), "head": str(bundle.about["head"])}
    )
    self.meters.waiting.set_function(lambda: len(batcher))
    return Engine(bundle, batcher)

  def _observe(self, size: int, seconds: float) -> None:
    self.meters.batch.observe(size)
    self.meters.search.observe(seconds)

  async def reload(self) -> None:
    """Takes the bundle that is at the folder now; the one in use answers until that is ready, and if it is not good.

    Raises:
      InputError: if it is not good; the one in use stays.
    """
    async with self._turn:
      try:
        bundle = await asyncio.to_thread(self._load, self.folder.resolve())
      except Exception as error:
        self.meters.reloads.labels("refused").inc()
        say(event="reload", outcome="refused", bundle=self.engine.bundle.version, error=printable(str(error)))
        raise error if isinstance(error, InputError) else InputError(f"{self.folder}: {error}") from error
      self.engine = self._engine(bundle)
      set_aside()
      self.meters.reloads.labels("taken").inc()
      say(event="reload", outcome="taken", bundle=bundle.version)

  async def close(self) -> None:
    """Answers what waits, then ends the thread."""
    self.stopping = True
    await self.engine.batcher.drain()
    self._thread.shutdown()


def set_aside() -> None:
  """Takes what is there now out of the collector's rounds: one through JAX and all titles stops every request."""
  gc.unfreeze()  # The bundle before this one may be collected.
  gc.collect()
  gc.freeze()


def say(**fields: Any) -> None:
  """A line of JSON on standard error."""
  now = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime())
  with contextlib.suppress(OSError, ValueError):  # Nobody reads it any more.
    sys.stderr.write(json.dumps({"time": now} | fields) + "\n")
    sys.stderr.flush()


class Gate:
  """What stands before the routes: the token, the size and the time of the body, and what is noted of each request.

  The body is read here, so that a slow or broken client holds nothing but its own connection.
  """

  def __init__(self, app: Any, serving: Serving):
    """Stands before an ASGI application."""
    self._app, self._serving = app, serving
    self._routes = {"/", "/recommend", "/similar", "/items", "/about", "/health", "/ready", "/metrics", "/reload",
                    "/openapi.json"}  # fmt: skip

  async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
    """One request."""
    if scope["type"] != "http":
      await self._app(scope, receive, send)
      return
    start, status, options = time.perf_counter(), 0, self._serving.options
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
      scope = scope | {"headers": [*headers, (b"content-type", b"application/json")]}
      sent = False

      async def replay() -> Any:
        nonlocal sent
        if sent:
          return await receive()
        sent = True
        return {"type": "http.request", "body": body, "more_body": False}

      await self._app(scope, replay, noted)
    except _Gone:
      status = 499  # As nginx has it: nobody is left to hear.
    finally:
      seconds = time.perf_counter() - start
      self._serving.meters.requests.labels(route, str(status)).inc()
      self._serving.meters.seconds.labels(route).observe(seconds)
      if options.access_log and route not in ("/health", "/ready", "/metrics"):
        say(request=request, method=scope["method"], route=route, status=status, ms=round(1000 * seconds, 1))

  def _refusal(self, scope: Any) -> Response | None:
    """What is wrong with a request before its body is read."""
    token, headers = self._serving.options.token, dict(scope["headers"])
    if token and scope["path"] not in _OPEN:
      given = headers.get(b"authorization", b"")
      if not hmac.compare_digest(given, b"Bearer " + token.encode()):
        return refused(401, "expected the header Authorization: Bearer TOKEN", {"WWW-Authenticate": "Bearer"})
    if int(headers.get(b"content-length", b"0")) > self._serving.options.body_bytes:
      return self._too_large()
    return None

  def _too_large(self) -> Response:
    most = self._serving.options.body_bytes
    return refused(413, f"expected a body of at most {most} bytes, got more", {"Connection": "close"})

  async def _body(self, scope: Any, receive: Any) -> tuple[Response | None, bytes]:
    """The whole body, or what is wrong with it."""
    parts, size = [], 0
    try:
      async with asyncio.timeout(self._serving.options.body_seconds):
        while True:
          message = await receive()
          if message["type"] == "http.disconnect":
            raise _Gone
          parts.append(message.get("body", b""))
          size += len(parts[-1])
          if size > self._serving.options.body_bytes:
            return self._too_large(), b""
          if not message.get("more_body"):
            return None, b"".join(parts)
    except TimeoutError:
      seconds = self._serving.options.body_seconds
      return refused(408, f"the body did not come within {seconds:g} s", {"Connection": "close"}), b""


class _Gone(Exception):
  """The client has left."""


def refused(status: int, error: str, headers: dict[str, str] | None = None) -> JSONResponse:
  """A refusal: a status and a line that says why."""
  return JSONResponse({"error": printable(error)}, status, headers=headers)


def read_page() -> tuple[str, str]:
  """The page, and the policy under which a browser shows it: what stands in it, and nothing from elsewhere."""
  text = (pathlib.Path(__file__).parent / "page.html").read_text(encoding="utf-8")

  def digests(tag: str) -> str:
    parts = re.findall(rf"<{tag}>(.*?)</{tag}>", text, re.DOTALL)
    return " ".join(f"'sha256-{base64.b64encode(hashlib.sha256(part.encode()).digest()).decode()}'" for part in parts)

  policy = (
    f"default-src 'none'; script-src {digests('script')}; style-src {digests('style')}; connect-src 'self';"
    " img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
  )
  return text, policy


def make_app(serving: Serving) -> fastapi.FastAPI:
  """The application."""

  @contextlib.asynccontextmanager
  async def lifespan(app: fastapi.FastAPI) -> AsyncIterator[None]:
    yield
    await serving.close()

  statuses = {status: {"model": Refusal} for status in (400, 401, 404, 408, 413, 422, 429, 503)}
  app = fastapi.FastAPI(
    title="bbqrec",
    version=bbqrec_jax.__version__,
    description="Recommendations from a bundle.",
    docs_url=None,  # Its page would be fetched from elsewhere.
    redoc_url=None,
    lifespan=lifespan,
    responses=statuses,  # type: ignore[arg-type]
  )
  text, policy = read_page()

  @app.exception_handler(InputError)
  async def of_input(request: Any, error: InputError) -> Response:
    return refused(404 if isinstance(error, Unknown) and request.method == "GET" else 422, str(error))

  @app.exception_handler(Overloaded)
  async def of_load(request: Any, error: Overloaded) -> Response:
    return refused(429 if "too many" in str(error) else 503, f"{error}; try again later", {"Retry-After": "1"})

  @app.exception_handler(RequestValidationError)
  async def of_fields(request: Any, error: RequestValidationError) -> Response:
    first = error.errors()[0]
    where = ".".join(str(part) for part in first["loc"][1:]) or "body"
    said = "no such field; /openapi.json names those there are" if first["type"] == "extra_forbidden" else first["msg"]
    return refused(400 if first["type"] == "json_invalid" else 422, f"{where}: {said}")

  @app.exception_handler(HTTPException)
  async def of_http(request: Any, error: HTTPException) -> Response:
    return refused(error.status_code, str(error.detail), dict(error.headers or {}))

  @app.exception_handler(Exception)
  async def of_us(request: Any, error: Exception) -> Response:
    say(event="error", kind=type(error).__name__)  # What it says may quote a request.
    return refused(500, "something went wrong here")

  @app.get("/", include_in_schema=False)
  async def page() -> Response:
    return HTMLResponse(text, headers={"Content-Security-Policy": policy, "Referrer-Policy": "no-referrer"})

  @app.get("/health")
  async def health() -> dict[str, str]:
    """Whether the process lives."""
    return {"status": "alive"}

  @app.get("/ready")
  async def ready() -> Response:
    """Whether it takes requests."""
    if serving.stopping:
      return refused(503, "stopping", {"Retry-After": "5"})
    return JSONResponse({"status": "ready", "bundle": serving.engine.bundle.version})

  @app.get("/about")
  async def about() -> dict[str, Any]:
    """What the bundle is of, and its limits."""
    bundle = serving.engine.bundle
    told = {name: bundle.about.get(name) for name in ("data", "test", "head", "semantic_ids", "bbqrec_jax")}
    if isinstance(told["data"], dict):
      told["data"] = {name: value for name, value in told["data"].items() if name != "source"}
    streams = {"streams": bundle.streams, "limits": bundle.limits, "timed": bundle.timed}
    filters = {"filters": bundle.attributes.about()}
    return (
      {"bundle": bundle.version, "items": bundle.num_items, "titles": any(bundle.titles)} | streams | filters | told
    )

  @app.post("/recommend", response_model=Recommendations)
  async def recommend(asked: Asked) -> Any:
    """The best next items of a history."""
    engine = serving.engine
    query, skipped = engine.query(asked)
    nothing = query.allow is not None and not len(query.allow)
    answer = Answer(*np.empty((2, 0))) if nothing else await engine.batcher.ask(query)
    # As it is: a check of our own answer against its model takes as long as all else that is done to it here.
    return JSONResponse(engine.recommendations(answer, skipped))

  @app.get("/similar", response_model=Similar)
  def similar(
    id: str,
    k: Annotated[int, fastapi.Query(ge=1, le=1000)] = 10,
    stream: str | None = None,
  ) -> Any:
    """The items most like one."""
    engine = serving.engine
    (row,), _ = engine.rows([id], "id", skip=False)
    if stream is not None and stream not in engine.bundle.streams:
      raise InputError(f"stream: expected one of {', '.join(engine.bundle.streams)}, got {shown(stream)}")
    found = engine.bundle.similar(int(row), count=k, stream=stream)
    near = zip(found.items, found.scores, strict=True)
    items = [engine.item(int(own)) | {"similarity": round(float(cosine), 4)} for own, cosine in near]
    return {"items": items, "bundle": engine.bundle.version}

  @app.get("/items", response_model=Found)
  def items(
    query: Annotated[str | None, fastapi.Query(max_length=200)] = None,
    id: str | None = None,
    limit: Annotated[int, fastapi.Query(ge=1, le=100)] = 20,
  ) -> Any:
    """Items by words of their titles, or one by its id; the first ones of the catalogue if neither is given."""
    engine = serving.engine
    if id is not None:
      (row,), _ = engine.rows([id], "id", skip=False)
      return {"items": [engine.item(int(row))]}
    if query is None:
      return {"items": [engine.item(row) for row in range(min(limit, engine.bundle.num_items))]}
    rows = engine.titles.search(query, count=limit)
    exact = engine.bundle.item_ids.rows([query.strip()]) if query.strip() else np.array([-1])
    rows = [int(row) for row in exact if row >= 0 and row not in rows] + rows
    return {"items": [engine.item(row) for row in rows[:limit]]}

  @app.get("/metrics")
  async def metrics() -> Response:
    """For Prometheus."""
    return Response(
      prometheus_client.generate_latest(serving.meters.registry), media_type=prometheus_client.CONTENT_TYPE_LATEST
    )

  @app.post("/reload")
  async def reload() -> dict[str, str]:
    """Takes the bundle that is at the server's path now; needs a server with a token."""
    if not serving.options.token:
      raise HTTPException(403, "start the server with a token to reload over HTTP, or send the process SIGHUP")
    try:
      await serving.reload()
    except InputError as error:
      raise HTTPException(409, f"{error}; the bundle in use stays") from error
    return {"bundle": serving.engine.bundle.version}

  app.add_middleware(Gate, serving=serving)
  return app
