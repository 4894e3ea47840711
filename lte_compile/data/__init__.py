"""Real weights and real text, fetched at run time: hub models, registry packages, files of yours."""
