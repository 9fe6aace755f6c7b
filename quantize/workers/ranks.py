"""Which of several workers this process is, as torchrun tells it in the environment."""

import os
import socket


def size() -> int:
    """How many workers there are; 1 where nobody says."""
    return _number("WORLD_SIZE", 1, 1)


def rank() -> int:
    """The number of this one; rank 0 drives the conversion."""
    own, count = _number("RANK", 0, 0), size()
    if own >= count:
        raise ValueError(f"RANK={own}: expected a number below WORLD_SIZE={count}")
    return own if count > 1 else 0


def speaker() -> str:
    """What begins a message of one of several workers: its rank and host; nothing where there is one."""
    try:
        return f"rank {rank()} on {socket.gethostname()}: " if size() > 1 else ""
    except ValueError:
        return ""


def is_helper() -> bool:
    """Whether another worker speaks for this one where nothing is wrong."""
    return speaker() != "" and rank() > 0


def _number(name: str, usual: int, least: int) -> int:
    text = os.environ.get(name, "")
    if not text:
        return usual
    if not text.isdecimal() or int(text) < least:
        raise ValueError(f"{name}={text}: expected a whole number of {least} or more, as torchrun sets it")
    return int(text)
