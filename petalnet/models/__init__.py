"""What both sides of a swarm know of Hugging Face models: where the layers are, how to read and build only a part, who a model is."""
