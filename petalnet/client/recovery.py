"""How a session goes on without servers that it has lost: what is to be done, and what was done. Pure.

The servers that are left keep what they have. Others take the place of the lost ones, so a chain that is mended is made of survivors and
newcomers. All of them are told of their neighbours; the newcomers' KV entries are computed anew, from what the nearest survivor before them
has kept of its outputs, or from the client's record where there is none. Whatever fails meanwhile, what then stands is mended again: a
newcomer that has not got all entries counts as lost.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from petalnet.client.trace_text import counted, describe_seconds
from petalnet.errors import describe_blocks
from petalnet.routing.routes import Hop


class Gap(NamedTuple):
    """Blocks [first, end) that nobody in the chain holds any more."""

    first: int
    end: int


class Run(NamedTuple):
    """Hops that compute their entries anew in one go.

    Attributes:
        first, last: the hops that the steps go through, by their numbers in the chain.
        from_kept: whether the first of them is a survivor, which sends on what it has kept.
    """

    first: int
    last: int
    from_kept: bool


def gaps_of(survivors: Sequence[Hop], first: int, end: int) -> list[Gap]:
    """What is missing between hops in their order, for blocks [first, end)."""
    gaps: list[Gap] = []
    at = first
    for start, stop in [*((hop.first, hop.end) for hop in survivors), (end, end)]:
        if at < start:
            gaps.append(Gap(at, start))
        at = stop
    return gaps


def runs_of(hops: Sequence[Hop], newcomers: Sequence[Hop]) -> list[Run]:
    """What has to be computed anew in a chain, in the order of its hops; its newcomers have nothing yet."""
    runs: list[Run] = []
    new = [any(hop is newcomer for newcomer in newcomers) for hop in hops]
    for index, is_new in enumerate(new):
        if not is_new:
            continue
        if index and new[index - 1]:
            runs[-1] = runs[-1]._replace(last=index)
        else:
            runs.append(Run(max(index - 1, 0), index, from_kept=index > 0))
    return runs


@dataclass(frozen=True)
class Recovery:
    """One recovery of a session.

    Attributes:
        reason: what was wrong, one line for a person.
        lost: the servers that the session went on without.
        replacements: those that have taken over their blocks.
        tokens: KV entries of a row that were computed anew.
        noticed_s: seconds from the beginning of the step until the loss was noticed; 0 where it was before the step.
        rebuilt_s: seconds from then until the session stood as before.
        uploaded_bytes: what this client sent for it: arrays, without headers.
    """

    reason: str
    lost: tuple[Hop, ...]
    replacements: tuple[Hop, ...]
    tokens: int
    noticed_s: float
    rebuilt_s: float
    uploaded_bytes: int

    def to_dict(self) -> dict[str, Any]:
        """All of it as plain values, ready for JSON."""
        places = {
            name: [{"peer_id": hop.peer_id, "first": hop.first, "end": hop.end} for hop in hops]
            for name, hops in (("lost", self.lost), ("replacements", self.replacements))
        }
        return {
            "reason": self.reason,
            **places,
            "tokens": self.tokens,
            "noticed_s": self.noticed_s,
            "rebuilt_s": self.rebuilt_s,
            "uploaded_bytes": self.uploaded_bytes,
        }

    def __str__(self) -> str:
        gone = ", ".join(f"…{hop.peer_id[-6:]} ({describe_blocks(range(hop.first, hop.end))})" for hop in self.lost)
        taking = ", ".join(f"…{hop.peer_id[-6:]}" for hop in self.replacements)
        servers, takes = ("server", "is") if len(self.lost) == 1 else ("servers", "are")
        over = "takes over" if len(self.replacements) == 1 else "take over"
        rebuilt = f"{counted(self.tokens, 'token')} rebuilt in {describe_seconds(self.rebuilt_s)}"
        return f"{servers} {gone} {takes} gone: {taking} {over}, {rebuilt}"
