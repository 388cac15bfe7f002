"""The state of an optimizer as a whole: what it costs."""
