"""libp2p's negotiation of protocols (multistream-select), with words of bounded length.

The stock reader believes a stranger who announces a word of 4 GB, and gathers what comes of it until the negotiation's deadline.
"""

from __future__ import annotations

from collections.abc import Sequence

from libp2p.abc import IMultiselectCommunicator
from libp2p.custom_types import StreamHandlerFn, TProtocol
from libp2p.io.abc import ReadWriteCloser
from libp2p.io.exceptions import IOException
from libp2p.network.swarm import Swarm
from libp2p.protocol_muxer.multiselect import DEFAULT_NEGOTIATE_TIMEOUT, Multiselect
from libp2p.protocol_muxer.multiselect_client import MultiselectClient
from libp2p.protocol_muxer.multiselect_communicator import MultiselectCommunicator

MAX_WORD = 1024
"""Bytes of the longest word that is read, by far more than the name of any protocol takes."""


class BoundedMultiselect(Multiselect):
    """The side that answers."""

    async def negotiate(
        self, communicator: IMultiselectCommunicator, negotiate_timeout: int = DEFAULT_NEGOTIATE_TIMEOUT
    ) -> tuple[TProtocol | None, StreamHandlerFn | None]:
        return await super().negotiate(_bounded(communicator), negotiate_timeout)


class BoundedMultiselectClient(MultiselectClient):
    """The side that asks."""

    async def select_one_of(
        self, protocols: Sequence[TProtocol], communicator: IMultiselectCommunicator, negotiate_timeout: int = DEFAULT_NEGOTIATE_TIMEOUT
    ) -> TProtocol:
        return await super().select_one_of(protocols, _bounded(communicator), negotiate_timeout)


def bound_negotiations(swarm: Swarm) -> None:
    """Bound the words in which the connections of a swarm agree on secure channels and multiplexers."""
    for upgrade in (swarm.upgrader.security_multistream, swarm.upgrader.muxer_multistream):
        selector = upgrade._selector
        selector.multiselect = BoundedMultiselect(selector.multiselect.handlers)
        selector.multiselect_client = BoundedMultiselectClient()


def _bounded(communicator: IMultiselectCommunicator) -> IMultiselectCommunicator:
    if not isinstance(communicator, MultiselectCommunicator):
        raise TypeError(f"libp2p negotiates through a {type(communicator).__name__}")
    return MultiselectCommunicator(_Words(communicator.read_writer))


class _Words(ReadWriteCloser):
    """A stream on which nobody reads more than a word at a time."""

    def __init__(self, stream: ReadWriteCloser) -> None:
        self._stream = stream

    async def read(self, n: int | None = None) -> bytes:
        if n is None or n > MAX_WORD:
            raise IOException(f"a word of {n} bytes is too long for the name of a protocol")
        return await self._stream.read(n)

    async def write(self, data: bytes) -> None:
        await self._stream.write(data)

    async def close(self) -> None:
        await self._stream.close()

    def get_remote_address(self) -> tuple[str, int] | None:
        return self._stream.get_remote_address()
