"""The guard around calls: a bug of the daemon becomes INTERNAL, and the number of calls is limited."""

import asyncio
import logging

import grpc
import pytest

from ooc_moe_server.rpc import interceptor
from ooc_moe_server.rpc.interceptor import Guard
from ooc_moe_server.rpc.services import BankService
from ooc_moe_wire.errors import ERROR_KEY, RETRY_AFTER_KEY
from ooc_moe_wire.v1 import bank_pb2, bank_pb2_grpc


def test_a_fault_of_ours_is_internal_and_logged_once_with_its_traceback(caplog):
    def no_engine():
        return 1 // 0

    async def scenario():
        guard = Guard()
        guard.refusal = None
        server = grpc.aio.server(interceptors=(guard,))
        bank_pb2_grpc.add_BankServiceServicer_to_server(BankService(no_engine), server)
        port = server.add_insecure_port("127.0.0.1:0")
        await server.start()
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await bank_pb2_grpc.BankServiceStub(channel).ListBanks(bank_pb2.ListBanksRequest())
        await server.stop(None)
        assert guard.num_open == 0
        return caught.value

    with caplog.at_level(logging.ERROR):
        error = asyncio.run(scenario())
    assert error.code() == grpc.StatusCode.INTERNAL
    assert dict(error.trailing_metadata())[ERROR_KEY] == "Internal"
    (record,) = caplog.records
    assert record.exc_info[0] is ZeroDivisionError


class SlowBanks(bank_pb2_grpc.BankServiceServicer):
    """A BankService that answers when the test allows it."""

    def __init__(self) -> None:
        self.may_answer = asyncio.Event()

    async def ListBanks(self, request, context):
        await self.may_answer.wait()
        return bank_pb2.ListBanksResponse()


def test_calls_beyond_the_most_are_asked_to_come_again(monkeypatch):
    monkeypatch.setattr(interceptor, "CALLS_MAX", 3)

    async def scenario():
        guard, banks = Guard(), SlowBanks()
        guard.refusal = None
        server = grpc.aio.server(interceptors=(guard,))
        bank_pb2_grpc.add_BankServiceServicer_to_server(banks, server)
        port = server.add_insecure_port("127.0.0.1:0")
        await server.start()
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
            list_banks = bank_pb2_grpc.BankServiceStub(channel).ListBanks
            first = [list_banks(bank_pb2.ListBanksRequest()) for _ in range(3)]
            while guard.num_open < 3:
                await asyncio.sleep(0.001)
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await list_banks(bank_pb2.ListBanksRequest())
            banks.may_answer.set()
            await asyncio.gather(*first)
            await list_banks(bank_pb2.ListBanksRequest())
        await server.stop(None)
        return caught.value

    error = asyncio.run(scenario())
    assert error.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
    metadata = dict(error.trailing_metadata())
    assert metadata[ERROR_KEY] == "TierFull"
    assert int(metadata[RETRY_AFTER_KEY]) > 0
