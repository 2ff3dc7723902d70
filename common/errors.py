"""The two exceptions that are not bugs, and how other people's error messages are quoted."""


class UserError(ValueError):
    """A mistake of the user's: one line that says what is wrong and what to do.

    Anything else that is raised is a bug and keeps its traceback.
    """


class Stopped(KeyboardInterrupt):
    """Ctrl-C after everything was saved. The message says how to go on."""


def printable_line(text: str, longest: int) -> str:
    """`text` on one line, at most `longest` characters, without control characters.

    File and tensor names come out of downloaded files: they must not move a terminal's cursor.
    """
    line = "".join(c if c.isprintable() else "?" for c in " ".join(text.split()))
    return line if len(line) <= longest else line[:longest] + " ..."


def one_line(error: object) -> str:
    """The message of another package's exception, short and printable."""
    line = "".join(filter(str.isprintable, " ".join(str(error).split())))
    return line[:100] or type(error).__name__
