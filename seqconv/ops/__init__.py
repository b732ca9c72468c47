"""The operators: public functions, their gradients and transforms."""
