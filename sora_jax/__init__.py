"""sora_jax: an open, JAX-native text-to-video system after the Sora report."""

__version__ = "0.1.0"
