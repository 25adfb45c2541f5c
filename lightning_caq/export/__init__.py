"""Export: a quantized network in the bytes it was promised to need, and as ONNX for other runtimes."""
