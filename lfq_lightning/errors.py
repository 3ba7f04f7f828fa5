"""The one exception that reaches a user."""


class UserError(ValueError):
    """A mistake the user can mend: one clear sentence with the cure. The command line prints it and exits with 2."""
