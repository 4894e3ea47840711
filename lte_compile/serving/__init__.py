"""Models for ONNX Runtime: single files, folders for servers, and the library of kernels."""
