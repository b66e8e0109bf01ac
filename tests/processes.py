"""Python in a separate process."""

import subprocess
import sys


def run(blocked, code):
    """The output of ``code`` in a separate process that cannot import the ``blocked`` packages."""
    block = f"import sys; sys.modules.update(dict.fromkeys({tuple(blocked)!r}))\n"
    result = subprocess.run([sys.executable, "-c", block + code], capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()
