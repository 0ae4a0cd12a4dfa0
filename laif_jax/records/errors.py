"""The errors that are meant for a user."""


class LaifError(Exception):
    """Something that a user can mend. The message says what is wrong, where, and what to do; the command line shows it
    without a traceback. Any other exception is a defect of the program and shows its traceback."""
