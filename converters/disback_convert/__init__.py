"""Converters from a framework's own checkpoint to `teacher.onnx` with its teacher card. One route a framework."""

VERSION = "0.1.0"


class ConversionError(Exception):
    """What went wrong and what to do about it, in words for the person who ran the command."""
