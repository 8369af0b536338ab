"""Requests that come at about the same time are answered together."""

import asyncio
import collections
import concurrent.futures
import contextlib
import time
from collections.abc import Callable, Sequence

from bbqrec_jax.serving.bundle import Answer, Query


class Overloaded(Exception):
  """More is waiting than may wait, or an answer did not come in time; try again later."""


class Batcher:
  """Gathers queries into batches for one thread that answers them.

  A query waits for the batch in progress, and for `window` seconds more if it comes when nothing is in progress. At
  most `waiting` queries wait, and none for longer than `timeout`: whoever asks has an answer or a refusal by then.
  """

  def __init__(
    self,
    answer: Callable[[Sequence[Query]], list[Answer]],
    *,
    largest: int,
    waiting: int,
    window: float,
    timeout: float,
    thread: concurrent.futures.Executor,
    observe: Callable[[int, float], None] = lambda size, seconds: None,
  ):
    """Takes what answers a batch.

    Args:
      answer: queries -> answers; called in the thread.
      largest: queries of a batch.
      waiting: how many queries may wait.
      window: seconds that a batch is gathered for.
      timeout: seconds until a query is refused.
      thread: that answers.
      observe: is told the size of each batch and the seconds that it took.
    """
    self._answer, self._largest, self._waiting = answer, largest, waiting
    self._window, self._timeout, self._thread, self._observe = window, timeout, thread, observe
    self._queue: collections.deque[tuple[Query, asyncio.Future[Answer]]] = collections.deque()
    self._worker: asyncio.Task[None] | None = None

  def __len__(self) -> int:
    """How many queries wait."""
    return len(self._queue)

  async def ask(self, query: Query) -> Answer:
    """The answer to a query.

    Raises:
      Overloaded: if too many wait, or it takes too long.
      InputError: as what answers.
    """
    if len(self._queue) >= self._waiting:
      raise Overloaded("too many requests wait")
    future: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()
    self._queue.append((query, future))
    if self._worker is None or self._worker.done():
      self._worker = asyncio.create_task(self._work())
    try:
      return await asyncio.wait_for(future, self._timeout)
    except TimeoutError:
      raise Overloaded(f"no answer within {self._timeout:g} s") from None

  async def _work(self) -> None:
    """Answers until nothing waits any more."""
    await asyncio.sleep(self._window)
    while self._queue:
      batch = [self._queue.popleft() for _ in range(min(self._largest, len(self._queue)))]
      batch = [(query, future) for query, future in batch if not future.done()]  # Nobody waits for the others.
      if batch:
        await self._run(batch)

  async def _run(self, batch: list[tuple[Query, asyncio.Future[Answer]]]) -> None:
    start = time.perf_counter()
    try:
      answers = await asyncio.get_running_loop().run_in_executor(self._thread, self._answer, [one for one, _ in batch])
    except Exception as error:
      if len(batch) > 1:  # One bad query shall not fail the others.
        for one in batch:
          await self._run([one])
        return
      if not batch[0][1].done():
        batch[0][1].set_exception(error)
      return
    self._observe(len(batch), time.perf_counter() - start)
    for (_, future), answer in zip(batch, answers, strict=True):
      if not future.done():
        future.set_result(answer)

  async def drain(self) -> None:
    """Waits until all that were asked are answered."""
    while self._worker is not None and not self._worker.done():
      with contextlib.suppress(asyncio.CancelledError):
        await asyncio.shield(self._worker)
