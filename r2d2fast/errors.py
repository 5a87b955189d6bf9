"""Errors of our own, where no built-in exception says it."""


class BankError(RuntimeError):
    """A bank's file or saved state does not fit the bank."""


class BackendError(RuntimeError):
    """A backend was asked for by name and is not available, or does not take these tensors."""
