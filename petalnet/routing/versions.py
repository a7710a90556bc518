"""Which servers hold the same bytes of a model.

A discovery key says what architecture and which client part a model has; its blocks may still differ (two fine-tunes). Servers
announce the digests of their blocks, and bytes decide: a route must never lead from one version into the other.

Blocks for which all servers announce the same digest say nothing against anyone. A block with several digests is *contested*. Two
servers that agree about a contested block belong together, as do those which that chain of agreement reaches; a server that
contradicts the version at any block does not belong to it. Nothing else joins servers across contested blocks: where two halves of
two versions lie side by side and no server spans the seam, either pairing might be the wrong one, and there is no route.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

from petalnet.routing.records import DIGEST_CHARS, ServerRecord

MAX_VERSIONS = 16
MAX_CLAIMS = 256
"""Versions, and different lists of digests, that are looked at: those of most servers first. Made-up ones must not make routing slow."""

Claim = frozenset[tuple[int, str]]
"""(block, digest) for the contested blocks that a server holds."""
_NEVER: Claim = frozenset([(-1, "")])


def versions(records: Sequence[ServerRecord], *, expected: Mapping[int, str] | None = None) -> list[list[ServerRecord]]:
    """The versions of a model that its servers hold, each as the servers that may be joined in one route, the most widely held first.

    The order depends on all of the model's blocks, whichever are wanted, so that routes through its parts lead to the same version.

    Args:
        expected: block → digest of the version that was asked for; servers that announce another digest for such a block are left
            out beforehand.

    A server that announces no digests (yet) is trusted where nothing is contested, and used for no contested block.
    """
    if expected:
        wanted = {block: digest[:DIGEST_CHARS] for block, digest in expected.items()}
        records = [record for record in records if not _contradicts(_digests(record), wanted)]
    announced: dict[int, set[str]] = {}
    for record in records:
        for block, digest in _digests(record).items():
            announced.setdefault(block, set()).add(digest)
    contested = {block for block, digests in announced.items() if len(digests) > 1}
    if not contested:
        return [list(records)]

    common: list[ServerRecord] = []
    claims: Counter[Claim] = Counter()
    claim_of: dict[str, Claim] = {}
    for record in records:
        if not any(record.holds(block) for block in contested):
            common.append(record)
        elif record.block_digests:
            claim = frozenset((block, digest) for block, digest in _digests(record).items() if block in contested)
            claims[claim] += 1
            claim_of[record.peer_id] = claim

    by_support = sorted(claims, key=lambda claim: (-claims[claim], -len(claim), sorted(claim)))[:MAX_CLAIMS]
    grown = {_grow(seed, by_support) for seed in by_support[:MAX_VERSIONS]}
    members = {version: [record for record in records if claim_of.get(record.peer_id, _NEVER) <= version] for version in grown}
    return [common + members[version] for version in sorted(grown, key=lambda version: (-len(members[version]), sorted(version)))]


def _digests(record: ServerRecord) -> dict[int, str]:
    return {record.span[0] + index: digest for index, digest in enumerate(record.block_digests)}


def _contradicts(digests: Mapping[int, str], others: Mapping[int, str]) -> bool:
    return any(others.get(block, digest) != digest for block, digest in digests.items())


def _grow(seed: Claim, claims: Sequence[Claim]) -> Claim:
    """The seed and all claims that agree with it, directly or through others, without contradicting what was taken in before.

    Claims of most servers go first, so a single odd server cannot keep them apart.
    """
    version = dict(seed)
    waiting, size = [claim for claim in claims if claim != seed], 0
    while size != len(version):
        size = len(version)
        for claim in waiting:
            if version.items() & claim and not _contradicts(dict(claim), version):
                version.update(claim)
    return frozenset(version.items())
