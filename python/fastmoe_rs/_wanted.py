"""The words of every error about an argument: its name, what was given and what was wanted. Without torch."""

from __future__ import annotations

from difflib import get_close_matches
from typing import NoReturn


def wanted(name: str, given: object, what: str, error: type[Exception] = ValueError) -> NoReturn:
    raise error(f"{name}: got {given}, wanted {what}")


def one_of(name: str, value: str, choices: tuple[str, ...], error: type[Exception] = ValueError) -> None:
    if value not in choices:
        near = get_close_matches(str(value).lower(), choices, n=1)
        hint = f" (did you mean {near[0]!r}?)" if near else ""
        wanted(name, repr(value), "one of " + ", ".join(map(repr, choices)) + hint, error)


def whole(name: str, value: int, least: int | None = None) -> None:
    if not hasattr(value, "__index__"):
        wanted(name, repr(value), "a whole number", TypeError)
    if least is not None and value < least:
        wanted(name, value, f"at least {least}")
