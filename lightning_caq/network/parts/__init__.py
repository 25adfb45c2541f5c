"""Parts: weights that a module multiplies by itself, each as a layer of its own."""
