"""The one error of this package that a user causes."""

from __future__ import annotations


class SAEFormatError(ValueError):
    """A checkpoint, or a name of one, that cannot be read as an SAE.

    The message says what was given, what was expected, and the file and field it is about.
    """
