"""Settings as frozen dataclasses: a field is declared once, with its type, default, choices, range and one sentence.

From the fields come the configs (`to_config`), their checks (`from_config`), and what is said of them (`describe`).
"""

import dataclasses
import functools
import math
import typing
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple, TypeVar

import ml_collections

from bbqrec_jax.errors import InputError
from bbqrec_jax.utils.named import part

Settings = TypeVar("Settings")

_LARGEST = 2**63  # Of numbers; JSON itself knows no bounds.


class Rule(NamedTuple):
  """What is known of a field beside its type and default.

  Attributes:
    doc: one sentence.
    choices: what a string may be.
    subset: what a tuple of strings may hold, each once.
    parts: names of parts of this project, by "module:function"; other "module:function" may be given too.
    least: the smallest value of a number.
    most: the largest value.
    above: a value that a number must be greater than.
    below: a value that a number must be less than.
    derived: whether the field is no setting, but is filled in from data.
  """

  doc: str
  choices: tuple[str, ...] = ()
  subset: tuple[str, ...] = ()
  parts: Mapping[str, str] = {}
  least: float | None = None
  most: float | None = None
  above: float | None = None
  below: float | None = None
  derived: bool = False


def setting(default: Any, doc: str, **rules: Any) -> Any:
  """A field of settings; `rules` are those of `Rule`. Numbers are at least 1 (integers) or 0 (floats) by default."""
  if not isinstance(default, bool | str | tuple):
    rules.setdefault("least", 1 if isinstance(default, int) else 0)
  return dataclasses.field(default=default, metadata={"rule": Rule(doc, **rules)})


def derived(default: Any, doc: str) -> Any:
  """A field that is filled in from data, and is in no config."""
  return dataclasses.field(default=default, metadata={"rule": Rule(doc, derived=True)})


def section(kind: Any, doc: str, **defaults: Any) -> Any:
  """A field that holds settings of another class, with other defaults."""
  return dataclasses.field(default_factory=functools.partial(kind, **defaults), metadata={"rule": Rule(doc)})


def _fields(settings: Any) -> Iterator[tuple[dataclasses.Field, Rule]]:
  """The fields that a config has, with their rules; those of a base class come last."""
  own = (settings if isinstance(settings, type) else type(settings)).__annotations__
  for field in sorted(dataclasses.fields(settings), key=lambda field: field.name not in own):
    rule = field.metadata["rule"]
    if not rule.derived:
      yield field, rule


def to_config(settings: Any) -> ml_collections.ConfigDict:
  """The settings as a config whose fields can be set; locked, so that a misspelt one is an error."""
  config = ml_collections.ConfigDict()
  for field, _ in _fields(settings):
    value = getattr(settings, field.name)
    config[field.name] = to_config(value) if dataclasses.is_dataclass(value) else value
  return config.lock()


def flatten(config: Any, prefix: str = "") -> dict[str, Any]:
  """The fields of a config, or of nested dictionaries, by dotted name; lists become tuples."""
  flat: dict[str, Any] = {}
  for name, value in config.items():
    if hasattr(value, "items"):
      flat |= flatten(value, f"{prefix}{name}.")
    else:
      flat[prefix + name] = tuple(value) if isinstance(value, list) else value
  return flat


def foreign_code(kind: Any, values: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
  """The fields, with their values, that name a part which is none of this project's."""
  for field, rule in _fields(kind):
    name = values.get(field.name)
    if rule.parts and name is not None and name not in tuple(rule.parts):
      yield field.name, str(name)


def from_config(kind: type[Settings], config: Any, *, prefix: str = "", unchecked: str | None = None) -> Settings:
  """Settings of a class from a config, or from nested dictionaries.

  Args:
    kind: the class.
    config: fields by name.
    prefix: of the names, for messages.
    unchecked: prefix of the fields that are not held against their rules and one another; "" is all, None is none.

  Raises:
    InputError: if a field is unknown, missing, of another type, or breaks a rule; names the field.
  """
  given, check = dict(config.items()), unchecked is None or not prefix.startswith(unchecked)
  expected = {field.name: (field, rule) for field, rule in _fields(kind)}
  for name in sorted(given.keys() ^ expected.keys()):
    what = "unknown" if name in given else "missing"
    raise InputError(f"config field {prefix}{name} is {what}: --help-config lists the fields and what they mean")
  values: dict[str, Any] = {}
  hints = typing.get_type_hints(kind)
  for name, (field, rule) in expected.items():
    value = given[name]
    if field.default is dataclasses.MISSING:
      if not hasattr(value, "items"):
        raise InputError(f"config field {prefix}{name}: expected fields of its own, got {value!r}")
      factory: Any = field.default_factory
      values[name] = from_config(type(factory()), value, prefix=f"{prefix}{name}.", unchecked=unchecked)
      continue
    values[name] = _typed(prefix + name, value, hints[name])
    if check:
      _check(prefix + name, values[name], rule)
  made = kind(**values)
  if check and hasattr(made, "check"):
    made.check(prefix)
  return made


def _typed(name: str, value: Any, hint: Any) -> Any:
  """The value, with a list as a tuple and an integer as a float where one is expected.

  Raises:
    InputError: if it is of another type.
  """
  if isinstance(value, list):
    value = tuple(value)
  if hint is float and type(value) is int and abs(value) < _LARGEST:
    value = float(value)
  origin = typing.get_origin(hint) or hint
  fits = type(value) is origin and not (isinstance(value, int) and abs(value) >= _LARGEST)
  if fits and origin is tuple:
    of = typing.get_args(hint)[0]
    fits = all(type(one) is of for one in value)
  if not fits:
    raise InputError(f"config field {name}: expected {_named_type(hint)}, got {value!r}")
  return value


def _named_type(hint: Any) -> str:
  words = {int: "a whole number", float: "a number", bool: "True or False", str: "a string"}
  if typing.get_origin(hint) is tuple:
    return {int: "whole numbers, as 64,32", str: "names, as ('text', 'image')"}[typing.get_args(hint)[0]]
  return words[hint]


def _check(name: str, value: Any, rule: Rule) -> None:
  """Holds one value against its rule.

  Raises:
    InputError: if it breaks it.
  """
  field = f"config field {name}"
  if rule.choices and value not in rule.choices:
    raise InputError(f"{field} must be one of {', '.join(rule.choices)}, got {value!r}")
  if rule.subset and (not set(value) <= set(rule.subset) or len(set(value)) < len(value)):
    raise InputError(f"{field} may hold each of {', '.join(rule.subset)} once, got {value!r}")
  if rule.parts:
    part(name, value, rule.parts)
  if rule.least is not None and not (rule.least <= value and math.isfinite(value)):
    raise InputError(f"{field} must be at least {rule.least} and finite, got {value}")
  for bound, broken, words in (
    (rule.most, lambda bound: value > bound, "at most"),
    (rule.above, lambda bound: value <= bound, "greater than"),
    (rule.below, lambda bound: value >= bound, "less than"),
  ):
    if bound is not None and broken(bound):
      raise InputError(f"{field} must be {words} {bound}, got {value}")


def describe(settings: Any, prefix: str = "") -> list[tuple[str, str, str, str]]:
  """(name, default, what it may be, sentence) of every field, in the order of declaration."""
  rows = []
  for field, rule in _fields(settings):
    value = getattr(settings, field.name)
    if dataclasses.is_dataclass(value):
      rows += describe(value, f"{prefix}{field.name}.")
      continue
    allowed = ", ".join(rule.choices or rule.subset or rule.parts)
    allowed += " or module:function" if rule.parts else ""
    if not allowed:
      bounds = ((">=", rule.least), (">", rule.above), ("<=", rule.most), ("<", rule.below))
      allowed = " and ".join(f"{sign} {bound}" for sign, bound in bounds if bound is not None)
    rows.append((prefix + field.name, repr(value), allowed, rule.doc))
  return rows
