"""The merging study on Fashion-MNIST: parents trained on halves of the classes, merged in every way, measured."""
