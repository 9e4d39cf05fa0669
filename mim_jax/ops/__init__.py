"""Pure jnp functions without parameters, config or Flax."""
