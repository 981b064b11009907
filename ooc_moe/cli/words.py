"""What the commands share: lists and sizes as words on the command line."""

from __future__ import annotations

from ooc_moe_wire.errors import InvalidRequest
from ooc_moe_wire.sizes import parse_size


def words(text: str | None) -> tuple[str, ...]:
    """What commas separate; nothing of no text."""
    return tuple(word.strip() for word in text.split(",")) if text else ()


def whole_numbers(name: str, text: str) -> tuple[int, ...]:
    """Numbers with commas between. Raises InvalidRequest, naming the option."""
    try:
        return tuple(int(word) for word in text.split(","))
    except ValueError as error:
        raise InvalidRequest(f"{name}: {text!r} is not whole numbers with commas between") from error


def size(name: str, text: str) -> int:
    """Bytes, of for example 8MiB. Raises InvalidRequest, naming the option."""
    try:
        return parse_size(text)
    except ValueError as error:
        raise InvalidRequest(f"{name}: {error}") from error
