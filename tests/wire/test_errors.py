import re
from concurrent.futures import ThreadPoolExecutor
from threading import Event

import grpc
import pytest

from ooc_moe_wire import errors
from ooc_moe_wire.errors import (
    STATUS,
    DeadlineExceeded,
    Internal,
    InvalidRequest,
    OocMoeError,
    TierFull,
    Unavailable,
    error_named,
    from_rpc_error,
    require_at_least,
    trailing_metadata,
)
from ooc_moe_wire.v1 import bank_pb2, bank_pb2_grpc

MESSAGE = "bank 'krull': 42 is not it, naïvely"


def subclasses(kind: type) -> set[type]:
    return {kind}.union(*(subclasses(child) for child in kind.__subclasses__()))


KINDS = sorted(subclasses(OocMoeError) - {OocMoeError}, key=lambda kind: kind.__name__)


@pytest.mark.parametrize("value", [0, -1, 0.5, float("nan")])
def test_a_number_that_is_too_small_is_named(value):
    require_at_least(1, first=1, second=2.5, third=None)
    with pytest.raises(InvalidRequest, match=f"^second: {value} is not at least 1$"):
        require_at_least(1, first=1, second=value)


class FailingBanks(bank_pb2_grpc.BankServiceServicer):
    """Fails every call in the way that `failure` does."""

    failure = None

    def GetBank(self, request, context):
        self.failure(context)


@pytest.fixture(scope="module")
def servicer_and_stub():
    servicer = FailingBanks()
    server = grpc.server(ThreadPoolExecutor(2), options=[("grpc.max_receive_message_length", 1 << 16)])
    bank_pb2_grpc.add_BankServiceServicer_to_server(servicer, server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
        yield servicer, bank_pb2_grpc.BankServiceStub(channel)
    server.stop(None).wait()


def call(servicer_and_stub, failure, *, name="krull", timeout=20.0) -> OocMoeError:
    """What a caller gets when the daemon fails so."""
    servicer, stub = servicer_and_stub
    servicer.failure = failure
    with pytest.raises(grpc.RpcError) as caught:
        stub.GetBank(bank_pb2.GetBankRequest(bank=name), timeout=timeout)
    return from_rpc_error(caught.value)


def aborting(error: OocMoeError):
    def fail(context):
        context.set_trailing_metadata(trailing_metadata(error))
        context.abort(STATUS[type(error)], str(error))

    return fail


def test_every_error_has_a_status():
    assert set(STATUS) == set(KINDS)


def test_every_error_stands_in_the_drawing_at_the_top_of_the_file():
    drawn = re.findall(r"^ {6,8}(\w+)", errors.__doc__, flags=re.MULTILINE)
    assert sorted(drawn) == [kind.__name__ for kind in KINDS]


@pytest.mark.parametrize("kind", KINDS)
def test_every_error_arrives_as_itself(servicer_and_stub, kind):
    arrived = call(servicer_and_stub, aborting(kind(MESSAGE)))
    assert type(arrived) is kind
    assert str(arrived) == MESSAGE


def test_a_full_tier_says_when_to_come_back(servicer_and_stub):
    assert call(servicer_and_stub, aborting(TierFull(MESSAGE, retry_after_ms=4321))).retry_after_ms == 4321


def test_an_error_of_a_newer_daemon_is_internal_and_keeps_its_name(servicer_and_stub):
    def fail(context):
        context.set_trailing_metadata(((errors.ERROR_KEY, "SunSpots"),))
        context.abort(grpc.StatusCode.ABORTED, MESSAGE)

    arrived = call(servicer_and_stub, fail)
    assert type(arrived) is Internal
    assert str(arrived) == f"SunSpots: {MESSAGE}"


def test_a_fault_of_the_daemon_without_a_name_is_internal(servicer_and_stub):
    def fail(context):
        raise ZeroDivisionError(MESSAGE)

    arrived = call(servicer_and_stub, fail)
    assert type(arrived) is Internal
    assert MESSAGE in str(arrived)


def test_a_deadline_that_passes_is_told_apart(servicer_and_stub):
    answered = Event()
    assert type(call(servicer_and_stub, lambda context: answered.wait(20), timeout=0.1)) is DeadlineExceeded
    answered.set()


def test_a_message_that_is_too_large_is_the_callers_fault(servicer_and_stub):
    assert type(call(servicer_and_stub, lambda context: None, name="x" * (1 << 17))) is InvalidRequest


def test_a_daemon_that_is_away_is_unavailable():
    with grpc.insecure_channel("unix:/nonexistent/ooc-moe.sock") as channel, pytest.raises(grpc.RpcError) as caught:
        bank_pb2_grpc.BankServiceStub(channel).GetBank(bank_pb2.GetBankRequest(bank="krull"), timeout=20)
    assert type(from_rpc_error(caught.value)) is Unavailable


def test_an_error_that_is_no_call_is_internal():
    assert type(from_rpc_error(grpc.RpcError("odd"))) is Internal


@pytest.mark.parametrize("kind", KINDS)
def test_an_error_is_made_again_from_its_name(kind):
    made = error_named(kind.__name__, MESSAGE)
    assert type(made) is kind
    assert str(made) == MESSAGE
