"""What passes between the process that holds the account's key and those that use it: one JSON document a line.

The calls are those of `acme.CALLS` and `OPEN`, with the arguments and results that their signatures name. Everything
else is no call, and ends the connection. Both ends are of one version: they are started from the same installation.
"""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, Self, get_type_hints

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, create_model

from nts_core.acme import CALLS, AcmeError
from nts_core.certificates import ChainError, CsrError

OPEN = "open"
LINE_LIMIT = 262_144  # octets: a chain or request of certificates.PEM_LIMIT, with room for escapes
CALL_DEADLINE = 120.0  # the CA's answers to one call, all of them

Failure = AcmeError | CsrError | ChainError


class _Document(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    @classmethod
    def read(cls, line: bytes) -> Self:
        """Raises ValueError, also for a line that has no end."""
        if not line.endswith(b"\n"):
            raise ValueError("the line has no end")
        return cls.model_validate_json(line)

    def line(self) -> bytes:
        return self.model_dump_json().encode() + b"\n"


class Request(_Document):
    """`id` comes back with the answer: several calls may be under way."""

    id: int = Field(ge=0, lt=2**63)
    call: str = Field(max_length=64)
    arguments: dict[str, Any] = {}


class Refusal(_Document):
    """An error as it was raised. `fields` are those of an AcmeError, or the text of another one."""

    kind: Literal["acme", "csr", "chain"]
    fields: dict[str, Any]

    @classmethod
    def of(cls, error: Failure) -> Self:
        if isinstance(error, AcmeError):
            return cls(kind="acme", fields=vars(error))
        return cls(kind="csr" if isinstance(error, CsrError) else "chain", fields={"text": str(error)})

    def error(self) -> Failure:
        if self.kind == "acme":
            return AcmeError(**self.fields)
        return (CsrError if self.kind == "csr" else ChainError)(self.fields["text"])


class Answer(_Document):
    """`lost` is what the account says of itself after the call."""

    id: int
    lost: bool
    result: Any = None
    refusal: Refusal | None = None


@dataclass(frozen=True, slots=True)
class Call:
    """The documents of one call, as its signature has them."""

    work: Callable[..., Any]
    arguments: type[BaseModel]
    result: TypeAdapter[Any]

    @classmethod
    def of(cls, work: Callable[..., Any]) -> Self:
        hints = get_type_hints(work)
        result = TypeAdapter(hints.pop("return"))
        parameters = inspect.signature(work).parameters
        fields: dict[str, Any] = {
            name: (
                hint,
                ... if parameters[name].default is inspect.Parameter.empty else parameters[name].default,
            )
            for name, hint in hints.items()
        }
        model = create_model(work.__name__, __config__=ConfigDict(extra="forbid", frozen=True), **fields)
        return cls(work, model, result)

    def write(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """The arguments of a call as a document has them."""
        _, *values = inspect.signature(self.work).bind(None, *args, **kwargs).arguments.items()
        return self.arguments(**dict(values)).model_dump(mode="json")

    def read(self, arguments: Mapping[str, Any]) -> dict[str, Any]:
        """And back. Raises ValueError."""
        document = self.arguments.model_validate(arguments)
        return {name: getattr(document, name) for name in self.arguments.model_fields}


TABLE = {name: Call.of(work) for name, work in CALLS.items()}
