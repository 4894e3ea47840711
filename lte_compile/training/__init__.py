"""LTE's two stages: the loop, its losses, the density held, several processes, exact resumption."""
