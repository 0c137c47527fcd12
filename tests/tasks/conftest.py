"""An assertion that fails in a hook fails the test."""

from tests.loops import fail_with_hooks

__all__ = ["fail_with_hooks"]
