"""Converters from a framework's own checkpoint to `teacher.onnx` with its teacher card. One module a framework."""


class ConversionError(Exception):
    """What went wrong and what to do about it, in words for the person who ran the command."""
