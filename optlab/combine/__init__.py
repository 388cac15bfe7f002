"""Rules that combine gradients: of tasks (`multitask`), of clients (`federated`, `mesh`)."""
