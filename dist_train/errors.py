"""The exceptions for what a user can mend."""


class UserError(Exception):
    """Bad input of any kind; the command line prints it as one line and exits with code 2."""

    exit_code = 2


class LostPeerError(UserError):
    """Another rank is gone: nothing is wrong with the input, the same command goes on.

    Its exit code is EX_TEMPFAIL, which a process that its watchdog ended has too.
    """

    exit_code = 75


class RankError(UserError):
    """What one rank alone has met with, and so has to tell itself: a full disk of its node, say."""
