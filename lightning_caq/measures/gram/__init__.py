"""The Hessian of the distill objective from a small matrix of inner products."""
