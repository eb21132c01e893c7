"""One module per outside library or resource; each is the only one to import it."""
