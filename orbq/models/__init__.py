"""Networks: pure functions of positions and graph; no files, no labels."""
