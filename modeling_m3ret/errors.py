"""The base class of every exception that means: the input is wrong, not the program."""


class InputError(ValueError):
    """Something the user gave (an option, a file, a folder, a Hub repository) cannot be used.

    The message is complete without a traceback: scripts print it as one line and exit with code 2.
    """
