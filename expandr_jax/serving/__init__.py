"""A trained pair in service: live documents, batches of requests, kept expansions, an HTTP API."""
