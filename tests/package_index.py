"""Packages that tests try, in directories of their own: for `PYTHONPATH` of another process, never for this one."""

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from filelock import FileLock


DIRECTORY = Path(sys.prefix) / "share" / "skill-hf-tests"

# Older packages import `requests`; here it comes only with what they are not installed with.
REQUESTS = ("requests==2.34.2", "urllib3==2.8.0", "charset-normalizer==3.5.3", "certifi")


def install(directory_name: str, *requirements: str, without: str | None = None) -> Path:
    """
    Installs packages, without those that they require, into a directory that stays in the virtual environment. Later
    calls with the same arguments find it there and need no network.

    Args:
        directory_name (`str`): name of the directory.
        requirements (`str`): what pip is to install, such as `"transformers==4.57.6"`. If that changes, the directory
            is made anew.
        without (`str`, *optional*): pattern of files to leave out, relative to the directory.

    Returns:
        `Path` of the directory, to put on `PYTHONPATH`.

    Raises:
        `RuntimeError`: if pip fails; it names the requirements and ends with what pip said.
    """
    directory, contents = DIRECTORY / directory_name, "\n".join([*requirements, f"without {without}"])
    marker = directory / "contents.txt"
    DIRECTORY.mkdir(parents=True, exist_ok=True)
    with FileLock(DIRECTORY / f"{directory_name}.lock"):
        if marker.is_file() and marker.read_text(encoding="utf-8") == contents:
            return directory
        # Under another name first, so that an installation that was interrupted is never taken for a whole one.
        with tempfile.TemporaryDirectory(dir=DIRECTORY) as temporary:
            new = Path(temporary) / directory_name
            pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-compile", "--target", new]
            result = subprocess.run([*pip, *requirements], capture_output=True, text=True)
            if result.returncode:
                raise RuntimeError(
                    f"This test needs {', '.join(requirements)} from the package index, but pip could not install"
                    f" them:\n{result.stderr[-2000:]}"
                )
            for path in new.glob(without) if without else ():
                path.unlink()
            (new / marker.name).write_text(contents, encoding="utf-8")
            shutil.rmtree(directory, ignore_errors=True)
            os.replace(new, directory)
    return directory
