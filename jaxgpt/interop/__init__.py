"""Models, tokenizers and chat templates of Hugging Face transformers, read and written.

One table per family holds for both directions.
"""
