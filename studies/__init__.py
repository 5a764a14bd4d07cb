"""What goes beyond the four stages, one file a study, run as python -m studies.NAME from the repository."""
