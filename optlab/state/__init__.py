"""The state of an optimizer as a whole: what it costs, says, is reset to and is saved as."""
