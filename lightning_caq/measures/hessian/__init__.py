"""The Hessian of the objective as an operator, and what its products tell."""
