"""A teacher as a service: its server, and the client side of it in the trainer (docs/teachers.md)."""
