"""What goes over the line: requests, and what they are answered with."""

from typing import Literal

import pydantic

_MOST = 10_000  # Entries of a list in a request.

Id = pydantic.StrictStr | pydantic.StrictInt


class Item(pydantic.BaseModel):
  """An item of the catalogue."""

  id: Id
  title: str


class Reason(Item):
  """An item of the history that a recommended one is like."""

  stream: str = pydantic.Field(description="What they are alike in: a modality, all (fused, items), behaviour.")
  similarity: float | None = pydantic.Field(description="The cosine of what the model is told of both.")
  bucket: int | str | None = pydantic.Field(None, description="Of the similarity, where the model adds for it.")
  added: float | None = pydantic.Field(
    None, description="What the model adds to the score for it, before a network, if it has one, weighs other signals."
  )


class Recommended(Item):
  """An item that is recommended."""

  score: float = pydantic.Field(description="Log-probability; the higher the better.")
  reasons: list[Reason]


class Range(pydantic.BaseModel):
  """Limits of a price, either or both."""

  model_config = pydantic.ConfigDict(extra="forbid")
  min: float | None = pydantic.Field(None, strict=True, allow_inf_nan=False)
  max: float | None = pydantic.Field(None, strict=True, allow_inf_nan=False)


class Filters(pydantic.BaseModel):
  """What the items that may come back must have: one value of each list, in any case, and a price within the limits."""

  model_config = pydantic.ConfigDict(extra="forbid")
  brand: list[pydantic.StrictStr] | None = pydantic.Field(None, min_length=1, max_length=_MOST)
  category: list[pydantic.StrictStr] | None = pydantic.Field(
    None, min_length=1, max_length=_MOST, description="Any level of it."
  )
  price: Range | None = None


class Asked(pydantic.BaseModel):
  """A history, and what may be recommended for it."""

  model_config = pydantic.ConfigDict(extra="forbid")
  history: list[Id] | None = pydantic.Field(None, max_length=_MOST, description="Ids of items in time order.")
  titles: list[pydantic.StrictStr] | None = pydantic.Field(
    None, max_length=_MOST, description="In place of ids: whole titles, in any case."
  )
  k: pydantic.StrictInt = pydantic.Field(10, ge=1, description="How many items; at most limits.top of /about.")
  allow: list[Id] | None = pydantic.Field(
    None, min_length=1, max_length=_MOST, description="The only ids that may come back."
  )
  filters: Filters | None = pydantic.Field(None, description="What the items that may come back must have.")
  deny: list[Id] = pydantic.Field([], max_length=_MOST, description="Ids that must not come back.")
  repeat: pydantic.StrictBool = pydantic.Field(False, description="Whether items of the history may come back.")
  times: list[pydantic.FiniteFloat] | None = pydantic.Field(
    None, max_length=_MOST, description="The second of each interaction, for a model that looks at the time between."
  )
  unknown: Literal["refuse", "skip"] = pydantic.Field(
    "refuse", description="What is done about items that the bundle does not know."
  )
  reasons: pydantic.StrictInt = pydantic.Field(2, ge=0, le=10, description="Reasons of each item.")


class Recommendations(pydantic.BaseModel):
  """What is recommended, best first."""

  items: list[Recommended]
  skipped: list[Id] = pydantic.Field(description="Items of the request that the bundle does not know.")
  bundle: str = pydantic.Field(description="Version of the bundle that answered.")


class Neighbour(Item):
  """A similar item."""

  similarity: float


class Similar(pydantic.BaseModel):
  """Items like another, the nearest first."""

  items: list[Neighbour]
  bundle: str


class Found(pydantic.BaseModel):
  """Items of the catalogue."""

  items: list[Item]


class Refusal(pydantic.BaseModel):
  """Why a request was refused, in one line."""

  error: str
