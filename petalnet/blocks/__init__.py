"""A server's work: run some consecutive blocks of a model for many clients at once."""
