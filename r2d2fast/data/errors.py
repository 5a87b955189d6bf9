"""What is wrong with a user's files, instead of a traceback."""


class DataError(ValueError):
    """A data set's files, or a split file, are missing or not what they should be; the message names them and the way out."""
