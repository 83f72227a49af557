"""The name under which Synapse configurations know the storage provider."""

from synapse.module_api import ModuleApi
from synapse.module_api.errors import ConfigError

# Before the imports that an older Synapse lets fail.
if not hasattr(ModuleApi, "defer_to_threadpool"):
    raise ConfigError("This storage provider needs Synapse 1.140 or later; please upgrade Synapse")

from storage_provider.provider import S3StorageProviderBackend

__all__ = ["S3StorageProviderBackend"]
