"""A trained pair in service: live documents, batches of requests, kept expansions, an HTTP API."""

TOKEN_VARIABLE = "EXPANDR_SERVE_TOKEN"  # The variable that has what every request must know.
