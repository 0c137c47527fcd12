"""The description of `/api` for programs, made from the list of endpoints."""

from __future__ import annotations

import re
from typing import Any

from ael_store._version import __version__
from ael_store.web.routes import ENDPOINTS, Endpoint

__all__ = ["DESCRIPTION_PATH", "describe"]

DESCRIPTION_PATH = "/api/v1/openapi.json"


def describe() -> dict[str, Any]:
    """Return the OpenAPI description."""
    paths: dict[str, Any] = {
        DESCRIPTION_PATH: {"get": {"summary": "This description.", "responses": {"200": {"description": "JSON."}}}}
    }
    for endpoint in ENDPOINTS:
        path = re.sub(r":\w+}", "}", endpoint.path)
        paths.setdefault(path, {})[endpoint.method.lower()] = _operation(endpoint)
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "ael dashboard",
            "version": __version__,
            "description": "What `ael web` answers. Rows have the columns of the views; lists have `items` and the "
            "address of the `next` page.",
        },
        "paths": dict(sorted(paths.items())),
        "components": {
            "securitySchemes": {
                "bearer": {"type": "http", "scheme": "bearer"},
                "session": {"type": "apiKey", "in": "cookie", "name": "ael_session"},
            }
        },
    }


def _operation(endpoint: Endpoint) -> dict[str, Any]:
    parameters = [
        {
            "name": name,
            "in": "path",
            "required": True,
            "schema": {"type": "integer" if kind == ":int" else "string"},
        }
        for name, kind in re.findall(r"{(\w+)(:\w+)?}", endpoint.path)
    ]
    for parameter in endpoint.parameters:
        described: dict[str, Any] = {"name": parameter.name, "in": "query", "description": parameter.about}
        if parameter.required:
            described["required"] = True
        parameters.append({**described, "schema": parameter.schema})
    operation: dict[str, Any] = {
        "summary": endpoint.about,
        "responses": {
            "200": {"description": "The answer.", "content": {endpoint.media_type: {}}},
            "default": {"description": "An object with `error`: what was wrong, and what to do."},
        },
    }
    if parameters:
        operation["parameters"] = parameters
    if endpoint.method == "POST":
        operation["security"] = [{"bearer": []}, {"session": []}]
    if endpoint.body:
        schema: dict[str, Any] = {
            "type": "object",
            "properties": {field.name: {**field.schema, "description": field.about} for field in endpoint.body},
            "additionalProperties": False,
        }
        if required := [field.name for field in endpoint.body if field.required]:
            schema["required"] = required
        operation["requestBody"] = {"required": bool(required), "content": {"application/json": {"schema": schema}}}
    return operation
