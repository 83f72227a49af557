"""ministack: an S3 server from PyPI that enforces SSE-C, checksums and conditional requests."""

import sys

from tests.servers.process import ServerRun, free_port, http_answers, wait_until
from tests.servers.s3 import S3Server


def missing() -> str | None:
    return None


def start(run: ServerRun) -> tuple[S3Server, ...]:
    return _face(run, "ministack", tls=False), _face(run, "ministack-https", tls=True)


def _face(run: ServerRun, name: str, *, tls: bool) -> S3Server:
    port = free_port()
    ca_file = run.certificates.ca_file if tls else None
    endpoint = f"{'https' if tls else 'http'}://127.0.0.1:{port}"
    environment = {
        "BIND_HOST": "127.0.0.1",
        "GATEWAY_PORT": str(port),
        "SERVICES": "s3",
        "LOG_LEVEL": "WARNING",
        # These two listen on fixed ports of their own.
        "SFTP_ENABLED": "0",
        "IOT_MTLS_ENABLED": "0",
        # With a Docker daemon at hand it would remove containers that another ministack has started.
        "DOCKER_HOST": "unix:///nonexistent",
    }
    if tls:
        environment |= {
            "USE_SSL": "1",
            "MINISTACK_SSL_CERT": run.certificates.certificate_file,
            "MINISTACK_SSL_KEY": run.certificates.key_file,
        }
    process = run.start(name, sys.executable, "-m", "ministack", env=environment)
    wait_until(name, lambda: http_answers(f"{endpoint}/_ministack/health", ca_file), process)
    return S3Server(
        name=name,
        endpoint=endpoint,
        access_key="test",
        secret_key="test",
        ca_file=ca_file,
        sse_c=True,
        storage_classes=("STANDARD_IA", "REDUCED_REDUNDANCY"),
        checks_signatures=False,
    )
