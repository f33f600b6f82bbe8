"""Text that can be shown in a terminal or a report."""


def printable(text: object) -> str:
    r"""Escape all characters except those of printable ASCII, as `\n`, `\x1b` or `\u202e`.

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


def printable_lines(text: object) -> str:
    r"""Escape a message of several lines, and indent all but the first, so that none looks like another message.

    Example:
        >>> print(printable_lines("not written\nbecause:\n  the disk is full"))
        not written
          because:
          the disk is full
    """
    first, *others = str(text).split("\n")
    return "\n".join([printable(first), *(f"  {printable(line.lstrip())}" for line in others)])
