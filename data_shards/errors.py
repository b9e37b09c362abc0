"""The one exception of this package."""


class DataError(Exception):
    """Something is wrong with data on disk or with how it was asked for; the message names the file and the mend."""


def first_line(error: BaseException) -> str:
    """What an error says, in one line; its kind where it says nothing."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
