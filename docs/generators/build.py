"""Makes the pages that come from the code while mkdocs builds the site; a hook of mkdocs."""

import subprocess
import sys
import tempfile
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

_PAGES = ("flags", "combinations")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages, each of which a script in this folder writes. Importing Megatron takes some seconds."""
    for name in _PAGES:
        with tempfile.NamedTemporaryFile(suffix=".md") as page:
            subprocess.run([sys.executable, str(Path(__file__).with_name(f"{name}.py")), page.name], check=True)
            files.append(File.generated(config, f"{name}.md", content=Path(page.name).read_text(encoding="utf-8")))
    return files
