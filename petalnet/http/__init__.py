"""A node's local web side: whether it lives, and what it knows of its swarm. Imported only where HTTP is on."""
