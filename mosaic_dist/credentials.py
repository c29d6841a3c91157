"""Credentials in text, found and masked before anything is written or shown.

A run records what defines it: run.yaml, environment.json, git.diff, trackers, reports, every message. So no field of a
spec may hold a credential (see `spec.py`), and what else is recorded is masked. Storage libraries take credentials from
the environment or from a file of their own.
"""

import re

MASK = "***"
ADVICE = (
    "remove them: storage libraries take credentials from the environment (AWS_ACCESS_KEY_ID and "
    "AWS_SECRET_ACCESS_KEY, GCS_KEY and GCS_SECRET, AZURE_ACCOUNT_NAME and AZURE_ACCOUNT_ACCESS_KEY) or from a file "
    "(~/.aws/credentials, GOOGLE_APPLICATION_CREDENTIALS, COMPOSER_SFTP_KEY_FILE)"
)

_SECRET_WORDS = (
    r"(?:token|signature|sig|secret|passw(?:or)?d|credentials?|(?:aws)?accesskeyid"
    r"|(?:api|access|secret|account)?[-_]?key)"
)
_IN_URLS = (
    # scheme://user:password@host. A password may hold "/", ":" and "@"; a number before the path is a port.
    re.compile(
        r"""(\b[a-z][a-z0-9+.-]*://)(?![\w.-]+:\d+(?:[/?#]|$))[^\s/?#:@,"'<>]*:[^\s"'<>]*(?=@)""", re.IGNORECASE
    ),
    # https://token@host. In other schemes a name without a password is an account or a container.
    re.compile(r"""(\bhttps?://)[^\s/?#:@,"'<>]+(?=@)""", re.I),
    # ?X-Amz-Signature=... and &token=...
    re.compile(rf"""([?&;](?:[\w.-]*[-_.])?{_SECRET_WORDS}=)[^\s&;"'<>#]+""", re.I),
)
# AWS_SECRET_ACCESS_KEY=..., password = "...", "api_key": "...": what a diff or a DeepSpeed config may hold.
_ASSIGNED = re.compile(
    r"""\b([A-Z0-9_]*(?:SECRET|PASSWORD|API_KEY|ACCESS_KEY(?:_ID)?|[A-Z0-9]_TOKEN)=["']?"""
    r"""|(?:\w*_)?(?i:secret|password|api_key|access_key|auth_token|access_token)["']?\s*[=:]\s*["'])[^\s"'$]+"""
)


def mask_urls(text: str) -> str:
    """The text with each credential in a URL replaced by `***`."""
    if "://" in text:
        for pattern in _IN_URLS:
            text = pattern.sub(rf"\1{MASK}", text)
    return text


def mask(text: str) -> str:
    """The text with credentials in URLs, and values assigned to names such as `api_key`, replaced by `***`."""
    return _ASSIGNED.sub(rf"\1{MASK}", mask_urls(text))
