"""Base class of the exceptions that the user's input causes, not a fault of the program."""


class InputError(ValueError):
    """Something the user gave (an option, a file, a folder, a Hub repository) cannot be used.

    The message is complete without a traceback: scripts print it as one line and exit with code 2.
    """
