"""Each server gets a version of LoRA parameters once."""

from __future__ import annotations

import pytest
import torch
import trio
import trio.testing

from petalnet.client.lora import Adapted, Lora, Pair, fold
from petalnet.client.lora_uploads import LoraUploads, lora_version
from petalnet.routing.routes import Hop


def parameters(value: float = 1.0) -> Lora:
    """For block 1 of blocks 0 to 3."""
    return fold([Adapted(1, "linear", (Pair(torch.full((1, 2), value), torch.ones(2, 1), 1.0),))], "m", 0, 4)[0]


def hop(first: int, end: int, peer_id: str = "a") -> Hop:
    return Hop(peer_id, (), first, end)


async def bring(uploads: LoraUploads, to: Hop, lora: Lora) -> bool:
    """Whether there was something to bring."""
    async with uploads.bringing(to, lora) as message:
        await trio.sleep(1)
        return message is not None


def run(test: object, *args: object) -> None:
    trio.run(test, *args, clock=trio.testing.MockClock(autojump_threshold=0))


def test_once_for_each_server_and_version() -> None:
    async def main() -> None:
        uploads, lora = LoraUploads(), parameters()
        assert await bring(uploads, hop(0, 4), lora)
        assert not await bring(uploads, hop(0, 4), lora)
        assert not await bring(uploads, hop(1, 3), lora)  # a part of what is there
        assert not await bring(uploads, hop(0, 4), parameters())  # the same numbers
        assert await bring(uploads, hop(0, 4, "b"), lora)
        assert await bring(uploads, hop(0, 4), parameters(2.0))
        uploads.forget("a")
        assert await bring(uploads, hop(0, 4), lora)
        assert not await bring(uploads, hop(0, 4, "b"), lora)

    run(main)


def test_blocks_that_get_nothing() -> None:
    async def main() -> None:
        uploads, lora = LoraUploads(), parameters()
        assert not await bring(uploads, hop(2, 4), lora)
        assert (lora_version(lora, hop(2, 4)), lora_version(lora, hop(0, 2)), lora_version(None, hop(0, 2))) == ("", lora.version, "")

    run(main)


def test_others_wait_for_who_brings_it() -> None:
    async def main() -> None:
        uploads, lora, brought = LoraUploads(), parameters(), []

        async def one() -> None:
            brought.append(await bring(uploads, hop(0, 4), lora))

        async with trio.open_nursery() as nursery:
            for _ in range(3):
                nursery.start_soon(one)
        assert sorted(brought) == [False, False, True]

    run(main)


@pytest.mark.parametrize("fails", [True, False])
def test_who_fails_leaves_it_to_the_next(fails: bool) -> None:
    async def main() -> None:
        uploads, lora = LoraUploads(), parameters()
        with trio.move_on_after(0.5):
            async with uploads.bringing(hop(0, 4), lora):
                if fails:
                    with trio.fail_after(0.1):
                        await bring(uploads, hop(0, 4), lora)  # waits for itself
                await trio.sleep_forever()
        assert await bring(uploads, hop(0, 4), lora)

    if fails:
        with pytest.raises(trio.TooSlowError):
            run(main)
    else:
        run(main)


def test_the_latest_are_remembered() -> None:
    async def main() -> None:
        uploads = LoraUploads(most=2)
        for value in (1.0, 2.0, 3.0):
            assert await bring(uploads, hop(0, 4), parameters(value))
        assert not await bring(uploads, hop(0, 4), parameters(3.0))
        assert await bring(uploads, hop(0, 4), parameters(1.0))

    run(main)
