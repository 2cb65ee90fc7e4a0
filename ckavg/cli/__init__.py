"""The command line: one file a verb. Parse, one library call, render.

Imports neither torch nor rich until they are used.
"""

from ckavg.cli.app import main

__all__ = ["main"]
