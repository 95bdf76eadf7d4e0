"""What a run leaves behind: CSV files, scalars for the host's writers, lines for the console."""
