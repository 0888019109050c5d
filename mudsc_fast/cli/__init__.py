"""The command line, ``mudsc-fast``. Nothing heavy is imported before a command needs it."""

from __future__ import annotations

from mudsc_fast.cli.app import main

__all__ = ["main"]
