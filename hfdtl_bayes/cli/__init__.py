"""The command line: one command per verb, each a thin shell around the rooms below.

Results go to stdout, everything else to stderr. Exit code 0 on success, 1 on a verdict that says no (with --gate), 2 on bad
input with one message and no traceback, 130 when interrupted.
"""

from __future__ import annotations


def main() -> None:
    """Run the command line and exit with its code."""
    from hfdtl_bayes.cli.app import app  # noqa: PLC0415  (keeps `import hfdtl_bayes.cli` light)

    app(prog_name="hfdtl-bayes")
