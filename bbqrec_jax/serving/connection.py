"""What stands before HTTP is spoken: how long and how large a request's head may be, and what uvicorn is told."""

import asyncio
import functools
import http
import math
from typing import Any

import uvicorn
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from bbqrec_jax.serving.gate import Options, refused


class Connection(HttpToolsProtocol):
  """uvicorn's connection, which closes where a head is too slow or too large, and refuses in JSON.

  The time of a head runs from the beginning of a connection, later from the first byte after an answer; a connection
  that is silent after one is uvicorn's to close. Trailers and the frames of a chunked body are bounded as heads are.
  """

  def __init__(self, options: Options, **about: Any):
    """Takes the server's options, and what uvicorn gives."""
    super().__init__(**about)
    self._options = options
    self._timer: asyncio.TimerHandle | None = None
    self._size = 0  # Of what came since the last head or piece of a body.

  def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
    """The time of the first head begins."""
    super().connection_made(transport)
    self._start_timer()

  def connection_lost(self, exc: Exception | None) -> None:
    """Nothing is waited for any more."""
    self._stop_timer()
    super().connection_lost(exc)

  def data_received(self, data: bytes) -> None:
    """Some bytes of requests."""
    if self._timer is None and (self.cycle is None or self.cycle.response_complete):
      self._start_timer()
    self._size += len(data)
    super().data_received(data)
    if self._size > self._options.head_bytes:
      self._refuse(431, f"expected a head of at most {self._options.head_bytes} bytes, got more")

  def on_headers_complete(self) -> None:
    """A head is whole; the gate is told whether there are too many connections."""
    self._stop_timer()
    self._size = 0
    self.scope["state"]["crowded"] = len(self.connections) > self._options.connections
    super().on_headers_complete()

  def on_body(self, body: bytes) -> None:
    """A piece of a body, of which the gate knows how long and large it may be."""
    self._size = 0
    super().on_body(body)

  def send_400_response(self, msg: str) -> None:
    """What came is no HTTP."""
    self._refuse(400, msg)

  def _start_timer(self) -> None:
    self._timer = self.loop.call_later(self._options.head_seconds, self._late)

  def _stop_timer(self) -> None:
    if self._timer is not None:
      self._timer.cancel()
      self._timer = None

  def _late(self) -> None:
    if self._size:
      self._refuse(408, f"the head did not come within {self._options.head_seconds:g} s")
    else:
      self.transport.close()

  def _refuse(self, status: int, error: str) -> None:
    """Closes, and says why unless an answer is under way, which it would end up in."""
    if not self.transport.is_closing() and (self.cycle is None or self.cycle.response_complete):
      response = refused(status, error, {"Connection": "close"})
      head = [f"HTTP/1.1 {status} {http.HTTPStatus(status).phrase}".encode()]
      head += [name + b": " + value for name, value in response.raw_headers]
      self.transport.write(b"\r\n".join([*head, b"", bytes(response.body)]))
    self.transport.close()


def listening(app: Any, options: Options, *, host: str = "127.0.0.1", port: int = 0) -> uvicorn.Config:
  """What uvicorn is told to serve an application.

  Told to stop, it lets a request that is under way have the time that its body and its answer may take at most.
  """
  return uvicorn.Config(
    app,
    host=host,
    port=port,
    http=functools.partial(Connection, options),  # type: ignore[arg-type]
    log_level="warning",
    access_log=False,  # It names clients.
    server_header=False,
    timeout_keep_alive=30,
    timeout_graceful_shutdown=math.ceil(options.body_seconds + options.timeout) + 1,
  )
