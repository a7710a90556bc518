"""Which servers a client uses by the precision that they compute in.

A server announces the dtype of its blocks and what their weights are rounded to (quantization). A client that wants answers of no less than
some precision says which it takes; others are as if they were not there.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass

from petalnet.routing.records import ServerRecord

DTYPES = ("float32", "bfloat16", "float16")
QUANTIZATIONS = ("none", "int8", "nf4")


@dataclass(frozen=True)
class Precisions:
    """What a client takes.

    Attributes:
        dtypes: as records name them; None for any.
        quantizations: likewise; "none" for weights as they are in the dtype.
    """

    dtypes: frozenset[str] | None = None
    quantizations: frozenset[str] | None = None

    def allow(self, record: ServerRecord) -> bool:
        """Whether a server computes in one of them."""
        return (self.dtypes is None or record.dtype in self.dtypes) and (
            self.quantizations is None or record.quantization in self.quantizations
        )

    def of(self, records: Iterable[ServerRecord]) -> list[ServerRecord]:
        """Of servers those that do."""
        return [record for record in records if self.allow(record)]

    def hint(self, records: Iterable[ServerRecord], blocks: Collection[int]) -> str:
        """Why blocks have no server, where some of them do have servers of other precisions; else ""."""
        others = {
            describe_precision(record.dtype, record.quantization)
            for record in records
            if not self.allow(record) and any(record.holds(block) for block in blocks)
        }
        if not others:
            return ""
        wanted = [f"{name}={_listed(values)}" for name, values in self._named if values is not None]
        return f"there are servers that compute in {_listed(others)}, which {' and '.join(wanted)} leaves out"

    @property
    def _named(self) -> tuple[tuple[str, frozenset[str] | None], ...]:
        return ("server_dtype", self.dtypes), ("quantization", self.quantizations)


ANY = Precisions()


def describe_precision(dtype: str, quantization: str) -> str:
    """A precision as people are told: "float32", "bfloat16/nf4"."""
    return dtype if quantization == "none" else f"{dtype}/{quantization}"


def _listed(names: Collection[str]) -> str:
    return " or ".join(sorted(names))
