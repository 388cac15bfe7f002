"""The command line: `optlab race` and `optlab list`."""
