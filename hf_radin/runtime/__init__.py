"""What every room stands on: processes, atomic files, records as JSON, the Hub's errors and commits, text."""
