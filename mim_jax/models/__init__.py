"""Networks shared by the methods, in Flax Linen; the parameter names in here are the checkpoint format."""
