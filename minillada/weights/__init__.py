"""Weights: other people's files <-> the module. Imports errors.py, files.py, the course and text/.

checkpoint.py loads, saves and checks a directory; schemes.py knows the names that its config and tensors have, and
headers.py checks safetensors files before they are read. gguf.py reads and writes llama.cpp's format, and convert.py
makes a model of such a file and a file of a model. hub.py downloads, device.py chooses a device and looks at its
memory, quantize.py stores weights in few bits.
"""
