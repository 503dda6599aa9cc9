"""What a stage says when it cannot go on."""


class UserError(Exception):
    """A fault the user can mend: one line that names the file, line or key and the remedy."""
