"""A certificate authority for one test run, and one certificate that all its servers share."""

import datetime
import ipaddress
from dataclasses import dataclass
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

VIRTUAL_HOST_DOMAIN = "s3.localhost"
"""Buckets are host names below it. It resolves only where the resolver knows RFC 6761, so tests map it themselves."""


@dataclass(frozen=True)
class Certificates:
    """Paths, as strings, since every reader of them wants a string."""

    ca_file: str
    certificate_file: str
    key_file: str

    @classmethod
    def create(cls, directory: Path) -> "Certificates":
        """Writes the three files.

        The extensions that Python 3.13 and later insist on (VERIFY_X509_STRICT) are all there.
        """
        directory.mkdir()
        ca_key, key = (ec.generate_private_key(ec.SECP256R1()) for _ in range(2))
        ca_name, name = (
            x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text)]) for text in ("test CA", "localhost")
        )
        ca_identifier = x509.SubjectKeyIdentifier.from_public_key(ca_key.public_key())
        ca = (
            _valid_now(x509.CertificateBuilder())
            .subject_name(ca_name)
            .issuer_name(ca_name)
            .public_key(ca_key.public_key())
            .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
            .add_extension(_key_usage(authority=True), critical=True)
            .add_extension(ca_identifier, critical=False)
            .sign(ca_key, hashes.SHA256())
        )
        addresses = [ipaddress.ip_address(text) for text in ("127.0.0.1", "::1")]
        hosts = ["localhost", VIRTUAL_HOST_DOMAIN, f"*.{VIRTUAL_HOST_DOMAIN}"]
        names = [*map(x509.DNSName, hosts), *map(x509.IPAddress, addresses)]
        certificate = (
            _valid_now(x509.CertificateBuilder())
            .subject_name(name)
            .issuer_name(ca_name)
            .public_key(key.public_key())
            .add_extension(x509.SubjectAlternativeName(names), critical=False)
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(_key_usage(authority=False), critical=True)
            .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
            .add_extension(
                x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(ca_identifier),
                critical=False,
            )
            .sign(ca_key, hashes.SHA256())
        )
        pem = serialization.Encoding.PEM
        key_text = key.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
        files = {"ca.pem": ca.public_bytes(pem), "server.crt": certificate.public_bytes(pem)}
        for file_name, content in {**files, "server.key": key_text}.items():
            (directory / file_name).write_bytes(content)
        return cls(*(str(directory / name) for name in ("ca.pem", "server.crt", "server.key")))


def _valid_now(builder: x509.CertificateBuilder) -> x509.CertificateBuilder:
    now = datetime.datetime.now(datetime.timezone.utc)
    # From yesterday on, for machines whose clock is set back while they run.
    return (
        builder.serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=30))
    )


def _key_usage(*, authority: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not authority,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=authority,
        crl_sign=authority,
        encipher_only=False,
        decipher_only=False,
    )
