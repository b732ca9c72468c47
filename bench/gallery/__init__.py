"""Pictures of what layers learn: their kernels before and after training, and S4D's beside S4's."""
