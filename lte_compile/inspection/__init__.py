"""What lte_compile sees in a model: its FFNs, each site's kernel, the graph after every pass."""
