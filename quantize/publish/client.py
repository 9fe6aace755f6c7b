"""The Hub, asked patiently: waits where it asks to wait, and says in one line what went wrong.

The token is only ever handed to huggingface_hub; what it or a server says is cleared of it.
"""

import re
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, TypeVar

from dbrx_quant.runtime.output.redact import hide, redact_message

if TYPE_CHECKING:
    from huggingface_hub import HfApi

Result = TypeVar("Result")

ATTEMPTS = 5
LONGEST_WAIT_S = 900  # the Hub's rate limits are reset after five minutes

_TRANSIENT = (408, 429, 500, 502, 503, 504)
_XET_STATUS = re.compile(r"HTTP status (?:client|server) error \((\d{3})")


class HubError(RuntimeError):
    """The Hub did not do what was asked; the message says what to do about it."""


class Hub:
    """The Hub as one account sees it.

    Args:
        repository: NAMESPACE/NAME.
        notify: called with one-line notices, such as that a request is being retried.
        api: huggingface_hub's client; None: one with the endpoint and the token of the environment.
    """

    def __init__(self, repository: str, notify: Callable[[str], None], api: "HfApi | None" = None) -> None:
        from huggingface_hub import HfApi, get_token

        self.repository = repository
        self.api = api or HfApi()
        self.notify = notify
        token = self.api.token
        self.token = token if isinstance(token, str) else get_token()
        hide(self.token)

    def ask(self, call: Callable[[], Result]) -> Result:
        """What `call` returns; tried again where the Hub is busy or the connection breaks.

        Raises:
            HubError: it failed for good.
        """
        from huggingface_hub.utils import httpx

        for attempt in range(1, ATTEMPTS + 1):
            try:
                return call()
            except (OSError, ValueError, RuntimeError, httpx.HTTPError, httpx.InvalidURL) as error:
                cause = _cause(error)
                wait = _wait(cause, attempt)
                if wait is None or wait > LONGEST_WAIT_S or attempt == ATTEMPTS:
                    raise HubError(self._explain(cause)) from error
                self.notify(f"{self._explain(cause)}; trying again in {wait:.0f} s")
            time.sleep(wait)
        raise AssertionError("unreachable")

    def find(self, call: Callable[[], Result], *, behind_gate: bool = False) -> Result | None:
        """Likewise, but None where there is no such repository, revision or file.

        What a gate hides is there, so that is an error; with `behind_gate`, None too.
        """
        from huggingface_hub.errors import (
            GatedRepoError,
            RemoteEntryNotFoundError,
            RepositoryNotFoundError,
            RevisionNotFoundError,
        )

        try:
            return self.ask(call)
        except HubError as error:
            cause = _cause(error)
            absent = (RepositoryNotFoundError, RevisionNotFoundError, RemoteEntryNotFoundError)
            if isinstance(cause, absent) and (behind_gate or not isinstance(cause, GatedRepoError)):
                return None
            raise

    def _explain(self, error: BaseException) -> str:
        return " ".join(redact_message(self._advice(error)).split())

    def _advice(self, error: BaseException) -> str:
        from huggingface_hub.errors import (
            GatedRepoError,
            HfHubHTTPError,
            LocalTokenNotFoundError,
            OfflineModeIsEnabled,
        )

        endpoint = self.api.endpoint
        tokens = f"{endpoint}/settings/tokens"
        later = "run the same command again: what is already uploaded is kept"
        if isinstance(error, LocalTokenNotFoundError):
            return f"no token for {endpoint}: run `hf auth login`, or set HF_TOKEN, with one of {tokens}"
        if isinstance(error, OfflineModeIsEnabled):
            return f"cannot upload to {endpoint} in offline mode: HF_HUB_OFFLINE is set"
        if _is_transport(error):
            return f"no connection to {endpoint} ({error or type(error).__name__}); {later}"
        status = _status(error)
        if status is None:
            return f"{endpoint}: {error or type(error).__name__}"
        server_message = error.server_message if isinstance(error, HfHubHTTPError) else None
        said = f" ({server_message})" if server_message else ""
        where = _where(error, self.repository)
        if isinstance(error, GatedRepoError):
            return f"{where} is gated{said}: ask for access on its page, with the account of this token"
        if status == 401:
            return (
                f"{endpoint} does not accept the token{said}: create one with write access at {tokens} and "
                "run `hf auth login` again, or put it into HF_TOKEN, which takes precedence"
            )
        if status == 403:
            return (
                f"the token may not write to {self.repository}{said}: it needs write access to "
                f"{self.repository.split('/')[0]}; see {tokens}"
            )
        if status == 404:
            return f"{where} does not exist, or is hidden from this token{said}"
        if status == 429:
            return f"{endpoint} limits the rate of requests{said}; {later}"
        if status >= 500:
            return f"{endpoint} failed with status {status}{said}; {later}"
        return f"{endpoint} refused with status {status}{said or f' ({error})'}"


def _cause(error: BaseException) -> BaseException:
    """The answer or the broken connection at the root of an error, or the error itself."""
    at: BaseException | None = error
    while at is not None:
        if _status(at) is not None or _is_transport(at):
            return at
        at = at.__cause__
    return error.__cause__ if isinstance(error, HubError) and error.__cause__ else error


def _is_transport(error: BaseException) -> bool:
    from huggingface_hub.errors import OfflineModeIsEnabled
    from huggingface_hub.utils import httpx

    if isinstance(error, OfflineModeIsEnabled) or _status(error) is not None:
        return False
    lost = (httpx.TimeoutException, httpx.NetworkError, httpx.RemoteProtocolError)
    return isinstance(error, (*lost, ConnectionError, TimeoutError))


def _status(error: BaseException) -> int | None:
    """The HTTP status that an error stands for; hf_xet has it in the text of a ConnectionError only."""
    from huggingface_hub.errors import HfHubHTTPError

    if isinstance(error, HfHubHTTPError):
        return error.response.status_code
    found = _XET_STATUS.search(str(error)) if isinstance(error, ConnectionError) else None
    return int(found[1]) if found else None


def _where(error: BaseException, repository: str) -> str:
    """The repository that an error is about."""
    address = str(getattr(getattr(error, "response", None), "url", ""))
    found = re.search(r"https?://[^/]+/(?:api/models/)?([\w.-]+/[\w.-]+)", address)
    return found[1] if found else repository


def _wait(error: BaseException, attempt: int) -> float | None:
    """Seconds until it makes sense to try again; None: it doesn't."""
    from huggingface_hub.errors import HfHubHTTPError
    from huggingface_hub.utils import parse_ratelimit_headers

    usual = float(2 ** (attempt - 1))
    if _is_transport(error):
        return usual
    status = _status(error)
    if status not in _TRANSIENT:
        return None
    headers = error.response.headers if isinstance(error, HfHubHTTPError) else {}
    limits = parse_ratelimit_headers(headers)
    if status == 429 and limits is not None and limits.remaining == 0:
        return float(limits.reset_in_seconds + 1)
    asked = headers.get("Retry-After", "")
    return float(asked) if asked.isdigit() else usual
