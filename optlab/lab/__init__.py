"""The command line: `optlab race`, `optlab list` and `optlab memory`."""
