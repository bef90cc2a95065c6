"""Errors a user can act on: one or two lines that say what, where (file:key) and what to do."""


class UserError(Exception):
    """Bad usage, configuration, data, checkpoint or environment; nothing was started or overwritten."""

    exit_code = 2


class RunFailed(UserError):
    """A run that had started could not go on; what it had saved is intact."""

    exit_code = 1
