"""What can be wrong with the things around the command line, apart from the modules that find out: those load slowly."""


class ConfigurationError(Exception):
    """The configuration cannot be used; a sentence with file and key, and never a secret."""


class SynapseDbError(Exception):
    """The database cannot be reached or read; the text is a sentence for the operator, without the password."""
