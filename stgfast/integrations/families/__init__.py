"""One small file for each diffusers family. Files are found automatically."""
