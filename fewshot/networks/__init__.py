"""The paper's networks, Keras models as networks, and variants of the inner loop and outer loss."""
