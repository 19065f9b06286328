"""`convert SRC DST --to FORMAT`: models between smedjan's neutral checkpoint and the formats of other programs.

    neutral   smedjan's own (docs/checkpoints.md)      read, written
    orbax     JAX's own checkpoint                      read, written
    hf        Hugging Face directory, Llama family      read, written
    gguf      llama.cpp's file                          written

Every reader gives a `Portable` and every writer takes one (portable.py), so formats meet in one place: a format is a row of
formats.FORMATS and a file here. Tensors stay on disk until they are needed, one at a time. NumPy only; Orbax alone takes JAX.
"""
