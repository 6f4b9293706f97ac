"""The Hugging Face model (``model/``), and conversion from and to it (``convert/``)."""
