"""The account at the CA, for those who do not hold its key: the same calls, made by the process that does."""

import asyncio
import socket
import subprocess
import sys
from collections.abc import Callable
from itertools import count
from typing import Any, Concatenate, ParamSpec, Self, TypeVar

from pydantic import TypeAdapter

from nts_core.acme import AcmeAccount, AcmeError
from poolsvc.acme_process import Charge
from poolsvc.acme_wire import CALL_DEADLINE, LINE_LIMIT, OPEN, TABLE, Answer, Request
from poolsvc.config import AuthoritySettings, Settings, bare_environment

# For the process, which has a deadline of its own, to say so.
_PATIENCE = CALL_DEADLINE + 5
_CONNECTING = 5.0
_P = ParamSpec("_P")
_T = TypeVar("_T")


class RemoteAccount(AcmeAccount):
    """An account whose calls another process makes. It is `lost` as well when that process has ended: open it again."""

    def __init__(
        self,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        child: subprocess.Popen[bytes] | None,
    ) -> None:
        self.uri = ""
        self._writer = writer
        self._child = child
        self._ids = count()
        self._waiting: dict[int, asyncio.Future[Answer | None]] = {}  # None: no answer will come
        self._is_lost = False
        self._listening = asyncio.create_task(self._listen(reader))

    @classmethod
    async def reach(cls, settings: Settings, ca: AuthoritySettings) -> Self:
        """The account at a CA, open. Raises AcmeError."""
        account = await cls.connect(settings, ca)
        try:
            await account.enter()
        except BaseException:
            account.close()
            raise
        return account

    @classmethod
    async def connect(cls, settings: Settings, ca: AuthoritySettings) -> Self:
        """A way to the account, not open yet: the CA's `socket`, or a child that ends with us. Raises AcmeError."""
        sock, child = None, None
        try:
            if ca.socket is None:
                sock, child = await asyncio.to_thread(_start_child, Charge.of(settings, ca))
            async with asyncio.timeout(_CONNECTING):
                reader, writer = await asyncio.open_unix_connection(
                    None if sock else str(ca.socket), sock=sock, limit=LINE_LIMIT
                )
        except (OSError, TimeoutError) as error:
            if child is not None:
                child.kill()
                child.wait()
            where = ca.socket or "its process"
            raise AcmeError(
                "unreachable", f"the account at the CA: {where}: {error or 'no answer'}"
            ) from error
        return cls(reader, writer, child)

    async def enter(self) -> None:
        """Create the account or find it, as `AcmeAccount.open` does. Raises AcmeError; it can be tried again."""
        self.uri = str(await self.ask(OPEN, {}))

    @property
    def has_ended(self) -> bool:
        """Whether the process is gone, or says what cannot be understood."""
        return self._listening.done()

    @property
    def lost(self) -> bool:
        return self._is_lost or self.has_ended

    def close(self) -> None:
        """End the connection, and the child: it has nothing that it would have to finish."""
        self._listening.cancel()
        self._writer.transport.abort()
        if self._child is not None:
            self._child.kill()
            self._child.wait()

    async def _perform(
        self, work: Callable[Concatenate[Any, _P], _T], /, *args: _P.args, **kwargs: _P.kwargs
    ) -> _T:
        call = TABLE[work.__name__]
        result: _T = call.result.validate_python(await self.ask(work.__name__, call.write(*args, **kwargs)))
        return result

    async def ask(self, call: str, arguments: dict[str, Any]) -> Any:
        """One call and its result as documents."""
        request = Request(id=next(self._ids), call=call, arguments=arguments)
        line = request.line()
        if len(line) > LINE_LIMIT:
            raise AcmeError("refused", f"{call}: more than {LINE_LIMIT} octets", permanent=True)
        if self.has_ended:
            raise _ended()
        future = self._waiting[request.id] = asyncio.get_running_loop().create_future()
        try:
            self._writer.write(line)
            async with asyncio.timeout(_PATIENCE):
                await self._writer.drain()
                answer = await future
        except TimeoutError as error:
            raise AcmeError("unreachable", f"{call}: no answer within {_PATIENCE:g} s") from error
        except OSError as error:
            raise _ended() from error
        finally:
            del self._waiting[request.id]
        if answer is None:
            raise _ended()
        self._is_lost = answer.lost
        if answer.refusal is not None:
            raise answer.refusal.error()
        return answer.result

    async def _listen(self, reader: asyncio.StreamReader) -> None:
        """Hand answers to those who wait for them, until the process ends or says what is none."""
        try:
            while line := await reader.readline():
                answer = Answer.read(line)
                future = self._waiting.get(answer.id)
                if future is not None and not future.done():
                    future.set_result(answer)
        except (ValueError, OSError):
            self._writer.transport.abort()
        finally:
            for future in self._waiting.values():
                if not future.done():
                    future.set_result(None)


def _ended() -> AcmeError:
    return AcmeError("unreachable", "the process that holds the account's key has ended")


def _start_child(charge: Charge) -> tuple[socket.socket, subprocess.Popen[bytes]]:
    """Our end of the pair, and the process at the other; nothing else of ours is handed on."""
    line = TypeAdapter(Charge).dump_json(charge) + b"\n"
    ours, theirs = socket.socketpair()
    ours.sendall(line)  # not as an argument, which every user could read
    with theirs:
        child = subprocess.Popen(
            [sys.executable, "-P", "-m", "poolsvc.acme_process"],
            stdin=theirs.fileno(),
            stdout=subprocess.DEVNULL,
            env=bare_environment(),
        )
    return ours, child
