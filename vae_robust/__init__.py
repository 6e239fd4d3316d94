"Are disentangled variational autoencoders really easier to attack? A module per chapter of `nbs/`."
__version__ = "0.1.0"
