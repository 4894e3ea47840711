"""Methods side by side: their points run and kept, the table, the trade-off plot."""
