"""TLS contexts of gateways and instances, as servers and as each other's clients."""

from __future__ import annotations

import os
import ssl

from memserve.errors import ConfigError

TLS_CA_VARIABLE = "MEMSERVE_TLS_CA"  # for commands that are only clients


def server_tls(cert: str | None, key: str | None) -> ssl.SSLContext | None:
    """Return the server's context with a certificate chain and its key (PEM files); None if
    neither is given. Raises ConfigError."""
    if cert is None and key is None:
        return None
    if cert is None or key is None:
        raise ConfigError("tls_cert and tls_key need each other")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    try:
        context.load_cert_chain(cert, key)
    except (OSError, ssl.SSLError) as error:
        raise ConfigError(f"tls_cert = '{cert}', tls_key = '{key}': {error}") from error
    return context


def unchecked_tls() -> ssl.SSLContext:
    """Return a client's context without certificate checks, for servers within this machine:
    their certificates name other hosts, no third party can listen, and answers carry a proof."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    return context


def client_tls(authorities: str | None) -> ssl.SSLContext | None:
    """Return the client's context that trusts `authorities` (a PEM file); None if not given: the
    machine's own are trusted. Raises ConfigError."""
    if authorities is None:
        return None
    try:
        context = ssl.create_default_context(cafile=authorities)
    except (OSError, ssl.SSLError) as error:
        raise ConfigError(f"tls_ca = '{authorities}': {error}") from error
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    return context


def command_tls(configured: str | None = None) -> ssl.SSLContext | None:
    """Return the client's context of a command, which trusts the file that MEMSERVE_TLS_CA names,
    or else `configured`; None without either. Raises ConfigError."""
    return client_tls(os.environ.get(TLS_CA_VARIABLE) or configured)
