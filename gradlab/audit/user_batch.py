"""Batches and configurations under a user's own names: mappings, attributes and dataclasses whose fields are understood like arguments."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import torch

from gradlab.audit.batch import Batch
from gradlab.audit.roles import ROLES, role_of

_TENSORS = tuple(item.name for item in dataclasses.fields(Batch))


class UserBatch(Batch):
    """A `Batch` that is also a mapping, and whose fields are found under the names that users give them.

    `read` collects, for the report, which field was read as what; `decided` says what names cannot.
    """

    read: dict[str, str]
    decided: Mapping[str, str]

    @classmethod
    def of(cls, batch: Batch, read: dict[str, str], decided: Mapping[str, str]) -> UserBatch:
        """The batch, with what its fields are read as collected in `read`."""
        made = cls(**{name: getattr(batch, name) for name in _TENSORS})
        object.__setattr__(made, "read", read)
        object.__setattr__(made, "decided", decided)
        return made

    def rows(self, rows: list[int]) -> UserBatch:
        """The responses `rows`, understood alike."""
        return UserBatch.of(super().rows(rows), self.read, self.decided)

    def _field(self, name: str) -> Any:
        role = self.decided.get(name) or role_of(name)
        if role is None or role in ("batch", "micro_batches"):
            raise KeyError(
                f"the batch has a field {name!r} for the loss, and what it is cannot be told; say it with --bind {name}=ROLE"
            )
        self.read[name] = role
        return ROLES[role](self)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name in ("read", "decided"):
            raise AttributeError(name)
        try:
            return self._field(name)
        except KeyError as error:
            raise AttributeError(error.args[0]) from None

    def __getitem__(self, key: Any) -> Any:
        if isinstance(key, str):
            return self._field(key)
        if isinstance(key, tuple) and all(isinstance(part, str) for part in key):
            return self._field("_".join(key))
        raise KeyError(f"the batch has fields by their names, not {key!r}")

    def get(self, key: Any, default: Any = None) -> Any:
        """A field, or the default for a name that is not understood."""
        try:
            return self[key]
        except KeyError:
            return default

    def pop(self, key: Any, default: Any = None) -> Any:
        """As `get`: whatever is read stays."""
        return self.get(key, default)

    def __contains__(self, key: object) -> bool:
        return isinstance(key, str) and (key in self.decided or role_of(key) is not None)

    def __iter__(self) -> Iterator[str]:
        return iter(_TENSORS)

    def keys(self) -> list[str]:
        """The names of the fields of a `Batch`."""
        return list(_TENSORS)

    @property
    def batch(self) -> UserBatch:
        """Itself, for batches whose tensors are in a field `batch`."""
        return self

    @property
    def batch_size(self) -> torch.Size:
        """`[B]`, as tensor dictionaries have it."""
        return torch.Size([len(self.mask)])

    @property
    def device(self) -> torch.device:
        """The CPU."""
        return self.mask.device

    def __len__(self) -> int:
        return len(self.mask)

    def to(self, *_: Any, **__: Any) -> UserBatch:
        """Itself: everything is on the CPU."""
        return self


def built(kind: type, batch: UserBatch) -> Any:
    """A dataclass of the user's, its fields filled by their names; those with a default that are not understood keep it."""
    given = {}
    for item in dataclasses.fields(kind):
        required = item.default is dataclasses.MISSING and item.default_factory is dataclasses.MISSING
        if item.init and (item.name in batch or required):
            value = batch[item.name]
            wants_bool = (
                isinstance(value, torch.Tensor) and batch.read.get(item.name) == "mask" and "bool" in str(item.type).lower()
            )
            given[item.name] = value.bool() if wants_bool else value
    return kind(**given)


class Settings(dict[str, Any]):
    """A configuration: nested settings that are read as items and as attributes."""

    @classmethod
    def of(cls, found: Any) -> Any:
        """Mappings within mappings as settings; everything else as it is."""
        return cls({key: cls.of(item) for key, item in found.items()}) if isinstance(found, Mapping) else found

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        if name not in self:
            raise AttributeError(f"the configuration has no {name!r}; give it with --set NAME.{name}=VALUE")
        return self[name]


def nested(settings: Mapping[str, object]) -> dict[str, Any]:
    """`{"config.kl.coef": 0.1}` as `{"config": Settings(kl=Settings(coef=0.1))}`; names without a dot stay."""
    found: dict[str, Any] = {}
    for key, value in settings.items():
        first, *rest = key.split(".")
        if not rest:
            found[first] = Settings.of(value)
            continue
        place = found.setdefault(first, Settings())
        for part in rest[:-1]:
            place = place.setdefault(part, Settings())
        place[rest[-1]] = value
    return found
