"""Synapse's media in a bucket: the provider that runs inside Synapse, and what it is made of."""
