"""lte_compile: learned FFN sparsity for transformers, done as a compiler."""
