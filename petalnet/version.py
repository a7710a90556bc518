"""petalnet's version: the one place where it stands (the package's metadata is made from it)."""

__version__ = "0.1.0"
