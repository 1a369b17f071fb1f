"""Models that come with the package, known by a name instead of a path."""

from __future__ import annotations

from importlib import resources
from pathlib import Path

SHIPPED = ("starter",)
"""Each is ``models/<name>.vxs`` of the package, and has its card in ``docs/<name>.md``."""

NOTICE = (
    "starter: the lung nodule model that comes with voxelscale, for research, not for diagnosis; "
    "docs/starter.md says what it finds and where it fails"
)


def shipped(name: Path) -> Path | None:
    """The file of a shipped model; None where the name is no such one, or a file or folder has it, too."""
    if str(name) not in SHIPPED or name.exists():
        return None
    return Path(str(resources.files("voxelscale"))) / "models" / f"{name}.vxs"
