"""Small tasks with made-up tokens: recall of what stood earlier in the sequence, and of what comes later."""
