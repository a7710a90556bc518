"""petalnet's versions: the one place where they stand (the package's metadata is made from the first)."""

__version__ = "0.1.0"

PROTOCOL = 1
"""The version of what peers say to each other, which is part of the protocols' names. It grows only where a peer could not follow: peers of
another one are refused. What is added beside that (messages, fields) keeps it, since peers leave alone what they do not know."""
