"""The report: one HTML file that opens from disk and needs nothing else."""
