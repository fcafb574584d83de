"""TLS for what gateways and instances serve, and for what they ask of each other."""

from __future__ import annotations

import ssl

from memserve.errors import ConfigError

TLS_CA_VARIABLE = "MEMSERVE_TLS_CA"  # of commands that only ask


def server_tls(cert: str | None, key: str | None) -> ssl.SSLContext | None:
    """What a server shows its clients: a chain of certificates and its key, PEM files. None
    without. Raises ConfigError."""
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
    """For servers within this machine, whose certificate names other hosts: nobody listens in,
    and who answers proves itself by the cluster's secret."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    return context


def client_tls(authorities: str | None) -> ssl.SSLContext | None:
    """What is asked of https:// servers: a certificate of one of `authorities`, a PEM file. None
    without: one of the machine's own. Raises ConfigError."""
    if authorities is None:
        return None
    try:
        context = ssl.create_default_context(cafile=authorities)
    except (OSError, ssl.SSLError) as error:
        raise ConfigError(f"tls_ca = '{authorities}': {error}") from error
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    return context
