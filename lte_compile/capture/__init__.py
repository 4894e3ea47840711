"""Models as traced graphs whose parameters keep their names."""
