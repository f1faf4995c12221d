"""The two ways a user's request can fail, each with a one-line message: `WHAT: expected E, got G; FIX`.

Scripts turn both into `error: ...` on stderr and exit code 2. Anything else that is raised is a bug of ours.
"""


class BadInput(ValueError):
    """What the user gave cannot be used: an option, a text, a file's content."""


class BadLuck(OSError):
    """The environment failed: a missing file, a full disk, no network, too little memory."""
