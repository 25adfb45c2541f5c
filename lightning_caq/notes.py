"""Notes: what the reader of a report should know, one sentence each."""

from __future__ import annotations

from typing import Literal

Severity = Literal["information", "warning"]


class Note(str):
    """What the reader of a report should know: a sentence, and whether something should be done about it.

    Args:
        text: The sentence.
        severity: ``"warning"`` for what the user should act on, else ``"information"``.

    Example:
        >>> note = Note("No sample was left.", "warning")
        >>> note, note.severity, Note("Done.").severity
        ('No sample was left.', 'warning', 'information')
    """

    __slots__ = ("severity",)

    severity: Severity

    def __new__(cls, text: str, severity: Severity = "information") -> Note:
        """A sentence with its severity."""
        note = super().__new__(cls, text)
        note.severity = severity
        return note
