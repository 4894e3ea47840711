"""A run's results: as values, as JSON, as a table, as figures, as a page."""
