"""Guessing the tokens that come next, and whether guesses are worth their time. Pure: ids, counts and measured seconds in, decisions out.

A step of an answer computes one token, and most of its time goes to the way there and back. A step that brings guesses of the tokens after
it takes hardly longer where that way is long, and each right guess saves a whole step. `Lookup` guesses: what followed the last time that
the text went like this. `DraftPolicy` says how many guesses to bring, from what steps of so many tokens take and how often guesses of such
a kind were right. Both learn from every token, drafted or not: a guess that was not sent is compared with the token that came all the same.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence

MOST_DRAFTED = 15
"""Guesses in one step, beside the token that is known: servers take steps of up to 16 tokens for parts of an answer."""
LONGEST_MATCH = 32
"""Tokens that are compared at most: what matches in so many is taken for the same text."""
MATCHES_COMPARED = 8
"""Earlier places, the latest first, of which the one is looked for that matches longest."""


class Lookup:
    """The ids of one row, and where the text went like its end before.

    An index of pairs: each place where a pair of tokens occurred knows the place before it. So a token is added and taken away in constant
    time. Only where the pair at the end is new does its last token count alone.
    """

    def __init__(self) -> None:
        self._ids: list[int] = []
        self._after: dict[tuple[int, int], int] = {}  # for each pair the index after its latest occurrence
        self._before: list[int] = []  # for the pair that ends at each index what `_after` said before; 0 where it is new
        self._after_one: dict[int, int] = {}  # the same of single tokens
        self._before_one: list[int] = []
        self._match: tuple[int, int] | None = None  # source and length for the present end, once looked for
        self._followed: tuple[int, int] = (0, 0)  # the latest match where the text went on as it had

    def __len__(self) -> int:
        return len(self._ids)

    @property
    def last(self) -> int | None:
        """The last id."""
        return self._ids[-1] if self._ids else None

    def append(self, token: int) -> None:
        """The row's next token."""
        ids = self._ids
        if self._match is not None:
            source, length = self._match
            self._followed = (source + 1, length + 1) if length and ids[source] == token else (0, 0)
        else:
            self._followed = (0, 0)
        self._match = None
        before = 0
        if ids:
            pair = ids[-1], token
            before = self._after.get(pair, 0)
            self._after[pair] = len(ids) + 1
        self._before.append(before)
        ids.append(token)
        self._before_one.append(self._after_one.get(token, 0))
        self._after_one[token] = len(ids)

    def cut(self, length: int) -> None:
        """Go back to the first `length` tokens."""
        ids = self._ids
        while len(ids) > max(length, 0):
            token, before = ids.pop(), self._before.pop()
            if before:
                self._after[ids[-1], token] = before
            elif ids:
                del self._after[ids[-1], token]
            before = self._before_one.pop()
            if before:
                self._after_one[token] = before
            else:
                del self._after_one[token]
            self._match, self._followed = None, (0, 0)

    def set(self, ids: Sequence[int]) -> None:
        """The row's tokens are these; what they have in common with the present ones from the first on is not indexed again."""
        common = min(len(ids), len(self._ids))
        if self._ids[:common] != list(ids[:common]):
            common = next(index for index in range(common) if ids[index] != self._ids[index])
        self.cut(common)
        for token in ids[common:]:
            self.append(token)

    @property
    def length(self) -> int:
        """How many tokens at the end stood like this before, up to `LONGEST_MATCH`; 0 where there is nothing to guess from."""
        return min(self._find()[1], LONGEST_MATCH)

    def guess(self) -> int | None:
        """The token that came next the last time; None where there is nothing to guess from."""
        source, length = self._find()
        return self._ids[source] if length else None

    def draft(self, count: int) -> list[int]:
        """`count` tokens as they came the last time; where that time reaches into the present it repeats itself. Empty without a match."""
        source, length = self._find()
        if not length:
            return []
        ids = self._ids
        drafted = ids[source : source + count]
        while len(drafted) < count:
            drafted.append(drafted[len(drafted) + source - len(ids)])
        return drafted

    def _find(self) -> tuple[int, int]:
        """The index from which to go on and the tokens that match before it; of equally long matches the latest."""
        if self._match is not None:
            return self._match
        ids, before = self._ids, self._before
        best, longest = 0, 0
        source = before[-1] if before else 0
        for _ in range(MATCHES_COMPARED):
            if not source or longest >= LONGEST_MATCH:
                break
            length, most = 2, min(LONGEST_MATCH, source)
            while length < most and ids[source - 1 - length] == ids[-1 - length]:
                length += 1
            if length > longest:
                best, longest = source, length
            source = before[source - 1]
        if self._followed[1] > longest and longest < LONGEST_MATCH:
            best, longest = self._followed
        if not longest and self._before_one and self._before_one[-1]:
            best, longest = self._before_one[-1], 1
        self._match = best, longest
        return self._match


RECENT_SINGLE = 9
RECENT_LONGER = 5
ASSUMED_GROWTH = 0.15
"""Of the time that servers compute one token: what each further token of a step takes, as long as nothing was measured. Processors without
much room beside one token take about this; accelerators far less."""


class StepSeconds:
    """What steps of 1 … 16 new tokens take: medians of recent ones, made monotone, and straight lines between them."""

    def __init__(self) -> None:
        self._single: deque[float] = deque(maxlen=RECENT_SINGLE)
        self._network: deque[float] = deque(maxlen=RECENT_SINGLE)
        self._longer: dict[int, deque[float]] = {}  # by tokens: seconds beyond those of a step of one
        self._table: list[float] | None = None

    def copy(self) -> StepSeconds:
        """The same, to go on by itself."""
        same = StepSeconds()
        same._single, same._network = self._single.copy(), self._network.copy()
        same._longer = {tokens: seconds.copy() for tokens, seconds in list(self._longer.items())}  # another thread may be adding
        return same

    @property
    def most_measured(self) -> int:
        """The most tokens of a step that was measured; 0 before the first."""
        return max(self._longer, default=1 if self._single else 0)

    def note(self, tokens: int, seconds: float, network_s: float | None = None) -> None:
        """A step of so many tokens took so long; `network_s` of that was none of the servers'."""
        if tokens == 1:
            self._single.append(seconds)
            if network_s is not None:
                self._network.append(min(network_s, seconds))
        elif self._single:
            table = self.table()
            # One step that was held up says little of all later ones: it counts as one that is a good deal slower than was thought.
            extra = min(max(seconds - table[1], 0.0), 2 * (table[tokens] - table[1]) + table[1])
            self._longer.setdefault(tokens, deque(maxlen=RECENT_LONGER)).append(extra)
        self._table = None

    def table(self) -> list[float]:
        """Seconds by tokens, 0 … 16; the first is without meaning. Needs a step of one token."""
        if self._table is None:
            self._table = self._fit()
        return self._table

    def _fit(self) -> list[float]:
        single = _median(self._single)
        computed = single - _median(self._network) if self._network else single
        growth = ASSUMED_GROWTH * max(computed, 0.0)
        table = [0.0, single]
        known, extra = 1, 0.0
        for tokens, next_extra in _rising(self._longer):
            slope = (next_extra - extra) / (tokens - known)
            table += [single + extra + slope * step for step in range(1, tokens - known + 1)]
            known, extra = tokens, next_extra
        if known > 1:
            growth = max(2 * growth / known, extra / (known - 1))  # what was measured says more the further it goes
        table += [single + extra + growth * step for step in range(1, MOST_DRAFTED + 2 - known)]
        return table


def _median(values: Iterable[float]) -> float:
    """The lower median: what takes too long is seldom, what takes too short does not exist."""
    ordered = sorted(values)
    return ordered[(len(ordered) - 1) // 2]


def _rising(samples: dict[int, deque[float]]) -> list[tuple[int, float]]:
    """(tokens, median), ascending in both: neighbours that contradict each other are taken together."""
    groups: list[tuple[list[int], list[float], float]] = []
    for tokens in sorted(samples):
        group = [tokens], list(samples[tokens]), _median(samples[tokens])
        while groups and groups[-1][2] > group[2]:
            earlier = groups.pop()
            values = earlier[1] + group[1]
            group = earlier[0] + group[0], values, _median(values)
        groups.append(group)
    return [(tokens, median) for members, _, median in groups for tokens in members]


_BOUNDS = (1, 2, 3, 4, 6, 10, 16, LONGEST_MATCH)
"""The longest match of each kind of guess."""
_ASSUMED = (0.15, 0.3, 0.45, 0.55, 0.65, 0.75, 0.85, 0.9)
"""How many guesses of each kind are right, as long as nobody knows."""
_KINDS = tuple(next(kind for kind, bound in enumerate(_BOUNDS) if length <= bound) for length in range(LONGEST_MATCH + 1))
_ASSUMED_WEIGHT = 2.0
_FORGETTING = 0.97
"""What is left of an observation's weight after another of its kind."""


class Acceptance:
    """How often guesses are right, by the length of the match that they come from."""

    def __init__(self, assumed: Sequence[float] = _ASSUMED) -> None:
        self._assumed = assumed
        self._seen = [0.0] * len(assumed)
        self._right = [0.0] * len(assumed)

    def copy(self, weight: float) -> Acceptance:
        """The same, with so much of the weight of what was seen."""
        same = Acceptance(self._assumed)
        same._seen, same._right = [seen * weight for seen in self._seen], [right * weight for right in self._right]
        return same

    def note(self, length: int, right: bool) -> None:
        """A guess from a match of this length was right, or not."""
        kind = self._kind(length)
        self._seen[kind] = self._seen[kind] * _FORGETTING + 1
        self._right[kind] = self._right[kind] * _FORGETTING + right

    def chance(self, length: int) -> float:
        """That a guess from a match of this length is right."""
        kind = self._kind(length)
        return (self._right[kind] + _ASSUMED_WEIGHT * self._assumed[kind]) / (self._seen[kind] + _ASSUMED_WEIGHT)

    def _kind(self, length: int) -> int:
        return min(_KINDS[min(length, LONGEST_MATCH)], len(self._assumed) - 1)


LEAST_GAIN = 0.05
"""Share of the tokens a second that a draft must be expected to add: below this, what is measured is more noise than gain."""
FIRST_GAP, LONGEST_GAP = 16, 256
"""Tokens until it is tried again whether longer steps have become cheaper."""
TRIED_AGAIN = 3
"""Tokens of such a try."""
MUCH_FASTER = 0.8
"""Of the seconds that a step was expected to take: at most so many make another try worth while soon."""
CREDIT_A_TOKEN, FIRST_CREDIT, MOST_CREDIT, LEAST_CREDIT = 0.01, 0.5, 16.0, -1.0
"""What drafts may lose, in steps of one token: so much with each token of the answer, and what they have gained before."""
_LOAD_WEIGHT = 0.2
_KEPT_WEIGHT = 0.5


class DraftPolicy:
    """How many tokens to draft in the next step, so that most tokens a second are to be expected.

    Every decision weighs expected tokens against expected seconds. What it learns of seconds comes from drafted steps, so it looks again
    now and then where they were too slow, with growing gaps. What drafts have lost in all is bounded, by a credit.

    A `steady` policy is for guesses of a draft model: each is as good as the one before, and nothing is known of those that were not tried.
    """

    def __init__(self, *, steady: bool = False) -> None:
        self.seconds = StepSeconds()
        self.acceptance = Acceptance((0.7,) if steady else _ASSUMED)
        self.load = 0.0
        self._steady = steady
        self._credit = FIRST_CREDIT
        self._idle = 0  # tokens since the last draft
        self._gap = FIRST_GAP

    def for_answer(self) -> DraftPolicy:
        """What is known, for another answer to go on with: steps will take as long, while guesses may be better or worse."""
        policy = DraftPolicy(steady=self._steady)
        policy.seconds = self.seconds.copy()
        policy.acceptance = self.acceptance.copy(_KEPT_WEIGHT)
        policy.load = self.load
        policy._credit, policy._idle, policy._gap = self._credit, self._idle, self._gap
        return policy

    def note_step(self, tokens: int, seconds: float, network_s: float | None = None, queue_s: float = 0.0) -> None:
        """A step of so many tokens took so long.

        Args:
            network_s: seconds of these during which no server had the step; None where that is not known.
            queue_s: seconds of these that it waited for servers' devices.
        """
        if not 0 < tokens <= MOST_DRAFTED + 1 or seconds <= 0:
            return
        if tokens > 1 and self.seconds.most_measured and seconds < MUCH_FASTER * self.seconds.table()[tokens]:
            self._gap = FIRST_GAP
        self.seconds.note(tokens, seconds, network_s)
        self.load += _LOAD_WEIGHT * (min(max(queue_s / seconds, 0.0), 1.0) - self.load)
        if tokens == 1:
            self._credit = min(self._credit + CREDIT_A_TOKEN, MOST_CREDIT)

    def note_guess(self, length: int, right: bool) -> None:
        """What a match of this length said of the next token was right, or not, whether it was drafted or not."""
        self.acceptance.note(length, right)

    def note_draft(self, drafted: int, accepted: int, draft_s: float = 0.0) -> None:
        """Of a draft that was sent so many were right; `draft_s` went to making it."""
        if not drafted or not self.seconds.most_measured:
            return
        table = self.seconds.table()
        gained = 1 + accepted - (table[1 + drafted] + draft_s) / table[1]
        self._credit = min(max(self._credit + gained + CREDIT_A_TOKEN * (1 + accepted), LEAST_CREDIT), MOST_CREDIT)

    def choose(self, length: int, most: int, draft_s: float = 0.0) -> int:
        """How many tokens to draft now.

        Args:
            length: of the match; 0 where there is none. A steady policy does not look at it.
            most: how many there is room for.
            draft_s: seconds that a draft's token takes to make.
        Returns:
            0 … min(most, MOST_DRAFTED).
        """
        self._idle += 1
        if (not length and not self._steady) or most <= 0 or self.seconds.most_measured == 0:
            return 0
        table = self.seconds.table()
        # Longer steps than were ever measured are come to by doubling.
        most = min(most, MOST_DRAFTED, max(2, 2 * self.seconds.most_measured - 1))
        chances = self._chances(length, most)
        single = table[1]
        best, best_rate, expected = 0, (1 + LEAST_GAIN) / single, 1.0
        for drafted, chance in enumerate(chances, 1):
            expected += chance
            seconds = table[1 + drafted] + drafted * draft_s
            if seconds - single > self._credit * single:
                break
            if expected / seconds > best_rate:
                best, best_rate = drafted, expected / seconds
        if best:
            self._gap = FIRST_GAP
        elif self._idle >= self._gap and self._credit > 0 and (self._steady or sum(chances[:TRIED_AGAIN]) > LEAST_GAIN):
            best = len(chances[:TRIED_AGAIN])
            self._gap = min(2 * self._gap, LONGEST_GAP)
        if best:
            self._idle = 0
        return best

    def _chances(self, length: int, most: int) -> list[float]:
        """For each token of a draft that it and all before it are right; as far as that is likelier than that it is in others' way."""
        chances: list[float] = []
        chance = 1.0
        for step in range(most):
            chance *= self.acceptance.chance(length + step)
            if chance <= self.load:
                break
            chances.append(chance)
        return chances
