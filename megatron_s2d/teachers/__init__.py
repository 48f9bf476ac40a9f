"""Teachers: frozen models, teacher caches and SGLang servers as sources of distributions and scores."""
