"""The one exception family that a user's input can raise."""

from __future__ import annotations

HOSPITAL_EXTRA = "pip install 'voxelscale[hospital]'"
"""Hint where a package of the extra is missing: DICOM out, archives, the viewer."""


EXPORT_EXTRA = "pip install 'voxelscale[export]'"
"""The same of exported models."""


class VoxelscaleError(Exception):
    """Something about the input or the environment is wrong, and a person can fix it.

    Args:
        message: what is wrong, naming the file or the key.
        hint: how to fix it, in one sentence.

    The CLI prints it as two lines, ``error: ...`` and ``hint: ...``, and exits with 2. A programming
    error is never one of these: it keeps its traceback. What is quoted from a file may hold line breaks
    or a terminal's control codes: they are shown as escapes.
    """

    def __init__(self, message: str, hint: str = "") -> None:
        self.message, self.hint = _printable(message), _printable(hint)
        super().__init__(self.message)

    def __reduce__(self) -> tuple[type[VoxelscaleError], tuple[str, str]]:
        # Exceptions cross process boundaries when `prepare` works in parallel; the default
        # pickling would lose the hint.
        return type(self), (self.message, self.hint)


def _printable(text: str) -> str:
    return text if text.isprintable() else "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)
