"""The one exception of this package."""


class DataError(Exception):
    """Something is wrong with data on disk or with how it was asked for; the message names the file and the mend."""
