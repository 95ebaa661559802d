"""Server for OpenAI's open-weight models gpt-oss-20b and gpt-oss-120b."""

__version__ = "0.21.0"
