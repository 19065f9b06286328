"""float32 that is float32: a GPU multiplies float32 matrices in TF32 unless it is told not to, and loses three digits.

Products of bfloat16 operands are not concerned: they are as fast as before, and sum in float32.
"""

import os
import sys

SETTING = "JAX_DEFAULT_MATMUL_PRECISION"


def exact_float32() -> None:
    """Have float32 matrices multiplied in float32, unless the user's environment says otherwise. It holds for what is compiled from
    here on, whether JAX is imported already or not."""
    os.environ.setdefault(SETTING, "highest")
    jax = sys.modules.get("jax")
    if jax and jax.config.values[SETTING.lower()] is None:
        jax.config.update(SETTING.lower(), os.environ[SETTING])
