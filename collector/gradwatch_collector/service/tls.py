"""The files TLS needs, checked before anybody connects."""

from __future__ import annotations

import ssl
from dataclasses import dataclass


class TlsError(Exception):
    """The files cannot be used; the message is one line and names them."""


@dataclass(frozen=True, slots=True)
class TlsFiles:
    """PEM files: our certificate (and what leads from it to its authority), its key, and whose clients we want.

    With ``client_ca`` only clients that have a certificate of that authority are connected at all.
    """

    certificate: str
    key: str
    client_ca: str | None = None

    def check(self) -> None:
        """Read the files.

        Raises:
            TlsError: one is missing, is not what it should be, or needs a passphrase.
        """
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        try:
            # Without a passphrase given, OpenSSL would stop and ask for it on the terminal.
            context.load_cert_chain(self.certificate, self.key, password="")
        except OSError as error:
            raise TlsError(
                f"cannot use the certificate {self.certificate} with the key {self.key}: {_reason(error)}"
            ) from error
        try:
            if self.client_ca is not None:
                context.load_verify_locations(self.client_ca)
        except OSError as error:
            raise TlsError(f"cannot use {self.client_ca} for client certificates: {_reason(error)}") from error


def _reason(error: OSError) -> str:
    if isinstance(error, ssl.SSLError):
        return (error.reason or "not PEM, or encrypted").lower().replace("_", " ")
    return error.strerror or str(error)
