"""Text that can be shown in a terminal or a report."""


def printable(text: object) -> str:
    r"""Escape all characters except printable ASCII, as `\n`, `\x1b` or `\u202e`.

    Names of files may contain line breaks, escape sequences of terminals, and characters that are invisible or change
    the direction of writing. Unescaped, a name could look like a line of the output, or erase other lines. Backslashes
    are kept, so that the result of a second call is the same.

    Args:
        text: Text, or an object that is converted with `str`, such as a path or an error.

    Example:
        >>> printable("knee\x1b[2J.png")
        'knee\\x1b[2J.png'
    """
    return "".join(c if " " <= c <= "~" else ascii(c)[1:-1] for c in str(text))


def quoted(text: str, max_length: int = 300) -> str:
    """Return text in quotation marks for an error message, escaped and shortened.

    Example:
        >>> quoted("a long name", max_length=6)
        "'a long...'"
    """
    return printable(repr(text if len(text) <= max_length else f"{text[:max_length]}..."))
