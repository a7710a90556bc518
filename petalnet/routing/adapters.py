"""Which LoRA adapter is meant by a name.

A server announces its adapters by labels: a name, "@" and the beginning of a digest of the adapter's bytes. Names are labels of people, so
two servers may mean different things by one; bytes decide, and a route never joins two adapters of one name.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from petalnet.errors import CallerError
from petalnet.routing.records import ServerRecord

MOST_NAMED = 16
"""Labels that an error lists."""


def adapter_label(records: Iterable[ServerRecord], wanted: str) -> str:
    """The label of an adapter; "" where nobody has it.

    Args:
        records: of all servers of the model.
        wanted: its name, or its whole label.
    Raises:
        CallerError: there are several adapters of the name.
    """
    labels = labels_of(records)
    if wanted in labels:
        return wanted
    found = [label for label in labels if label.rpartition("@")[0] == wanted]
    if len(found) > 1:
        raise CallerError(f"servers have {len(found)} different adapters named {wanted!r}; ask for one of {_listed(found)}")
    return found[0] if found else ""


def unknown_adapter(records: Iterable[ServerRecord], wanted: str) -> CallerError:
    """The error that says that nobody has an adapter, and what there is instead."""
    labels = labels_of(records)
    return CallerError(
        f"no server of this model has the adapter {wanted!r}; {f'there are {_listed(labels)}' if labels else 'none has any'}"
    )


def having(records: Iterable[ServerRecord], adapter: str | None, label: str) -> list[ServerRecord]:
    """Of servers those that have an adapter; all of them where none is asked for (None)."""
    return [record for record in records if adapter is None or label in record.adapters]


def labels_of(records: Iterable[ServerRecord]) -> list[str]:
    """All adapters that are announced."""
    return sorted({label for record in records for label in record.adapters})


def _listed(labels: Sequence[str]) -> str:
    more = f", and {len(labels) - MOST_NAMED} more" if len(labels) > MOST_NAMED else ""
    return ", ".join(labels[:MOST_NAMED]) + more
