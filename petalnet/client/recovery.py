"""What a session did to go on without a server that it had lost. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from petalnet.client.trace_text import counted, describe_seconds
from petalnet.errors import describe_blocks
from petalnet.routing.routes import Hop


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
