"""The errors that users see: what is wrong, where, and what to type next."""


class UserError(Exception):
    """A mistake the user can mend. Shown without a traceback; exit code 2."""


class RunError(Exception):
    """A run that cannot go on, through no mistake in its options. Exit code 1."""


class PrivacyError(Exception):
    """A privacy check failed. Exit code 3."""
