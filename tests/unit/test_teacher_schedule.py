"""Whose turn it is: work, models and time as numbers, no queue and no engine."""

from __future__ import annotations

import random
from collections import Counter, OrderedDict
from collections.abc import Callable, Collection, Sequence

import pytest

from stillhouse.teacher.schedule import MIN_TURN_S, TURN_LOADS, ModelKey, Schedule, Stream

BATCH = 100
"""Tokens of a batch; it takes BATCH_S."""
BATCH_S = 0.1
LOAD_S = 0.5
ASIDE_S = 10.0
"""How long a stream rests whose model is too large."""


def key(model: str) -> ModelKey:
    return (model, "float32", "")


class Teacher:
    """A teacher of numbers: least recently used models leave first, time is counted."""

    def __init__(self, room: int) -> None:
        self.room = room
        self.schedule = Schedule()
        self.work: dict[Stream, int] = {}
        """Batches that wait."""
        self.resident: OrderedDict[ModelKey, None] = OrderedDict()
        self.loads: Counter[str] = Counter()
        self.now = 0.0
        self.log: list[Stream] = []
        self.refused: dict[Stream, float] = {}
        """Streams set aside, and until when."""

    def add(self, job_id: str, model: str, batches: int) -> Stream:
        stream = Stream(f"{job_id}:{model}", job_id, key(model), 1)
        self.work[stream] = self.work.get(stream, 0) + batches
        return stream

    def fits(self, size_bytes: int, keep: Collection[ModelKey]) -> bool:
        return len(keep) + size_bytes <= self.room

    def waiting(self) -> Sequence[Stream]:
        return [one for one, batches in self.work.items() if batches and self.refused.get(one, 0.0) <= self.now]

    def turn(self) -> Stream:
        """One batch."""
        waiting = self.waiting()
        chosen = self.schedule.choose(waiting, self.resident, self.fits)
        assert chosen in waiting
        self.log.append(chosen)
        if chosen.size_bytes > self.room:
            self.refused[chosen] = self.now + ASIDE_S
            return chosen
        keep = self.schedule.at_work(waiting, self.resident)
        if chosen.model not in self.resident:
            while len(self.resident) >= self.room:
                leaving = min(self.resident, key=lambda model: model in keep)
                del self.resident[leaving]
            self.resident[chosen.model] = None
            self.loads[chosen.model[0]] += 1
            self.now += LOAD_S
            self.schedule.loaded(chosen.model, LOAD_S)
        self.resident.move_to_end(chosen.model)
        self.now += BATCH_S
        self.schedule.served(chosen, BATCH, BATCH_S)
        self.work[chosen] -= 1
        return chosen

    def until_done(self) -> None:
        while self.waiting():
            self.turn()


def test_a_job_with_ten_times_the_work_delays_a_small_one_by_a_batch() -> None:
    teacher = Teacher(room=1)
    teacher.add("large", "m", 100)
    for _ in range(20):
        teacher.turn()
    small = teacher.add("small", "m", 10)
    served = [teacher.turn() for _ in range(20)]
    assert served.count(small) == 10, "every second batch"
    assert small in served[:2]


def test_time_without_work_gives_no_credit() -> None:
    teacher = Teacher(room=1)
    for _ in range(2):  # new, and come back
        teacher.add("a", "m", 50)
        for _ in range(30):
            teacher.turn()
        late = teacher.add("b", "m", 10)
        assert [teacher.turn() for _ in range(10)].count(late) == 5
        teacher.until_done()


@pytest.mark.parametrize("room", [1, 2, 3, 10])
def test_all_work_of_a_model_in_memory_comes_before_another_is_loaded(room: int) -> None:
    """Ten teachers of a job, steps of shuffled samples: a model is loaded once a step at most, and what is still there
    from the step before not at all."""
    teacher, draw, models = Teacher(room), random.Random(room), [f"m{number}" for number in range(10)]
    in_order = 0
    for _ in range(5):
        arrivals = draw.choices(models, k=60)
        for model in arrivals:
            teacher.add("job", model, 1)
        in_order += loads_in_order(arrivals, room)
        teacher.until_done()
    assert max(teacher.loads.values()) <= 5
    assert teacher.loads.total() == 10 + 4 * (10 - room)
    assert in_order > 2 * teacher.loads.total() or room == 10, "the order of arrival would cost more"


def loads_in_order(arrivals: Sequence[str], room: int) -> int:
    """Loads if work was done as it comes, least recently used models out first."""
    resident: OrderedDict[str, None] = OrderedDict()
    loads = 0
    for model in arrivals:
        if model not in resident:
            loads += 1
            if len(resident) == room:
                resident.popitem(last=False)
        resident[model] = None
        resident.move_to_end(model)
    return loads


@pytest.mark.parametrize("jobs", ["one", "each"])
def test_no_model_starves_and_loading_is_a_tenth(jobs: str) -> None:
    """Work without end for every model: the bound on waiting, and on what loading costs."""
    teacher, waited = Teacher(room=2), dict.fromkeys("abcde", 0.0)
    last_seen = dict.fromkeys("abcde", 0.0)
    while teacher.now < 200:
        for model in "abcde":
            stream = teacher.add("job" if jobs == "one" else f"job-{model}", model, 0)
            teacher.work[stream] = 1000
        model = teacher.turn().model[0]
        waited[model] = max(waited[model], teacher.now - last_seen[model])
        last_seen[model] = teacher.now
    turn_s = TURN_LOADS * LOAD_S + BATCH_S
    assert max(waited.values()) <= 2 * 4 * (turn_s + LOAD_S) + BATCH_S
    assert teacher.loads.total() * LOAD_S <= teacher.now / TURN_LOADS
    assert len(teacher.log) * BATCH_S >= 0.88 * teacher.now


def test_a_small_job_whose_model_has_room_is_not_kept_waiting() -> None:
    teacher = Teacher(room=2)
    teacher.add("large", "m", 1000)
    for _ in range(5):
        teacher.turn()
    small = teacher.add("small", "n", 3)
    assert small in [teacher.turn() for _ in range(2)]


def test_a_model_keeps_its_turn_where_there_is_no_room_for_two() -> None:
    teacher = Teacher(room=1)
    teacher.add("large", "m", 1000)
    teacher.turn()
    small = teacher.add("small", "n", 3)
    before = teacher.now
    while teacher.turn() != small:
        pass
    assert MIN_TURN_S <= teacher.now - before <= TURN_LOADS * LOAD_S + LOAD_S + 2 * BATCH_S
    assert teacher.loads == {"m": 1, "n": 1}


def test_a_model_larger_than_the_memory_does_not_starve_a_job() -> None:
    teacher = Teacher(room=1)
    jobs = [teacher.add("a", "m", 1000), teacher.add("b", "n", 1000)]
    large = Stream("large", "c", key("large"), 2)
    teacher.work[large] = 1
    served = Counter(teacher.turn() for _ in range(400))
    assert min(served[job] for job in jobs) >= 0.4 * 400
    assert 2 <= served[large] <= 1 + teacher.now / ASIDE_S, "it is refused now and then"


def test_the_next_model_is_named_while_the_present_one_works() -> None:
    teacher = Teacher(room=1)
    first, second, _ = (teacher.add("job", model, 3) for model in "abc")
    assert teacher.turn() == first
    assert teacher.schedule.upcoming(teacher.waiting(), teacher.resident) == second
    teacher.until_done()
    assert teacher.schedule.upcoming([], teacher.resident) is None


def test_what_is_gone_is_forgotten() -> None:
    teacher = Teacher(room=2)
    for number in range(10):
        teacher.add(f"job-{number}", f"m{number}", 1)
    teacher.until_done()
    teacher.schedule.forget({"job-3"}, {key("m4")})
    back = teacher.add("job-5", "m5", 1)
    assert teacher.turn() == back, "a job whose epoch was closed comes back"
    teacher.schedule.forget({"job-3"}, {key("m4")})
    kept: Callable[[str], object] = lambda name: set(getattr(teacher.schedule, name))  # noqa: E731
    assert (kept("_served"), kept("_load_s")) == ({"job-3"}, {key("m4")})
