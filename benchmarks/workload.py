"""The unit of work: an iteration of N agents, each of which sets one key and emits one event.

Values are objects of about 100 bytes of JSON, which differ in each iteration. Of keys and sources there is one for
each agent, of event types 20.
"""

from __future__ import annotations

from typing import Any

__all__ = ["TYPES", "event_data", "event_type", "key", "value"]

TYPES = 20


def key(agent: int) -> str:
    return f"sensor/{agent}/reading"


def event_type(agent: int) -> str:
    return f"measured.{agent % TYPES}"


def value(agent: int, iteration: int) -> dict[str, Any]:
    """What an agent sets in an iteration."""
    return {
        "agent": agent,
        "iteration": iteration,
        "temperature": 20.5 + iteration % 7,
        "unit": "celsius",
        "location": "building 4, north side",
    }


def event_data(agent: int, iteration: int) -> dict[str, Any]:
    """What the event of an agent carries."""
    return {
        "agent": agent,
        "iteration": iteration,
        "level": "info",
        "message": "a new reading was taken by the sensor and stored",
    }
