"""One file per published method; see mim_jax.method for the contract."""
