"""The exception for what a user can mend."""


class UserError(Exception):
    """Bad input of any kind; the command line prints it as one line and exits with code 2."""
