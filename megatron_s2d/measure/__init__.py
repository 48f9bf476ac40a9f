"""Measures one rank of a training job without a GPU: memory, launches, waits of the host, communication, products."""
