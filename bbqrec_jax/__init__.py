"""BBQRec in JAX: behaviour-bind quantization for multi-modal sequential recommendation."""

__version__ = "0.1.0"
