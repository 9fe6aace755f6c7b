"""Kernels with one fault each: a line of PTX altered, among the lines that a run has executed.

A check of the interpreter, or a wrong result, must tell every one from the kernel as it is.
"""

import re
from dataclasses import dataclass


@dataclass(frozen=True)
class Fault:
    """What is done to a line: `pattern` is replaced; a pattern that is not there leaves the line alone."""

    name: str
    pattern: str
    replacement: object

    def fits(self, line):
        return re.search(self.pattern, line) is not None

    def apply(self, line):
        return re.sub(self.pattern, self.replacement, line, count=1)


def _swapped(vector, first, second):
    """A pattern replacement that exchanges two registers of the n-th vector of an mma."""

    def exchange(found):
        vectors = re.findall(r"\{([^}]*)\}", found[0])
        names = [name.strip() for name in vectors[vector].split(",")]
        names[first], names[second] = names[second], names[first]
        head = found[0].split("{", 1)[0]
        vectors[vector] = ",".join(names)
        return head + ", ".join(f"{{{inner}}}" for inner in vectors) + ";"

    return exchange


def _moved(by):
    """A replacement that moves an address."""

    def move(found):
        base, offset = re.match(r"(.*?)(?:\+(-?\d+))?$", found[2]).groups()
        return f"{found[1]}[{base}+{int(offset or 0) + by}]"

    return move


def _more(found):
    return f"{found[1]}{int(found[2]) + 1};"


_MMA = r"mma\.sync\.aligned\.m16.*;"
FAULTS = (
    Fault("no barrier", r"\bbar\.sync.*;|\bbarrier\.sync.*;", ""),
    Fault("one group of copies more under way", r"(cp\.async\.wait_group\s+)(\d+);", _more),
    Fault("a group of copies is not closed", r"cp\.async\.commit_group;", ""),
    Fault("a copy lands 16 bytes further", r"(cp\.async\.c[ag]\.shared\.global\s+)\[([^\]]*)\]", _moved(16)),
    Fault(
        "a copy comes from 16 bytes further",
        r"(cp\.async\.c[ag]\S+\s+\[[^\]]*\],\s*)\[([^\]]*)\]",
        _moved(16),
    ),
    Fault("a0 and a1 of a product exchanged", _MMA, _swapped(1, 0, 1)),
    Fault("b0 and b1 of a product exchanged", r"mma\.sync\.aligned\.m16n8k16.*;", _swapped(2, 0, 1)),
    Fault("two sums of a product exchanged", _MMA, _swapped(0, 1, 2)),
    Fault(
        "a wide load 16 bytes further",
        r"(ld\.(?:global|shared)\S*\.v4\S*\s+\{[^}]*\},\s*)\[([^\]]*)\]",
        _moved(16),
    ),
    Fault(
        "a wide load that is not aligned",
        r"(ld\.(?:global|shared)\S*\.v4\S*\s+\{[^}]*\},\s*)\[([^\]]*)\]",
        _moved(4),
    ),
    Fault("a store in shared memory 4 bytes further", r"(st\.shared\S*\s+)\[([^\]]*)\]", _moved(4)),
    Fault("a store in global memory 4 bytes further", r"(st\.global\S*\s+)\[([^\]]*)\]", _moved(4)),
    Fault("another lane's value", r"(shfl\.sync\.)bfly", r"\1up"),
    Fault("a vote upside down", r"(vote\.sync\.ballot\.b32\s+\S+\s+)%p", r"\1!%p"),
    Fault("a ticket counts twice", r"(atom\.\S*add\S*\s+\S+\s+\[[^\]]*\],\s*)(?:1|%r\d+);", r"\g<1>2;"),
    Fault("sums of halves in place of products", r"mul\.rn\.f16x2", "add.rn.f16x2"),
    Fault("a logical function of three words altered", r"(lop3\.b32.*, )0xea;", r"\g<1>0xe8;"),
)


@dataclass(frozen=True)
class Mutant:
    """A kernel's text with a fault, and the line."""

    fault: str
    line: int
    text: str


def mutants(text, executed, fault, most):
    """Up to `most` mutants of a text, spread over the executed lines that the fault fits."""
    lines = text.split("\n")
    places = [number for number in executed if fault.fits(lines[number - 1])]
    if len(places) > most:
        places = [places[i * (len(places) - 1) // max(1, most - 1)] for i in range(most)]
    for number in places:
        altered = list(lines)
        altered[number - 1] = fault.apply(altered[number - 1])
        yield Mutant(fault.name, number, "\n".join(altered))
