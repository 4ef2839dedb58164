"""`Potential.fetch`: futures of answers that take a while, of products too."""

import concurrent.futures
import threading
from concurrent.futures import CancelledError, Future

import pytest
import torch
from rewarding import ALL

from fastsmc.potentials import (
    Final,
    Potential,
    Product,
    State,
)
from fastsmc.potentials.waiting import in_background, join


def ends(*finished: bool) -> State:
    state = State()
    state.finished = torch.tensor(finished)
    return state


class Later(Potential):
    """Answers when the test says so."""

    def __init__(self) -> None:
        self.future: Future = Future()

    def fetch(self, state, about):
        self.about = about.tolist()
        return self.future

    def complete(self, state):
        return torch.zeros(len(state.finished))


def test_without_parts_that_take_a_while_there_is_nothing_to_wait_for():
    class Quick(Potential):
        def complete(self, state):
            return torch.zeros(len(state.finished))

    assert Quick().fetch(ends(True, True), ALL) is None
    assert Product(Quick(), Final(Quick())).fetch(ends(True, True), ALL) is None


def test_a_product_waits_for_all_its_factors():
    a, b = Later(), Later()
    joined = (a * Final(b)).fetch(ends(False, True), ALL)
    assert (a.about, b.about) == ([True, True], [False, True])
    b.future.set_result(None)
    assert not joined.done()
    a.future.set_result(None)
    assert joined.result(timeout=0) is None


def test_final_does_not_ask_about_the_unfinished():
    later = Later()
    assert Final(later).fetch(ends(False, False), ALL) is None
    assert not hasattr(later, "about")


def test_a_joined_future_holds_the_first_exception_once_all_are_done():
    parts = [Future(), Future(), Future()]
    joined = join([None, *parts])
    parts[2].set_exception(ValueError("third"))
    parts[1].set_exception(ValueError("second"))
    assert not joined.done()
    parts[0].set_result(None)
    with pytest.raises(ValueError, match="second"):
        joined.result(timeout=0)


def test_cancelling_a_joined_future_cancels_all():
    parts = [Future(), Future()]
    joined = join(parts)
    assert joined.cancel()
    assert all(part.cancelled() for part in parts)
    assert concurrent.futures.wait([joined], timeout=0).done == {joined}  # who waits for several is told, too
    with pytest.raises(CancelledError):
        joined.result(timeout=0)


def test_a_joined_future_is_cancelled_where_a_part_is():
    parts = [Future(), Future()]
    joined = join(parts)
    parts[0].cancel()
    assert not joined.done()
    parts[1].set_result(None)
    assert joined.cancelled()


def test_parts_that_end_at_the_same_time_end_it_once():
    for _ in range(50):
        parts, barrier = [Future() for _ in range(4)], threading.Barrier(4)
        joined = join(parts)

        def settle(part, barrier=barrier):
            barrier.wait()
            part.set_result(None)

        threads = [threading.Thread(target=settle, args=(part,)) for part in parts]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert joined.result(timeout=1) is None


def test_what_runs_in_the_background_sees_that_it_is_cancelled():
    begun, seen = threading.Event(), Future()
    may_look = threading.Event()

    def work(future):
        begun.set()
        may_look.wait(10)
        seen.set_result(future.cancelled())

    running = in_background(work)
    assert begun.wait(10)
    assert running.cancel()
    may_look.set()
    assert seen.result(timeout=10) is True
    failed = in_background(lambda future: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        failed.result(timeout=10)
    assert concurrent.futures.wait([running], timeout=10).not_done == set()
