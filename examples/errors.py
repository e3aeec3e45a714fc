"""What the examples raise for what a user gave them; needs nothing but Python."""

from __future__ import annotations


class InputError(Exception):
    """Something the user gave cannot be used; the message is one line and says what to do."""
