"""The command line: one file a verb, imported when the verb is run. Parse, one library call, print."""

from ckavg.cli.app import main

__all__ = ["main"]
