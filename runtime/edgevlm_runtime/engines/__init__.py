"""One file per engine kind; each imports its library only when a graph is opened."""
