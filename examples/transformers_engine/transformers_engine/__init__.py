"""A third engine: a plain transformers model behind a small HTTP server, updated by the sdk alone."""
