"""The LoRA adapter that a soup of adapters is: its factors, and how it is vetted, made and written."""
