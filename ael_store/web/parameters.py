"""What requests say: parameters of the address, and fields of a body, checked by what an endpoint declares."""

from __future__ import annotations

import json
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any, Literal
from urllib.parse import parse_qsl

from starlette.requests import Request

from ael_store.errors import UsageError

__all__ = ["Parameter", "read_body", "read_query"]

MOST_BODY_BYTES = 1_048_576
LARGEST = 2**63 - 1


@dataclass(frozen=True, slots=True)
class Parameter:
    """One that an endpoint takes."""

    name: str
    about: str
    kind: Literal["text", "integer"] = "text"
    default: Any = None
    low: int = 0
    high: int = LARGEST
    choices: tuple[str, ...] = ()
    required: bool = False

    @property
    def schema(self) -> dict[str, Any]:
        """What OpenAPI says of it."""
        if self.kind == "integer":
            schema: dict[str, Any] = {"type": "integer", "minimum": self.low}
            if self.high != LARGEST:
                schema["maximum"] = self.high
        else:
            schema = {"type": "string"}
        if self.choices:
            schema["enum"] = list(self.choices)
        if self.default is not None:
            schema["default"] = self.default
        return schema

    def read(self, text: str) -> Any:
        """Return the value that a text means; raises UsageError."""
        if self.kind == "integer":
            if not (text.isascii() and text.isdigit() and len(text) <= 19 and self.low <= int(text) <= self.high):
                end = f" to {self.high}" if self.high != LARGEST else " or more"
                raise UsageError(f"{self.name} is {text[:60]!r}; wanted is a whole number, {self.low}{end}")
            return int(text)
        if self.choices and text not in self.choices:
            raise UsageError(f"{self.name} is {text[:60]!r}; wanted is one of {', '.join(self.choices)}")
        if "\0" in text:
            raise UsageError(f"{self.name} holds a NUL character")
        return text


def read_query(request: Request, wanted: tuple[Parameter, ...]) -> dict[str, Any]:
    """Return the parameters of the address; an empty one counts as not given. Raises UsageError."""
    known = {parameter.name: parameter for parameter in wanted}
    found = {parameter.name: parameter.default for parameter in wanted}
    for name, text in request.query_params.multi_items():
        if name not in known:
            raise UsageError(f"unknown parameter {name[:60]!r}{_near(name, known)}")
        if text:
            found[name] = known[name].read(text)
    return found


async def read_body(request: Request, wanted: tuple[Parameter, ...]) -> dict[str, Any]:
    """Return the fields of a body, a JSON object or a form. Raises UsageError."""
    raw = bytearray()
    async for chunk in request.stream():
        raw += chunk
        if len(raw) > MOST_BODY_BYTES:
            raise UsageError(f"the body is longer than {MOST_BODY_BYTES} bytes")
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    fields: Any = {}
    try:
        if kind == "application/json":
            fields = json.loads(raw) if raw else {}
        elif kind == "application/x-www-form-urlencoded":
            fields = dict(parse_qsl(raw.decode(), keep_blank_values=False, max_num_fields=100))
        elif raw:
            raise UsageError("the body is neither JSON (application/json) nor a form")
    except (ValueError, RecursionError):
        raise UsageError("the body can't be read: wanted is a JSON object or a form") from None
    if not isinstance(fields, dict):
        raise UsageError("the body is no JSON object")
    known = {parameter.name: parameter for parameter in wanted}
    for name in fields:
        if name not in known and name != "back":
            raise UsageError(f"unknown field {name[:60]!r}{_near(name, known)}")
    found = {}
    for parameter in wanted:
        value = fields.get(parameter.name, parameter.default)
        if value is None and parameter.required:
            raise UsageError(f"the field {parameter.name!r} is missing: {parameter.about}")
        if isinstance(value, bool | float | list | dict):
            raise UsageError(f"the field {parameter.name!r} is no {parameter.kind}")
        found[parameter.name] = None if value is None else parameter.read(str(value))
    if isinstance(fields.get("back"), str):
        request.state.back = fields["back"]
    return found


def _near(name: str, known: dict[str, Parameter]) -> str:
    found = get_close_matches(name, known, 1)
    if found:
        return f"; did you mean {found[0]!r}?"
    return f"; known are {', '.join(known)}" if known else "; there are none"
