"""Which backend reaches a bucket."""

from __future__ import annotations

import importlib
import os
from urllib.parse import urlsplit

import backends
from backends.base import Backend
from backends.settings import BucketSettings
from backends.transport import environment_proxy


def open_backend(settings: BucketSettings) -> Backend:
    """The backend that the settings name, or `auto` chooses. Does no I/O."""
    name, _ = choose_backend(settings)
    module, _, class_name = backends.BACKENDS[name].partition(":")
    backend: Backend = getattr(importlib.import_module(module), class_name)(settings)
    return backend


def choose_backend(settings: BucketSettings) -> tuple[str, str]:
    """The name of the backend, and the reason as half a sentence for the log.

    `auto` is minio for an endpoint outside AWS, and boto3 for AWS and for what minio-py cannot do
    or find: endpoints with a path, and credentials of botocore's chain.
    """
    if settings.backend != "auto":
        return settings.backend, "as configured"
    if settings.is_aws:
        return "boto3", "the endpoint is AWS"
    endpoint = settings.endpoint_url or ""
    if urlsplit(endpoint).path:
        return "boto3", "the endpoint has a path"
    if environment_proxy(endpoint):
        return "boto3", "there is a proxy in the environment"
    if not settings.has_access_key and not os.environ.get("AWS_ACCESS_KEY_ID"):
        return "boto3", "the credentials are left to botocore's chain"
    return "minio", "the endpoint is not AWS"
