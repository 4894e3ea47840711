"""The rewrite in a model's modules: where routers and gates go, and how neurons are reordered."""
