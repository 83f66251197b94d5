"""One file per command; each imports only typer and rich at the top."""
