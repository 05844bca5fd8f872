"""Fine-tune language models under an energy budget, and prove the saving with a meter."""

__version__ = "0.1.0"
