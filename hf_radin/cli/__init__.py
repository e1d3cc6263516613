"""The command line: options, commands, tables."""
