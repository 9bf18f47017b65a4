"""The version of the package, which `setup.cfg` also reads from here."""

__version__ = "0.1.0.dev0"
