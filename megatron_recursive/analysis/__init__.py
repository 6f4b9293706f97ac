"""What the layers of a trained model do, measured on text."""
