"""PTX as text → kernels as instructions: parameters, variables, registers, labels.

Only the text is understood here, after the "PTX ISA" manual; what an instruction does is in the other files.
"""

import functools
import re
from dataclasses import dataclass, field

SIZES = {  # bytes of a type; predicates have none
    "pred": 0,
    **dict.fromkeys(("u8", "s8", "b8"), 1),
    **dict.fromkeys(("u16", "s16", "b16", "f16", "bf16"), 2),
    **dict.fromkeys(("u32", "s32", "b32", "f32", "f16x2", "bf16x2"), 4),
    **dict.fromkeys(("u64", "s64", "b64", "f64"), 8),
}
WINDOWS = {"shared": 1 << 56, "local": 1 << 57, "param": 1 << 58}  # generic addresses of a space start here


class PtxError(Exception):
    """A kernel that is no PTX as known here, or does what it must not."""


@dataclass(frozen=True)
class Register:
    """A register of a kernel: bytes `size`, 0 for a predicate; `negated` as a source."""

    name: str
    size: int
    negated: bool = False


@dataclass(frozen=True)
class Constant:
    """A number in the text, as the bits that it has in two's complement or as a float."""

    bits: int


@dataclass(frozen=True)
class Special:
    """A register that the machine sets, such as %tid.x."""

    name: str


@dataclass(frozen=True)
class Symbol:
    """A label, or the address of a variable or parameter."""

    name: str


@dataclass(frozen=True)
class Address:
    """[base + offset]."""

    base: object
    offset: int


@dataclass(frozen=True)
class Instruction:
    """One instruction.

    Attributes:
        opcode: with its suffixes, such as `add.s32`.
        operands: registers, constants, symbols, addresses; tuples for vectors and for d|p.
        guard: the predicate that it runs under, or None.
        line: in the file.
    """

    opcode: str
    operands: tuple
    guard: Register | None
    line: int

    @functools.cached_property
    def parts(self):
        return self.opcode.split(".")

    def error(self, what):
        return PtxError(f"line {self.line}, {self.opcode}: {what}")


@dataclass
class Kernel:
    """An entry of a PTX module.

    Attributes:
        parameters: offset in the parameter block by name; `sizes` in bytes; `parameter_bytes`: the whole.
        variables: (space, offset in it) by name; `bytes` of each space.
        dynamic: the variable whose size a launch gives, or None.
        code: instructions in order.
        labels: index of the instruction that follows, by name.
        tables: labels that a brx chooses from, by name.
    """

    name: str
    parameters: dict = field(default_factory=dict)
    sizes: list = field(default_factory=list)
    parameter_bytes: int = 0
    variables: dict = field(default_factory=dict)
    bytes: dict = field(default_factory=lambda: {"shared": 0, "local": 0})
    dynamic: str | None = None
    code: list = field(default_factory=list)
    labels: dict = field(default_factory=dict)
    tables: dict = field(default_factory=dict)

    def declare(self, space, alignment, name, size):
        """Places a variable behind those of its space that are there already."""
        at = -(-self.bytes[space] // alignment) * alignment
        self.variables[name] = (space, at)
        self.bytes[space] = at + size


_COMMENT = re.compile(r"//[^\n]*|/\*.*?\*/", re.DOTALL)
_ENTRY = re.compile(r"\.entry\s+([\w$]+)\s*\((.*?)\)([^{}]*)\{", re.DOTALL)
_PARAMETER = re.compile(
    r"\.param\s+(?:\.align\s+(\d+)\s+)?\.(\w+)\s+(?:\.ptr[^,\n]*?\s)?([\w$]+)(?:\[(\d+)\])?\s*$"
)
_VARIABLE = re.compile(r"\.(shared|local)\s+(?:\.align\s+(\d+)\s+)?\.(\w+)\s+([\w$]+)(?:\[(\d*)\])?$")
_LABEL = re.compile(r"([$\w]+):(?!:)")


def split_ptx(text):
    """Each kernel's text and what is outside of kernels, by the kernels' names; lines keep their numbers."""
    entries = list(_ENTRY.finditer(text))
    ends = [text.index("\n}", entry.end()) + 2 for entry in entries]
    outside = "".join(
        text[a:b] for a, b in zip([0, *ends], [*(e.start() for e in entries), len(text)], strict=True)
    )
    outside = " ".join(_COMMENT.sub(" ", outside).split())
    return {
        entry[1]: outside + "\n" * text.count("\n", 0, entry.start()) + text[entry.start() : end]
        for entry, end in zip(entries, ends, strict=True)
    }


def read_kernel(text):
    """The one kernel of a text by `split_ptx`.

    Raises:
        PtxError: a statement that is not known.
    """
    text = _COMMENT.sub(lambda found: re.sub(r"[^\n]", " ", found[0]), text)
    entry = _ENTRY.search(text)
    kernel = Kernel(entry[1])
    for statement in text[: entry.start()].split(";"):
        found = re.search(r"\.(shared|const|global|func)\b.*", statement)
        if found is None:
            continue
        variable = _VARIABLE.match(found[0].strip())
        if variable is None:
            raise PtxError(f"a statement outside of kernels is not known here: {found[0].strip()[:80]}")
        if ".extern" in statement:
            kernel.dynamic = variable[4]
        else:
            _declare(kernel, variable)
    _read_parameters(kernel, entry[2])
    _read_body(kernel, text, entry.end())
    if kernel.dynamic:  # behind all others
        kernel.declare("shared", 16, kernel.dynamic, 0)
    return kernel


def _declare(kernel, found):
    size = SIZES[found[3]]
    kernel.declare(found[1], int(found[2] or size), found[4], size * int(found[5] or 1))


def _read_parameters(kernel, text):
    for part in filter(None, (piece.strip() for piece in text.split(","))):
        found = _PARAMETER.match(part)
        if found is None:
            raise PtxError(f"{kernel.name}: parameter not understood: {part}")
        size = SIZES[found[2]]
        alignment = int(found[1] or size)
        at = -(-kernel.parameter_bytes // alignment) * alignment
        kernel.parameters[found[3]] = at
        kernel.sizes.append(size * int(found[4] or 1))
        kernel.parameter_bytes = at + kernel.sizes[-1]


def _read_body(kernel, text, at):
    """Reads from behind the opening brace to the closing one."""
    scopes = [{}]
    ranges = {}  # prefix → size, of .reg .b32 %r<12>
    line = text.count("\n", 0, at) + 1
    while True:
        blank = re.compile(r"[\s;]*").match(text, at)
        line += blank[0].count("\n")
        at = blank.end()
        if text[at] == "{":
            scopes.append({})
            at += 1
            continue
        if text[at] == "}":
            scopes.pop()
            at += 1
            if not scopes:
                return
            continue
        label = _LABEL.match(text, at)
        if label:
            kernel.labels[label[1]] = len(kernel.code)
            last = label[1]
            at = label.end()
            continue
        end = text.index(";", at)
        statement = " ".join(text[at:end].split())
        if statement.startswith(".branchtargets"):
            kernel.tables[last] = [name.strip() for name in statement.split(" ", 1)[1].split(",")]
        elif statement.startswith("."):
            _read_directive(kernel, statement, scopes, ranges)
        else:
            if len(scopes) > 1:
                instruction = _read_instruction(statement, scopes, ranges, line)
            else:
                known = tuple(scopes[0].items()), tuple(ranges.items())
                instruction = _plain_instruction(statement, line, *known)
            kernel.code.append(instruction)
        line += text.count("\n", at, end)
        at = end


def _read_directive(kernel, statement, scopes, ranges):
    words = statement.split(None, 2)
    if words[0] == ".reg":
        size = SIZES[words[1][1:]]
        for name in (piece.strip() for piece in words[2].split(",")):
            found = re.match(r"(%?[\w$]+)<\d+>$", name)
            if found:
                ranges[found[1]] = size
            else:
                scopes[-1][name] = Register(f"{name}#{len(kernel.code)}" if len(scopes) > 1 else name, size)
    elif words[0] in (".shared", ".local"):
        found = _VARIABLE.match(statement)
        if found is None:
            raise PtxError(f"{kernel.name}: variable not understood: {statement}")
        _declare(kernel, found)
    elif words[0] not in (".pragma", ".loc"):
        raise PtxError(f"{kernel.name}: directive not known here: {statement}")


@functools.lru_cache(maxsize=1 << 17)
def _plain_instruction(statement, line, names, ranges):
    """Kernels are read again with one line altered: the others are remembered."""
    return _read_instruction(statement, [dict(names)], dict(ranges), line)


def _read_instruction(statement, scopes, ranges, line):
    guard = None
    if statement.startswith("@"):
        guarded, statement = statement[1:].split(None, 1)
        guard = Register(guarded.lstrip("!"), 0, guarded.startswith("!"))
    opcode, _, rest = statement.partition(" ")
    operands = tuple(_read_operand(text, scopes, ranges, line) for text in _split(rest, ","))
    return Instruction(opcode, operands, guard, line)


def _split(text, separator):
    """Pieces between separators that stand outside of brackets."""
    if "{" not in text and "[" not in text:
        return [piece.strip() for piece in text.split(separator)] if text.strip() else []
    pieces, depth, piece = [], 0, ""
    for character in text:
        depth += (character in "{[") - (character in "}]")
        if character == separator and depth == 0:
            pieces.append(piece.strip())
            piece = ""
        else:
            piece += character
    return [*pieces, piece.strip()] if piece.strip() else pieces


def _read_operand(text, scopes, ranges, line):
    def read(inner):
        return _read_operand(inner.strip(), scopes, ranges, line)

    if text.startswith("{"):
        return tuple(read(inner) for inner in _split(text[1:-1], ","))
    if "|" in text:
        return tuple(read(inner) for inner in text.split("|"))
    if text.startswith("["):
        found = re.match(r"\[\s*([%$\w.]+)\s*(?:\+\s*(-?\d+))?\s*\]$", text)
        if found is None:
            raise PtxError(f"line {line}: address not understood: {text}")
        return Address(read(found[1]), int(found[2] or 0))
    if text.startswith("!"):
        register = read(text[1:])
        return Register(register.name, register.size, True)
    for scope in reversed(scopes):
        if text in scope:
            return scope[text]
    if (found := re.match(r"(%[a-zA-Z_]+)\d+$", text)) and found[1] in ranges:
        return Register(text, ranges[found[1]])
    if text.startswith("%"):
        return Special(text[1:])
    if found := re.match(r"0[fF]([0-9a-fA-F]{8})$|0[dD]([0-9a-fA-F]{16})$", text):
        return Constant(int(found[1] or found[2], 16))
    if re.match(r"-?(0[xX][0-9a-fA-F]+|\d+)U?$", text):
        return Constant(int(text.rstrip("U"), 0))
    return Symbol(text)
