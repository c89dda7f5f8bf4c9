"""The one family of exceptions this package raises on purpose.

Every error derives from :class:`HfdtlError`, and from the builtin it refines, so that
``except ValueError`` keeps working for callers who do not know this package. The command line
turns any :class:`HfdtlError` into one message on stderr and exit code 2.

A message says what was wrong, where (file, row, field), what was found, what is accepted and how
to mend it. What is no error but must be seen is a warning, and there is one kind.
"""

from __future__ import annotations


class HfdtlError(Exception):
    """Root of every error raised on purpose by this package."""


class InputError(HfdtlError, ValueError):
    """A file, row, field or argument does not hold what is accepted there."""


class UnreadablePartError(InputError):
    """A file, or a part of a table in several files, is cut short or not a table; others beside it may be sound."""


class MissingInputError(HfdtlError, FileNotFoundError):
    """A file or folder that was named does not exist."""


class UnknownNameError(HfdtlError, LookupError):
    """A name (GPU, feature set, configuration, column) is not known; the message lists those that are."""


class StatisticsError(HfdtlError, ValueError):
    """Sufficient statistics cannot be built or merged."""


class PosteriorFileError(HfdtlError, ValueError):
    """A posterior file is cut short, foreign, or of another version or feature set."""


class ConvergenceError(HfdtlError, RuntimeError):
    """The sampler did not converge, so nothing may be concluded from its draws."""


class ExportError(HfdtlError, ValueError):
    """A coefficient vector may not be exported as it stands."""


class RejectedRowsWarning(UserWarning):
    """Rows of a trace were set aside; the message is the table's summary. The commands show it themselves."""
