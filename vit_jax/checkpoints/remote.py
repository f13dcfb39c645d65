"""One request over HTTP: what a server says about a file, and what can go wrong in one line."""

import dataclasses
import http.client
import socket
import ssl
import urllib.error
import urllib.parse
import urllib.request

_RETRIED = (408, 425, 429, 500, 502, 503, 504)


class TryAgainError(Exception):
    """What may go better a little later."""

    def __init__(self, reason: str, wait: float | None = None):
        super().__init__(reason)
        self.wait = wait  # Seconds that the server asked for.


class CorruptError(Exception):
    """All of it came, and it is not what it should be."""


class RefusedError(Exception):
    """Trying again would change nothing."""


@dataclasses.dataclass(frozen=True)
class Remote:
    """A file as its server describes it, None where it says nothing. Checksums are base64."""

    url: str
    size: int | None = None
    etag: str | None = None
    generation: str | None = None
    md5: str | None = None
    crc32c: str | None = None

    def is_same(self, other: "Remote") -> bool:
        """Whether two descriptions are of the same bytes, as far as they tell."""
        pairs = [
            (getattr(self, f.name), getattr(other, f.name)) for f in dataclasses.fields(self)[1:]
        ]
        told = [a == b for a, b in pairs if a is not None and b is not None]
        size_alone = all(a is None or b is None for a, b in pairs[1:])
        return all(told) and not size_alone

    @property
    def strong_etag(self) -> str | None:
        """The ETag if it promises equal bytes, which is what If-Range needs."""
        return self.etag if self.etag and self.etag.startswith('"') else None


class _Redirects(urllib.request.HTTPRedirectHandler):
    """Follows redirects within http and https, and none from https to http."""

    def redirect_request(self, req, fp, code, msg, headers, newurl):
        old, new = (urllib.parse.urlsplit(u).scheme for u in (req.full_url, newurl))
        if new not in ("http", "https") or (old, new) == ("https", "http"):
            raise RefusedError(f"it redirects to {newurl}, which is not secure")
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def open_url(url: str, headers: dict[str, str], timeout: float) -> http.client.HTTPResponse:
    """Asks for a file.

    Returns:
      the response, whose status says that the file (200), or the part asked for (206), follows.

    Raises TryAgainError, RefusedError, or CorruptError if the part asked for does not exist.
    """
    resuming = "Range" in headers
    try:
        opener = urllib.request.build_opener(_Redirects)  # Honours the usual proxy variables.
        return opener.open(urllib.request.Request(url, headers=headers), timeout=timeout)
    except urllib.error.HTTPError as e:
        with e:
            said = f"the server answered {e.code} {e.reason}".rstrip()
            if e.code in _RETRIED:
                seconds = e.headers.get("Retry-After", "")
                raise TryAgainError(said, float(seconds) if seconds.isdecimal() else None) from e
            if e.code == 416 and resuming:
                raise CorruptError("the part does not fit the file") from e
            if e.code in (401, 403, 404, 410):
                said += ", so there is no such file or no permission to read it"
            raise RefusedError(f"{said}: check the name") from e
    except (OSError, http.client.HTTPException) as e:
        reason = e.reason if isinstance(e, urllib.error.URLError) else e
        if isinstance(reason, ssl.SSLCertVerificationError):
            raise RefusedError(
                f"its certificate is not trusted ({reason.verify_message}): check the clock, or "
                "set SSL_CERT_FILE to your network's certificates"
            ) from e
        if isinstance(reason, socket.gaierror) and not resuming:
            host = urllib.parse.urlsplit(url).hostname
            raise RefusedError(f"no address is known for {host}: check the network") from e
        text = "no answer in time" if isinstance(reason, TimeoutError) else str(reason)
        raise TryAgainError(f"no connection ({text or type(e).__name__})") from e


def describe(url: str, response: http.client.HTTPResponse) -> Remote:
    """What the headers of a response say. For a part (206) the size is the part's.

    Raises RefusedError if the bytes are not the file's own but compressed.
    """
    headers = response.headers
    if headers.get("Content-Encoding", "identity") != "identity":
        raise RefusedError(
            f"the server sends it compressed ({headers['Content-Encoding']}), which was not asked"
        )
    remote = Remote(
        url=url,
        size=_number(headers.get("Content-Length")),
        etag=headers.get("ETag"),
        generation=headers.get("x-goog-generation"),
    )
    # What is stored compressed and sent plain has the checksums and size of the compressed form.
    if headers.get("x-goog-stored-content-encoding", "identity") != "identity":
        return remote
    texts = ",".join(headers.get_all("x-goog-hash", [])).split(",")
    hashes = dict(text.strip().split("=", 1) for text in texts if "=" in text)
    return dataclasses.replace(
        remote,
        size=_number(headers.get("x-goog-stored-content-length")) or remote.size,
        md5=hashes.get("md5"),
        crc32c=hashes.get("crc32c"),
    )


def _number(text: str | None) -> int | None:
    return int(text) if text and text.isdecimal() and text.isascii() else None


def content_range(response: http.client.HTTPResponse) -> tuple[int | None, int | None]:
    """(first byte, size of the whole file) of "bytes 100-199/200"."""
    text = response.headers.get("Content-Range", "").removeprefix("bytes ")
    spread, _, total = text.partition("/")
    return _number(spread.partition("-")[0]), _number(total)
