"""Networks built on the library's kernels, one file per paper."""
