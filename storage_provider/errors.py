"""Errors of the configuration and of the database, apart from the modules that raise them, which load slowly."""


class ConfigurationError(Exception):
    """The configuration cannot be used; a sentence with file and key, and never a secret."""


class SynapseDbError(Exception):
    """The database cannot be reached or read; the text is a sentence for the operator, without the password."""
