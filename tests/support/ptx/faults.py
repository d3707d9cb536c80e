"""What the executor finds wrong."""

from __future__ import annotations


class Fault(Exception):
    """A program does what a GPU leaves undefined, or forbids; the message names the lines."""


class Unknown(Exception):
    """An instruction, operand or directive that the executor does not know."""
