"""The client's side: a Hugging Face model whose layer list is remote, sessions with KV caches on servers, generation.

`auto` and `distributed` make the models, `remote` is the list of blocks, `session` and `chain` talk to servers, `swarm` knows who they
are, and `portal` runs all of that on one trio thread behind the synchronous API.
"""
