"""The Hugging Face Hub: access, datasets, models and their cards."""
