from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from upq.draws import Allowance, Bounds, Level, Plan, Token, choose

MINUTE = 60_000_000
NOW = 10**15


class Lanes:
    """Rows of lanes in memory, as a claim would find them."""

    def __init__(self) -> None:
        self.rows: list[list[Any]] = []

    def add(self, lane: int, rank: int = 0, waited_us: int = 0, type: str = "t") -> int:
        row: list[Any] = [None] * 17
        row[0] = row[13] = len(self.rows) + 1
        row[1], row[2], row[7], row[15] = lane, type, rank, NOW - waited_us
        self.rows.append(row)
        return int(row[0])

    def fetch(self, lane: int, n: int, above: int | None) -> Sequence[Any]:
        found = [r for r in self.rows if r[1] == lane and (above is None or r[7] > above)]
        return sorted(found, key=lambda r: (r[7], r[13], r[0]))[:n]

    def draw(
        self, plan: Plan, room: int, rates: dict[str, int] | None = None,
        in_use: dict[str, int] | None = None,
    ) -> list[int]:  # fmt: skip
        rows = choose(plan, room, Allowance(plan, rates or {}, in_use or {}), self.fetch, NOW)
        self.rows = [row for row in self.rows if row not in rows]
        return [row[0] for row in rows]


def levels(*lanes: int, weights: Sequence[int] = ()) -> list[Level]:
    return [
        Level(f"l{lane}", ((lane, "t"),), weight)
        for lane, weight in zip(lanes, weights or [1] * len(lanes), strict=True)
    ]


def test_a_level_goes_before_the_next_whatever_the_priority() -> None:
    lanes = Lanes()
    low = lanes.add(2, rank=-10)
    high = [lanes.add(1, rank=10), lanes.add(1)]
    assert lanes.draw(Plan(levels(1, 2)), 9) == [high[1], high[0], low]


def test_lanes_of_one_level_are_merged() -> None:
    lanes = Lanes()
    ids = [lanes.add(lane, rank) for lane, rank in ((1, 0), (2, 0), (1, 0), (2, -1), (1, 5))]
    plan = Plan([Level("l", ((1, "t"), (2, "t")))])
    assert lanes.draw(plan, 3) == [ids[3], ids[0], ids[1]]
    assert lanes.draw(plan, 3) == [ids[2], ids[4]]


def test_shares_go_by_weight_one_by_one_and_all_at_once() -> None:
    for room in (1, 3, 200):
        lanes, credit = Lanes(), dict[str, int]()
        for lane in (1, 2, 3):
            for _ in range(1000):
                lanes.add(lane)
        drawn = list[int]()
        lane_of = {row[0]: row[1] for row in lanes.rows}
        while len(drawn) < 1000:
            plan = Plan(levels(1, 2, 3, weights=(6, 3, 1)), by_weight=True, credit=credit)
            drawn += lanes.draw(plan, room)
        found = Counter(lane_of[id] for id in drawn[:1000])
        assert found == {1: 600, 2: 300, 3: 100}
        # Well mixed, too.
        assert Counter(lane_of[id] for id in drawn[:10]) == {1: 6, 2: 3, 3: 1}


def test_who_has_nothing_saves_nothing_up() -> None:
    lanes, credit = Lanes(), dict[str, int]()
    for _ in range(500):
        lanes.add(2)
    plan = Plan(levels(1, 2, weights=(1, 1)), by_weight=True, credit=credit)
    for _ in range(100):
        lanes.draw(plan, 1)
    ones = [lanes.add(1) for _ in range(50)]
    drawn = [lanes.draw(plan, 1)[0] for _ in range(10)]
    assert sum(id in ones for id in drawn) == 5


def test_weights_fill_all_places_when_only_one_level_has_jobs() -> None:
    lanes = Lanes()
    ids = [lanes.add(3) for _ in range(5)]
    assert lanes.draw(Plan(levels(1, 3, weights=(9, 1)), by_weight=True), 5) == ids


def test_who_has_waited_long_stands_a_level_higher() -> None:
    lanes = Lanes()
    old = lanes.add(3, waited_us=25 * MINUTE)
    older_but_not_enough = lanes.add(2, waited_us=9 * MINUTE)
    new = lanes.add(1)
    plan = Plan(levels(1, 2, 3), ageing_us=10 * MINUTE)
    # Two steps up it is where the new one is, and came first.
    assert lanes.draw(plan, 3) == [old, new, older_but_not_enough]


def test_above_the_first_level_age_is_worth_priority() -> None:
    lanes = Lanes()
    low = lanes.add(1, rank=10, waited_us=21 * MINUTE)
    others = [lanes.add(1, rank=0) for _ in range(50)]
    plan = Plan(levels(1), ageing_us=10 * MINUTE)
    assert lanes.draw(plan, 2) == [low, others[0]]


def test_a_type_with_few_places_is_passed_over() -> None:
    lanes = Lanes()
    a = [lanes.add(1, type="a") for _ in range(4)]
    b = [lanes.add(2, type="b") for _ in range(4)]
    plan = Plan([Level("l", ((1, "a"), (2, "b")))], most={"a": 1})
    assert lanes.draw(plan, 4) == [a[0], *b[:3]]


def test_rates_and_tokens_bound_what_is_taken() -> None:
    disk = Token("disk", "key", 5, {"a": 2, "b": 1})
    limits = {"a": Bounds(tokens=(disk,)), "b": Bounds(tokens=(disk,))}
    lanes = Lanes()
    a = [lanes.add(1, type="a") for _ in range(4)]
    b = [lanes.add(2, type="b") for _ in range(4)]
    plan = Plan([Level("l", ((1, "a"), (2, "b")))], limits)
    # Four are left: two of a.
    assert lanes.draw(plan, 8, in_use={"disk": 1}) == a[:2]
    # Three are left: one of a, and one of b.
    assert lanes.draw(plan, 8, in_use={"disk": 2}) == [a[2], b[0]]
    assert lanes.draw(plan, 8, in_use={"disk": 6}) == []
    assert lanes.draw(plan, 8, rates={"b": 1}, in_use={"disk": 4}) == [b[1]]
