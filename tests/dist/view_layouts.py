"""Layouts at which teachers have views of their own: every kind of rank, and packed sequences, each once."""

VIEW_LAYOUTS = ("tp1", "tp1packed", "tp2sp", "pp2", "cp2", "dp2:tp2", "tp2pp2", "tp4")
ONLY_VIEWS = ("tp4",)  # models of other scenarios have two heads
