"""The MLX backend (Apple Silicon; CUDA and CPU on Linux)."""
