"""Selection: candidate networks are made, and one is kept."""
