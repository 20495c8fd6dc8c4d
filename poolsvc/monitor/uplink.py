"""The monitor's conversation with its registry: two requests over HTTPS, each with a deadline and bounds (I/O)."""

import re
import ssl
from http import HTTPStatus
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError

from nts_core.control import MonitorAnswer, MonitorReport, MonitorWork
from nts_core.errors import printable
from nts_core.https import Client, TooLong
from poolsvc.config import ConfigError
from poolsvc.monitor.settings import MonitorSettings

_TIMEOUT = 15.0
_MAX_ANSWER = 8 * 1024 * 1024
_TOKEN = re.compile(r"[A-Za-z0-9_-]{1,200}")
_MAX_TOKEN = 4096
_WORK, _REPORT, _ANSWER = TypeAdapter(MonitorWork), TypeAdapter(MonitorReport), TypeAdapter(MonitorAnswer)
_PROBLEM = TypeAdapter(dict[str, Any])
# What does not get better by sending it again.
_USELESS = frozenset(
    {HTTPStatus.BAD_REQUEST, HTTPStatus.REQUEST_ENTITY_TOO_LARGE, HTTPStatus.UNPROCESSABLE_ENTITY}
)
_T = TypeVar("_T")


class UplinkError(Exception):
    """The registry is out of reach or refuses. `retry_after` are the seconds for which it does not want to be asked again."""

    def __init__(self, message: str, retry_after: float | None = None, *, is_useless: bool = False) -> None:
        super().__init__(message)
        self.retry_after = retry_after
        self.is_useless = is_useless


def read_token(settings: MonitorSettings) -> str:
    """The token of the settings' file. Raises ConfigError."""
    try:
        with settings.token_file.open("rb") as file:
            token = file.read(_MAX_TOKEN).decode("ascii").strip()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not a text"
        raise ConfigError(f"token_file {settings.token_file}: {reason}") from None
    if not _TOKEN.fullmatch(token):
        # Not shown: what was meant as a token is a secret, whatever is wrong with it.
        raise ConfigError(f"token_file {settings.token_file}: it holds no token; copy it whole")
    return token


class Uplink:
    """A registry, asked with the monitor's token. Raises ConfigError for roots that cannot be read."""

    def __init__(self, settings: MonitorSettings, token: str) -> None:
        try:
            tls = ssl.create_default_context(cafile=str(settings.ca_file) if settings.ca_file else None)
        except (OSError, ValueError) as error:
            raise ConfigError(f"ca_file {settings.ca_file}: {error}") from None
        self._headers = {"Authorization": f"Bearer {token}", "Content-Type": "application/json"}
        self._client = Client(settings.registry, tls, max_answer=_MAX_ANSWER)

    def close(self) -> None:
        self._client.close()

    async def work(self) -> MonitorWork:
        """What to do. Raises UplinkError."""
        return await self._call("GET", "/v1/monitor/work", None, _WORK)

    async def report(self, report: MonitorReport) -> MonitorAnswer:
        """Tell what was found. Raises UplinkError."""
        return await self._call("POST", "/v1/monitor/report", _REPORT.dump_json(report), _ANSWER)

    async def _call(self, method: str, path: str, body: bytes | None, adapter: TypeAdapter[_T]) -> _T:
        try:
            answer = await self._client.request(
                method, path, body=body, headers=self._headers, timeout=_TIMEOUT
            )
        except TooLong:
            raise UplinkError("the registry's answer is too long") from None
        except OSError as error:
            raise UplinkError(f"the registry does not answer: {str(error) or type(error).__name__}") from None
        if answer.status >= HTTPStatus.BAD_REQUEST:
            raise UplinkError(
                f"the registry refuses: {_detail(answer.body, answer.status)}",
                answer.retry_after,
                is_useless=answer.status in _USELESS,
            )
        try:
            return adapter.validate_json(answer.body)
        except ValidationError:
            raise UplinkError("the registry's answer is not understood; update poolsvc") from None


def _detail(body: bytes, status: int) -> str:
    """Of a problem document (RFC 9457); anything else by its status."""
    try:
        problem = _PROBLEM.validate_json(body)
    except ValidationError:
        problem = {}
    return printable(str(problem.get("detail") or f"HTTP status {status}"), 300)
