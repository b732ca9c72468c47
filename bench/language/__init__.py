"""A language model of bytes that is trained in minutes and generates step by step."""
