"""The version of ael_store; the distribution takes it from here."""

__version__ = "0.1.0"
