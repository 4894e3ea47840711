"""Graph to artefact."""
