"""Making many small frozen records fast: what comes off the wire is built here."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from typing import Any, TypeVar

Record = TypeVar("Record")


def constructor(cls: type[Record], **always: Any) -> Callable[..., Record]:
    """A function that makes a `cls`, a frozen and slotted dataclass, out of all its fields in their order,
    but for those named in `always`, which have that value each time.

    It costs an eighth of `cls(...)`, which has to go round its own `__setattr__` for every field: the
    values are set on an object of a twin class that is not frozen and has the same slots, and that object
    is then made a `cls`, frozen like any other. `__post_init__` is not called; there must be none.
    """
    names = [f.name for f in fields(cls)]  # type: ignore[arg-type]
    assert tuple(names) == cls.__slots__  # type: ignore[attr-defined]
    assert not hasattr(cls, "__post_init__")
    twin = type(f"_{cls.__name__}", (), {"__slots__": tuple(names)})
    # written out as source for the reason that dataclasses does so: a loop over names costs more than it saves
    lines = [f"def make({', '.join(name for name in names if name not in always)}):", " made = twin()"]
    lines += [f" made.{name} = {name}" for name in names]
    lines += [" made.__class__ = cls", " return made"]
    namespace: dict[str, Any] = {"twin": twin, "cls": cls, **always}
    exec("\n".join(lines), namespace)
    make: Callable[..., Record] = namespace["make"]
    return make
