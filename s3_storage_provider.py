"""The name under which Synapse configurations know the storage provider."""

from storage_provider.provider import S3StorageProviderBackend

__all__ = ["S3StorageProviderBackend"]
