"""A language model, fine-tuned on tasks as text (the third ancestor's experiment with Llama 3)."""
