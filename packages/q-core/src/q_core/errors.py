"""The exception tree: every error this family of packages raises on bad input.

    QuantizationError(Exception)
    ├── SpecError(ValueError)        the request contradicts itself
    ├── ShapeError(ValueError)       tensors do not fit one another
    ├── RangeError(ValueError)       a value lies outside what is allowed
    ├── DataError(ValueError)        the calibration data cannot be used
    ├── MatchError(LookupError)      a rule or name matched nothing
    ├── StateError(RuntimeError)     called in the wrong order
    ├── FormatError(ValueError)      a file is not what it should be
    ├── BackendError(RuntimeError)   no implementation for this device, dtype or shape
    └── LawError(AssertionError)     a grid, rounding or observer breaks a law it must obey

A message says what is wrong with the actual value, what is allowed, and the next step.
"""


class QuantizationError(Exception):
    """Base of every error raised on purpose by these packages."""


class SpecError(QuantizationError, ValueError):
    """The request contradicts itself."""


class ShapeError(QuantizationError, ValueError):
    """Tensors do not fit one another."""


class RangeError(QuantizationError, ValueError):
    """A value lies outside what is allowed."""


class DataError(QuantizationError, ValueError):
    """The calibration data cannot be used."""


class MatchError(QuantizationError, LookupError):
    """A rule or a name matched nothing."""


class StateError(QuantizationError, RuntimeError):
    """A function was called in the wrong order."""


class FormatError(QuantizationError, ValueError):
    """A file is not what it should be."""


class BackendError(QuantizationError, RuntimeError):
    """No implementation exists for this device, dtype or shape."""


class LawError(QuantizationError, AssertionError):
    """A grid, rounding or observer breaks a law that it must obey."""
