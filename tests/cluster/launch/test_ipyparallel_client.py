"""The client of engines: calls and cells with their replies, failures and output, as `cluster/calls` describes them."""

from __future__ import annotations

import concurrent.futures
import signal
import threading

import pytest
import zmq
from shared_cluster import HUNG_S, pids_of

from nbdist.cluster.calls.pending_call import CallError, EngineDied, LostCall
from nbdist.cluster.launch.ipyparallel_client import IpyparallelClient
from nbdist.cluster.launch.launcher import Launch
from nbdist.errors import ClusterError


@pytest.fixture(scope="module")
def launch():
    """One engine of the module's own."""
    launched = Launch(1)
    launched.wait_for(1, HUNG_S, lambda text: None)
    launched.client.start_call(*launched.client.ids, "ping").result(HUNG_S)  # as of every engine of a cluster
    yield launched
    launched.end()


@pytest.fixture
def engine(launch):
    (known,) = launch.client.ids
    return known


def test_an_exception_of_the_same_name_is_no_death(launch):
    """A user's class may be called as ipyparallel's is."""
    code = "class EngineError(Exception): pass\nraise EngineError('the engine overheats')"
    call = launch.client.start_cell(*launch.client.ids, code)
    error = call.exception(HUNG_S)
    assert (CallError, "EngineError", "the engine overheats") == (type(error), error.kind, error.message)
    assert not call.succeeded


def test_a_cell_runs_though_the_one_before_failed(launch, engine):
    """ipykernel aborts what waits behind a cell that fails."""
    first = launch.client.start_cell(engine, "1 / 0")
    waiting = [launch.client.start_cell(engine, f"after = {number}") for number in range(3)]
    assert "ZeroDivisionError" == first.exception(HUNG_S).kind
    assert [None] * 3 == [call.result(HUNG_S) for call in waiting]


def test_output_of_a_cell(launch):
    """Streams, rich outputs, and the last expression, which arrive apart from the reply."""
    code = "import sys\nfrom IPython.display import HTML, display\nprint('a')\nprint('b', file=sys.stderr)\n"
    call = launch.client.start_cell(*launch.client.ids, f"{code}display(HTML('<b>c</b>'))\n'd'")
    assert call.result(HUNG_S) is None
    call.wait_for_output(HUNG_S)
    assert ("a\n", "b\n") == (call.printed("stdout"), call.printed("stderr"))
    assert ["<b>c</b>"] == [output["data"]["text/html"] for output in call.displays()]
    assert {"text/plain": "'d'"} == call.last_expression()


def test_a_call_to_a_dead_engine_has_failed_at_once():
    """It is done, and has no output."""
    call = LostCall()
    assert (True, False, "", [], None) == (
        call.wait(0), call.succeeded, call.printed("stdout"), call.displays(), call.last_expression(),
    )  # fmt: skip
    call.wait_for_output(0)
    with pytest.raises(EngineDied):
        call.result()


def test_a_call_is_a_standard_future(launch, engine):
    """It can be waited for among others, and its reply is what the function returned."""
    calls = [launch.client.start_call(engine, "ping") for _ in range(3)]
    done, waiting = concurrent.futures.wait(calls, HUNG_S)
    assert (set(calls), set()) == (done, waiting)
    assert [*pids_of(launch)] * 3 == [call.result() for call in calls]
    assert all(call.succeeded and call.wait(0) for call in calls)


def test_a_wait_ends_with_its_timeout_or_the_reply(launch, engine):
    """And says which; an engine runs what it is sent in order."""
    first = launch.client.start_cell(engine, "import threading; gate = threading.Event(); gate.wait()")
    second = launch.client.start_call(engine, "ping")
    assert (False, False, False) == (first.wait(0), second.wait(0.01), second.succeeded)
    launch.client.send_signal(engine, 2)
    assert second.wait(HUNG_S)
    assert "KeyboardInterrupt" == first.exception(HUNG_S).kind


def test_an_exception_arrives_with_its_traceback(launch, engine):
    """Class, text, and the engine's own traceback; an error for the user says where."""
    call = launch.client.start_cell(engine, "def torn():\n    raise KeyError('torn')\ntorn()")
    error = call.exception(HUNG_S)
    assert ("KeyError", "'torn'") == (error.kind, error.message)
    assert "raise" in error.traceback
    shown = error.as_error("rank 3", 3)
    assert ("rank 3: KeyError: 'torn'", 3, error.traceback) == (str(shown), shown.rank, shown.remote_traceback)


def test_a_client_that_is_not_connected_knows_no_engine(launch):
    """Before `connect`, and after `close`, which may come twice; a new call is refused with the reason."""
    client = IpyparallelClient(launch._cluster.connect_client_sync)
    assert [] == client.ids
    client.connect()
    assert launch.client.ids == client.ids
    client.close()
    client.close()
    assert ([], True) == (client.ids, client.wait_until_dead([0], HUNG_S))
    with pytest.raises(ClusterError, match=r"^the engines were stopped\.$"):
        client.start_call(0, "ping")
    client.send_signal(0, 2)


def test_a_request_without_an_answer_is_repeated(launch):
    """The controller may have been too busy; after three it is an error with the cure."""
    unanswered = iter([TimeoutError, TimeoutError])

    def connect():
        for error in unanswered:
            raise error
        return launch._cluster.connect_client_sync()

    client = IpyparallelClient(connect)
    client.connect()
    assert launch.client.ids == client.ids
    client.close()
    unanswered = iter([TimeoutError] * 3)
    with pytest.raises(
        ClusterError, match="the controller's process has not answered 3 requests, each within 10 s: sta"
    ):
        client.connect()


def test_an_id_that_no_engine_has_is_a_dead_one(launch, engine):
    """A call raises, a signal goes nowhere; waiting for the living one ends with its timeout."""
    with pytest.raises(EngineDied):
        launch.client.start_cell(engine + 1, "1")
    launch.client.send_signal(engine + 1, 9)
    assert not launch.client.wait_until_dead([engine], 0.0)


def test_calls_may_be_started_and_awaited_by_any_thread(launch, engine):
    """Each gets its own reply."""
    replies = []
    threads = [
        threading.Thread(target=lambda: replies.append(launch.client.start_call(engine, "ping").result(HUNG_S)))
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [*pids_of(launch)] * 4 == replies


def test_a_death_that_a_connection_has_missed_is_found():
    """Its list of engines is older than its subscription to changes."""
    launched = Launch(2)
    try:
        launched.wait_for(2, HUNG_S, lambda text: None)
        client = launched.client
        client._client._notification_socket.setsockopt(zmq.UNSUBSCRIBE, b"")
        assert not client.look_again()
        first, second = client.ids
        client.send_signal(first, signal.SIGKILL)
        other = IpyparallelClient(client._new_client)
        other.connect()
        while not other.wait_until_dead([first], 1.0):
            other.look_again()  # it may have connected at that very moment, and missed the death too
        other.close()
        assert [first, second] == client.ids
        assert client.look_again()
        assert [second] == client.ids
        with pytest.raises(EngineDied):
            client.start_call(first, "ping")
    finally:
        launched.end()
