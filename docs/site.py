"""What mkdocs needs beside mkdocs.yml: the folder of pages, and how docstrings are shown."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import griffe

# :func:`~amalgam.tasks.load` and the like, of which Markdown knows nothing.
ROLE = re.compile(r":(?:func|class|meth|mod|data|attr):`~?([^`]+)`")


def on_config(config: Any) -> Any:
    """Take pages from the whole repository, which mkdocs refuses as the value of a setting."""
    config.docs_dir = str(Path(config.config_file_path).parent)
    return config


class Roles(griffe.Extension):
    """Shows what a role of Sphinx names as code."""

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        """Rewrite an object's docstring."""
        if obj.docstring is not None:
            obj.docstring.value = ROLE.sub(r"`\1`", obj.docstring.value)
