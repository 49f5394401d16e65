"""What is known of model classes: roles of layers, block lists, published configurations."""
