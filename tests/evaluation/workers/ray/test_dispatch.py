"""Work among workers that come and go, without any worker."""

import random
from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from lowprec.evaluation.workers.ray.dispatch import Dispatch


def given_out(dispatch, up):
    found = []
    while (one := dispatch.next(up)) is not None:
        found.append(one)
    return found


def done_alone_by(worker, dispatch, up, most=1000):
    """What a worker does while the others finish nothing, until it has nothing left."""
    done = []
    given_out(dispatch, up)
    while dispatch.at(worker) and len(done) < most:
        done.append(dispatch.at(worker)[0])
        dispatch.finished(done[-1])
        given_out(dispatch, up)
    return done


def test_every_worker_has_a_stretch_of_work_and_the_emptiest_is_served_first():
    dispatch = Dispatch(16, 2, in_flight=2, ahead=100)
    assert given_out(dispatch, [0, 1]) == [(0, 0), (4, 1), (1, 0), (5, 1)]
    dispatch.finished(4)
    assert given_out(dispatch, [0, 1]) == [(6, 1)]
    assert dispatch.at(0) == (0, 1)


def test_stretches_are_long_at_first_and_single_pieces_at_the_end():
    """A worker reads on where it left off nearly always, and none waits long for another one at the end."""
    rng = random.Random(0)
    dispatch, speeds = Dispatch(1000, 4, in_flight=2, ahead=10_000), [1.0, 1.1, 0.9, 0.4]
    done, ends = [[] for _ in speeds], [0.0] * 4
    while given_out(dispatch, range(4)) or any(dispatch.at(w) for w in range(4)):
        busy = [w for w in range(4) if dispatch.at(w)]
        worker = min(busy, key=lambda w: ends[w] + 1 / speeds[w])
        ends[worker] += rng.uniform(0.9, 1.1) / speeds[worker]
        done[worker].append(dispatch.at(worker)[0])
        dispatch.finished(done[worker][-1])
    assert sorted(piece for of_worker in done for piece in of_worker) == list(range(1000))
    jumps = [sum(b != a + 1 for a, b in pairwise(of_worker)) for of_worker in done]
    assert max(jumps) < 20
    assert max(ends) - min(ends) < 3 / min(speeds)


def test_nobody_runs_far_ahead_of_a_slow_worker_but_does_what_that_has_left():
    dispatch = Dispatch(100, 2, in_flight=2, ahead=8)
    done = done_alone_by(1, dispatch, [0, 1])
    assert dispatch.at(0) == (0, 1) and sorted(done) == [2, 3, 4, 5, 6, 7]
    dispatch.finished(0)
    assert given_out(dispatch, [0, 1])[0] == (8, 1)


def test_more_results_are_waited_for_once_it_is_known_that_they_are_small():
    dispatch = Dispatch(1000, 2, in_flight=2, ahead=16)
    assert given_out(dispatch, [0, 1]) == [(0, 0), (4, 1), (1, 0), (5, 1)]
    dispatch.ahead = 10_000
    assert done_alone_by(1, dispatch, [0, 1], most=100) == [4, 5, 6, 7, *range(8, 104)]


def test_a_slow_worker_is_helped_at_the_end():
    dispatch = Dispatch(40, 2, in_flight=2, ahead=100)
    done = done_alone_by(1, dispatch, [0, 1])
    assert dispatch.at(0) == (0, 1) and sorted(done) == list(range(2, 40))


def test_a_lost_worker_gives_everything_back_and_one_piece_is_blamed():
    dispatch = Dispatch(4, 2, in_flight=2, ahead=16)
    given_out(dispatch, [0, 1])
    assert dispatch.lost(0, "killed") == 0
    assert dispatch.at(0) == ()
    assert [(f.worker, f.how) for f in dispatch.failures[0]] == [(0, "killed")]
    assert 2 not in dispatch.failures
    # Piece 0 waits for worker 1, which it was not with, and is alone there; worker 0 takes what it had besides.
    assert given_out(dispatch, [0, 1]) == [(2, 0)]
    dispatch.finished(1)
    dispatch.finished(3)
    assert given_out(dispatch, [0, 1]) == [(0, 1)]
    assert given_out(dispatch, [0, 1]) == []


def test_a_suspect_returns_to_the_same_worker_where_there_is_no_other():
    dispatch = Dispatch(2, 1, in_flight=2, ahead=16)
    given_out(dispatch, [0])
    for tries in range(1, 4):
        assert dispatch.lost(0, "killed") == 0
        assert len(dispatch.failures[0]) == tries
        assert given_out(dispatch, []) == []
        assert given_out(dispatch, [0]) == [(0, 0)]
    dispatch.finished(0)
    assert given_out(dispatch, [0]) == [(1, 0)]


def test_a_failure_that_leaves_the_worker_alive_costs_nobody_else_anything():
    dispatch = Dispatch(3, 2, in_flight=2, ahead=16)
    given_out(dispatch, [0, 1])
    dispatch.failed(0, "ValueError")
    assert dispatch.at(0) == (2,)
    dispatch.finished(1)
    assert given_out(dispatch, [0, 1]) == [(0, 1)]


@given(
    num_pieces=st.integers(0, 40),
    num_workers=st.integers(1, 5),
    in_flight=st.integers(1, 3),
    seed=st.integers(0, 2**32),
)
def test_whatever_is_lost_every_piece_is_finished_once(num_pieces, num_workers, in_flight, seed):
    rng = random.Random(seed)
    dispatch = Dispatch(num_pieces, num_workers, in_flight=in_flight, ahead=8)
    finished, down, disasters = [], set(), 60
    while len(finished) < num_pieces:
        given_out(dispatch, [w for w in range(num_workers) if w not in down])
        at = {w: dispatch.at(w) for w in range(num_workers)}
        held = [piece for pieces in at.values() for piece in pieces]
        assert len(set(held)) == len(held) and not set(held) & set(finished)
        assert all(len(pieces) <= in_flight for pieces in at.values())
        busy = [w for w in at if at[w]]
        assert busy or down
        if disasters and rng.random() < 0.4:
            disasters -= 1
            worker = rng.randrange(num_workers)
            before = at[worker]
            assert dispatch.lost(worker, "killed") == (before[0] if before else None)
            down.add(worker)
        elif busy and rng.random() < 0.7:
            piece = at[rng.choice(busy)][0]
            dispatch.finished(piece)
            finished.append(piece)
        elif busy and disasters and rng.random() < 0.2:
            disasters -= 1
            dispatch.failed(at[rng.choice(busy)][0], "raised")
        else:
            down.discard(rng.randrange(num_workers))
    assert sorted(finished) == list(range(num_pieces))
    assert given_out(dispatch, range(num_workers)) == []
