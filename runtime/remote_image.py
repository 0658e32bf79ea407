"""A picture from the web, fetched so that a client of the server cannot use it to reach the inside of a network.

The name is resolved once, every address it has must be public, and the connection goes to the address that was
checked: a name that changes its mind between check and connection gains nothing. Redirects are followed by hand, each
checked like the first. Size and time are bounded.
"""

from __future__ import annotations

import asyncio
import ipaddress
import socket
from collections.abc import Callable
from typing import TypeAlias

import httpx

from mpa_edge.errors import InputError

MAX_BYTES = 24_000_000
SECONDS = 15.0
MAX_REDIRECTS = 3

Address: TypeAlias = "ipaddress.IPv4Address | ipaddress.IPv6Address"
# Where the addresses of the internet are; what else there is leads inside, or to IPv4 by a detour (NAT64 and its kin).
_GLOBAL_UNICAST = ipaddress.ip_network("2000::/3")


def is_public(address: Address) -> bool:
    """Whether an address lies on the open internet. Those that wrap an IPv4 address in IPv6 count as not."""
    if isinstance(address, ipaddress.IPv6Address):
        if address.ipv4_mapped:
            return is_public(address.ipv4_mapped)
        if address.sixtofour or address.teredo or address not in _GLOBAL_UNICAST:
            return False
    return address.is_global and not address.is_multicast


async def fetch(
    url: str, *, allowed: Callable[[Address], bool] = is_public, max_bytes: int = MAX_BYTES, seconds: float = SECONDS
) -> bytes:
    """The bytes behind an http(s) URL. Raises `InputError` with the reason; a picture it may still not be."""
    try:
        return await asyncio.wait_for(_follow(httpx.URL(url), allowed, max_bytes), seconds)
    except asyncio.TimeoutError as error:
        raise InputError(f"the picture did not come within {seconds:g} seconds") from error
    except (httpx.HTTPError, httpx.InvalidURL, OSError, UnicodeError) as error:
        raise InputError(f"the picture cannot be fetched ({type(error).__name__})") from error


async def _follow(url: httpx.URL, allowed: Callable[[Address], bool], max_bytes: int) -> bytes:
    # No proxy, cookies or credentials from the environment, and certificates are checked against the name.
    async with httpx.AsyncClient(trust_env=False, follow_redirects=False) as client:
        for _ in range(MAX_REDIRECTS + 1):
            address = await _resolve(url, allowed)
            request = client.build_request(
                "GET",
                url.copy_with(host=str(address)),
                headers={"Host": url.netloc.decode(), "Accept": "image/*", "Accept-Encoding": "identity"},
                extensions={"sni_hostname": url.host},
            )
            response = await client.send(request, stream=True)
            try:
                if not response.is_redirect:
                    return await _body(response, max_bytes)
                url = url.join(response.headers.get("Location", ""))
            finally:
                await response.aclose()
    raise InputError(f"the picture's address redirects more than {MAX_REDIRECTS} times")


async def _resolve(url: httpx.URL, allowed: Callable[[Address], bool]) -> Address:
    """The address to connect to: the name's first, when all of them may be connected to."""
    if url.scheme not in ("http", "https") or not url.host or url.userinfo:
        raise InputError("a picture's address must be a data: URL, or http(s)://host/… without a password")
    if url.port is not None and not 1 <= url.port <= 65535:
        raise InputError("a picture's address must have a port from 1 to 65535, or none")
    port = url.port or (443 if url.scheme == "https" else 80)
    found = await asyncio.get_running_loop().getaddrinfo(url.host, port, type=socket.SOCK_STREAM)
    addresses = [ipaddress.ip_address(entry[4][0]) for entry in found]
    if not addresses or not all(map(allowed, addresses)):
        raise InputError("the picture's address is not a public one; send the picture as a data: URL")
    return addresses[0]


async def _body(response: httpx.Response, max_bytes: int) -> bytes:
    if response.status_code != 200:
        raise InputError(f"the picture's host answered with status {response.status_code}")
    content = bytearray()
    async for chunk in response.aiter_raw():
        content += chunk
        if len(content) > max_bytes:
            raise InputError(f"the picture is larger than {max_bytes // 1_000_000} MB")
    return bytes(content)
