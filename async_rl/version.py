"""The version of the package, stated once: the build, `async-rl --version` and the report read it here."""

__version__ = "0.7.0"
