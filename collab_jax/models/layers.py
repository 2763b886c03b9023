"""The layers that a decoder is made of beside attention: a norm and a projection."""

import jax
import jax.numpy as jnp
from flax import linen as nn

from collab_jax.models.decoder_config import DecoderConfig


class RMSNorm(nn.Module):
    """x [..., E] divided by the root of its mean square, times `scale`."""

    eps: float
    dtype: str

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],))
        y = x.astype(jnp.float32)
        y = y * jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + self.eps)
        return scale.astype(self.dtype) * y.astype(self.dtype)


def product(x: jax.Array, y: jax.Array) -> jax.Array:
    """x @ y, summed in f32, in which it is.

    Said in so many words since XLA's CPU compiler else computes bf16 products in f32, at half the
    speed.
    """
    return jnp.dot(x, y, preferred_element_type=jnp.float32)


@jax.custom_vjp
def _project(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """x [..., I] @ kernel [I, O]."""
    return product(x, kernel).astype(x.dtype)


def _project_backward(
    saved: tuple[jax.Array, jax.Array], dy: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """The gradients by x and by the kernel, from dy [..., O]."""
    x, kernel = saved
    rows, drows = x.reshape(-1, x.shape[-1]), dy.reshape(-1, dy.shape[-1])
    # The kernel's gradient needs one of the two transposed in memory. XLA's CPU compiler fuses what
    # made that operand into the strided copy; left to itself it picks the wide one (in the MLP),
    # which cost a sixth of an update.
    if rows.shape[1] <= drows.shape[1]:
        dkernel = product(rows.T, drows)
    else:
        dkernel = product(drows.T, rows).T
    return product(dy, kernel.T).astype(x.dtype), dkernel.astype(kernel.dtype)


_project.defvjp(lambda x, kernel: (_project(x, kernel), (x, kernel)), _project_backward)


class Dense(nn.Module):
    """x [..., I] projected to `features`; with an adapter, the product of its matrices is added."""

    cfg: DecoderConfig
    features: int
    bias: bool

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        init, dtype = nn.initializers.normal(self.cfg.initializer_range), self.cfg.dtype
        y = _project(x, self.param("kernel", init, (x.shape[-1], self.features)).astype(dtype))
        if self.has_variable("params", "lora_a"):
            a, b = (
                self.get_variable("params", name).astype(dtype) for name in ("lora_a", "lora_b")
            )
            y += self.cfg.lora_scale * _project(_project(x, a), b)
        if self.bias:
            y += self.param("bias", nn.initializers.zeros, (self.features,)).astype(dtype)
        return y
