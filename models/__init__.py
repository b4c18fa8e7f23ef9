"""Language models as a stage-able list of layers: embedding, blocks of (mixer, MLP), head with the loss."""
