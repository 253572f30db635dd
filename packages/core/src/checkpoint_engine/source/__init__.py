"""Where weights come from: segments of host memory, and the files and tensors that fill them."""
