"""What goes beyond the four stages, one file a study: python -m studies.NAME, from the repository."""
