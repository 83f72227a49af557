"""MinIO: what most people who host their own bucket run.

One process serves either http or https, and takes SSE-C over https only, so there are two, with separate stores.
"""

import functools
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import urllib3
from minio import MinioAdmin
from minio.credentials.providers import StaticProvider

from tests.servers.process import ServerRun, free_port, http_answers, wait_until
from tests.servers.s3 import S3Server
from tests.servers.tls import VIRTUAL_HOST_DOMAIN

REMEDY = "CGO_ENABLED=0 go install github.com/minio/minio@latest"
USER, PASSWORD = "minioadmin", "minioadmin-secret"


def program() -> str | None:
    """The server, from the path or from where `go install` puts it."""
    found = shutil.which("minio")
    if found is not None:
        return found
    # A distribution's Go is on the path; the one from go.dev often only in the shells that were told.
    go = shutil.which("go") or shutil.which("go", path="/usr/local/go/bin")
    if go is not None:
        gopath = subprocess.run([go, "env", "GOPATH"], check=True, capture_output=True, text=True).stdout.strip()
    else:
        gopath = os.environ.get("GOPATH") or str(Path.home() / "go")
    candidate = Path(gopath) / "bin" / "minio"
    return str(candidate) if os.access(candidate, os.X_OK) else None


def missing() -> str | None:
    return None if program() else f"minio not found; {REMEDY}"


def start(run: ServerRun) -> tuple[S3Server, ...]:
    minio = program()
    if minio is None:
        raise FileNotFoundError("minio")
    certificates = run.directory / "minio-certs"
    certificates.mkdir()
    shutil.copy(run.certificates.certificate_file, certificates / "public.crt")
    shutil.copy(run.certificates.key_file, certificates / "private.key")
    no_certificates = run.directory / "minio-no-certs"
    no_certificates.mkdir()
    faces = []
    for name, scheme, directory in (
        ("minio", "http", no_certificates),
        ("minio-https", "https", certificates),
    ):
        port = free_port()
        process = run.start(
            name,
            *(minio, "server", "--address", f"127.0.0.1:{port}"),
            *("--certs-dir", directory, run.directory / f"{name}-data"),
            env={
                "MINIO_ROOT_USER": USER,
                "MINIO_ROOT_PASSWORD": PASSWORD,
                "MINIO_DOMAIN": VIRTUAL_HOST_DOMAIN,
                "MINIO_BROWSER": "off",
                "MINIO_UPDATE": "off",
            },
        )
        tls = scheme == "https"
        face = S3Server(
            name=name,
            endpoint=f"{scheme}://127.0.0.1:{port}",
            access_key=USER,
            secret_key=PASSWORD,
            ca_file=run.certificates.ca_file if tls else None,
            sse_c=tls,
            sse_c_refused=not tls,
            storage_classes=("REDUCED_REDUNDANCY",),
            domain=VIRTUAL_HOST_DOMAIN,
        )
        faces.append((face, process))
    for face, process in faces:
        ready = functools.partial(http_answers, f"{face.endpoint}/minio/health/ready", face.ca_file)
        wait_until(face.name, ready, process)
    return tuple(face for face, _ in faces)


def add_user(server: S3Server, name: str, statements: list[dict[str, Any]]) -> str:
    """Make a user who may do what a policy of these statements says, and nothing else; returns the secret key."""
    admin = MinioAdmin(
        endpoint=server.endpoint.partition("://")[2],
        credentials=StaticProvider(server.access_key, server.secret_key),
        secure=server.ca_file is not None,
        http_client=urllib3.PoolManager(ca_certs=server.ca_file),
    )
    secret = f"secret-of-{name}"
    admin.user_add(access_key=name, secret_key=secret)
    admin.policy_add(policy_name=name, policy={"Version": "2012-10-17", "Statement": statements})
    admin.attach_policy(policies=[name], user=name)
    return secret
