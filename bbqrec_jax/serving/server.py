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
import pathlib
import re
from collections.abc import AsyncIterator, Callable
from typing import Annotated, Any

import fastapi
import numpy as np
import prometheus_client
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse, PlainTextResponse, Response
from fastapi.security import HTTPBearer
from starlette.exceptions import HTTPException

import bbqrec_jax
from bbqrec_jax.errors import InputError, printable, shown
from bbqrec_jax.serving.batching import Batcher, Overloaded
from bbqrec_jax.serving.bundle import Answer, Bundle
from bbqrec_jax.serving.engine import Engine, Unknown
from bbqrec_jax.serving.gate import Gate, Meters, Options, refused, say
from bbqrec_jax.serving.messages import Asked, Found, Recommendations, Refusal, Similar


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
    await self.engine.batcher.drain()
    self._thread.shutdown()


def set_aside() -> None:
  """Takes what is there now out of the collector's rounds: one through JAX and all titles stops every request."""
  gc.unfreeze()  # The bundle before this one may be collected.
  gc.collect()
  gc.freeze()


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

  statuses = {status: {"model": Refusal} for status in (400, 401, 404, 408, 413, 422, 429, 431, 500, 503)}
  app = fastapi.FastAPI(
    title="bbqrec",
    version=bbqrec_jax.__version__,
    description="Recommendations from a bundle.",
    docs_url=None,  # Its page would be fetched from elsewhere.
    redoc_url=None,
    lifespan=lifespan,
    responses=statuses,  # type: ignore[arg-type]
  )
  # It is declared here; the gate, which stands before, asks for it.
  bearer = HTTPBearer(auto_error=False, description="The token of the server, where it was started with one.")
  guarded = fastapi.APIRouter(dependencies=[fastapi.Depends(bearer)])
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
    kind, path, said = first["type"], [str(part) for part in first["loc"][1:]], first["msg"]
    if kind == "json_invalid":
      return refused(400, f"body: not JSON (position {path[0]})")
    if kind == "extra_forbidden":
      said = "no such field; /openapi.json names those there are"
      if path == ["user"]:
        said = "a server keeps no users; send what this one has had as history"
    if path[-1:] == ["str"]:  # One of the two kinds of ids, the first to be tried.
      path.pop()
      said = "Input should be a valid string or integer" if kind == "string_type" else said
    return refused(422, f"{'.'.join(path) or 'body'}: {said}")

  @app.exception_handler(HTTPException)
  async def of_http(request: Any, error: HTTPException) -> Response:
    return refused(error.status_code, str(error.detail), dict(error.headers or {}))

  @app.get("/", include_in_schema=False)
  async def page() -> Response:
    return HTMLResponse(text, headers={"Content-Security-Policy": policy, "Referrer-Policy": "no-referrer"})

  @app.get("/health")
  async def health() -> dict[str, str]:
    """Whether the process lives."""
    return {"status": "alive"}

  @app.get("/ready")
  async def ready() -> dict[str, str]:
    """Whether it takes requests: always, as the port opens with a bundle in use and closes first when it stops."""
    return {"status": "ready", "bundle": serving.engine.bundle.version}

  @guarded.get("/about")
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

  @guarded.post("/recommend", response_model=Recommendations)
  async def recommend(asked: Asked) -> Any:
    """The best next items of a history."""
    engine = serving.engine
    query, skipped = engine.query(asked)
    nothing = query.allow is not None and not len(query.allow)
    answer = Answer(*np.empty((2, 0))) if nothing else await engine.batcher.ask(query)
    # As it is: a check of our own answer against its model takes as long as all else that is done to it here.
    return JSONResponse(engine.recommendations(answer, skipped))

  @guarded.get("/similar", response_model=Similar)
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

  @guarded.get("/items", response_model=Found)
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

  @app.get("/metrics", response_class=PlainTextResponse)
  async def metrics() -> Response:
    """For Prometheus."""
    return Response(
      prometheus_client.generate_latest(serving.meters.registry), media_type=prometheus_client.CONTENT_TYPE_LATEST
    )

  @guarded.post("/reload", responses={status: {"model": Refusal} for status in (403, 409)})
  async def reload() -> dict[str, str]:
    """Takes the bundle that is at the server's path now; needs a server with a token."""
    if not serving.options.token:
      raise HTTPException(403, "start the server with a token to reload over HTTP, or send the process SIGHUP")
    try:
      await serving.reload()
    except InputError as error:
      raise HTTPException(409, f"{error}; the bundle in use stays") from error
    return {"bundle": serving.engine.bundle.version}

  app.include_router(guarded)
  app.add_middleware(Gate, options=serving.options, meters=serving.meters)
  return app
