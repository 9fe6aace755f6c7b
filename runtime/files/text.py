"""Text that is no Unicode: half a pair of surrogates, as JSON and arguments that are no UTF-8 can hold."""


def unicode_fault(text: str) -> str | None:
    """What is wrong with a text of which no tokenizer can make ids, and where; None: nothing."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        code = ord(text[error.start])
        if 0xDC80 <= code <= 0xDCFF:  # how Python holds a byte that it could not decode
            return f"not UTF-8 at character {error.start} (byte {code - 0xDC00:#04x}); convert it first"
        return f"not Unicode at character {error.start}: \\u{code:04x} is half a character; remove it"
    return None
