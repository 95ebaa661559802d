"""Server for OpenAI's open-weight models gpt-oss-20b and gpt-oss-120b."""

__version__ = "1.0.0"
