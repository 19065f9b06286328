"""The JAX/Flax backend (NVIDIA GPU, CPU)."""
