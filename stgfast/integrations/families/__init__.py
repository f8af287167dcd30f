"""One small file for every diffusers family; each is found by itself."""
