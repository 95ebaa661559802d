"""Addresses that URLs from outside may lead to, and connections that stay with what was checked."""

from __future__ import annotations

import asyncio
import ipaddress
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import httpx2
import pytest

from gptoss.tools.address_guard import AddressPolicy, AddressRefusedError, is_host_pattern, is_public
from gptoss.tools.guarded_http import guarded_client

LOOPBACK = (ipaddress.ip_network("127.0.0.0/8"),)
NOT_PUBLIC = [
    "127.0.0.1",
    "127.8.8.8",
    "0.0.0.0",
    "0.1.2.3",
    "10.0.0.1",
    "172.16.3.4",
    "192.168.1.1",
    "169.254.169.254",
    "100.64.0.1",
    "224.0.0.1",
    "240.0.0.1",
    "255.255.255.255",
    "192.0.2.1",
    "198.18.0.1",
    "::1",
    "::",
    "fe80::1",
    "fc00::1",
    "fd12::1",
    "fec0::1",
    "ff02::1",
    "2001:db8::1",
    "::ffff:127.0.0.1",
    "::ffff:10.0.0.1",
    "::ffff:169.254.169.254",
    "::7f00:1",
    "64:ff9b::7f00:1",
    "64:ff9b::a9fe:a9fe",
    "2002:7f00:1::1",
    "2002:a00:1::1",
]


@pytest.mark.parametrize("address", NOT_PUBLIC)
def test_addresses_that_are_not_public_are_refused(address: str) -> None:
    assert not is_public(ipaddress.ip_address(address))
    with pytest.raises(AddressRefusedError):
        AddressPolicy().check_host(address)
    with pytest.raises(AddressRefusedError):
        AddressPolicy().check_resolved(["93.184.216.34", address])


@pytest.mark.parametrize("address", ["93.184.216.34", "2606:4700::1111", "::ffff:93.184.216.34", "64:ff9b::5db8:d822"])
def test_public_addresses_are_allowed(address: str) -> None:
    AddressPolicy().check_host(address)


def test_a_network_is_allowed_in_each_of_its_forms() -> None:
    policy = AddressPolicy(networks=LOOPBACK)
    for address in ("127.0.0.1", "::ffff:127.0.0.1", "64:ff9b::7f00:1"):
        policy.check_host(address)
    with pytest.raises(AddressRefusedError):
        policy.check_host("10.0.0.1")


def test_names_are_those_of_the_allow_list() -> None:
    policy = AddressPolicy(hosts=("tools.example.com", "*.example.org"))
    for host in ("tools.example.com", "TOOLS.example.com.", "a.example.org", "a.b.example.org"):
        policy.check_host(host)
    for host in ("example.com", "eviltools.example.com", "example.org", "badexample.org", "tools.example.com.evil.net"):
        with pytest.raises(AddressRefusedError, match="allow-list"):
            policy.check_host(host)


@pytest.mark.parametrize(
    "url",
    ["file:///etc/passwd", "ftp://a.example/", "http://", "http://user:x@a.example/", "http://[::1", "http://a:b/"],
)
def test_other_urls_are_refused(url: str) -> None:
    with pytest.raises(AddressRefusedError):
        AddressPolicy().check_url(url)


def test_host_patterns() -> None:
    assert all(map(is_host_pattern, ("a.example", "*.a.example", "localhost", "10.0.0.1", "2001:db8::1")))
    assert not any(map(is_host_pattern, ("http://a", "a/b", "*", "*.", "a:80", "")))


@asynccontextmanager
async def answering(answer: bytes) -> AsyncIterator[int]:
    """The port of a server on the loopback address that gives every request this answer."""

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(answer)
        await writer.drain()
        writer.close()

    server = await asyncio.start_server(handle, "127.0.0.1", 0)
    async with server:
        yield server.sockets[0].getsockname()[1]


OK = b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\nconnection: close\r\n\r\nhi"


def resolves_to(monkeypatch: pytest.MonkeyPatch, *answers: list[str]) -> list[str]:
    """Names resolve to each of these in turn. -> the names that were asked for."""
    asked, left = [], list(answers)

    async def getaddrinfo(host: str, port: int, **_: Any) -> list[Any]:
        asked.append(host)
        return [(0, 0, 0, "", (address, port)) for address in left.pop(0)]

    monkeypatch.setattr(asyncio.get_running_loop(), "getaddrinfo", getaddrinfo, raising=False)
    return asked


async def test_the_connection_goes_to_the_address_that_was_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")
    async with answering(OK) as port, guarded_client(AddressPolicy(networks=LOOPBACK)) as client:
        asked = resolves_to(monkeypatch, ["127.0.0.1"], ["10.0.0.1"])
        response = await client.get(f"http://tools.example:{port}/")
    assert response.text == "hi" and asked == ["tools.example"]


@pytest.mark.parametrize("addresses", [["127.0.0.1"], ["93.184.216.34", "127.0.0.1"], ["::ffff:127.0.0.1"]])
async def test_a_name_of_a_local_address_is_refused(monkeypatch: pytest.MonkeyPatch, addresses: list[str]) -> None:
    connected: list[Any] = []
    monkeypatch.setattr(socket.socket, "connect", lambda *args: connected.append(args))
    async with guarded_client(AddressPolicy()) as client:
        resolves_to(monkeypatch, addresses)
        with pytest.raises(AddressRefusedError):
            await client.get("http://tools.example:9/")
    assert not connected


async def test_redirects_are_checked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    moved = b"HTTP/1.1 302 Found\r\nlocation: http://%b/\r\ncontent-length: 0\r\nconnection: close\r\n\r\n"
    for target in (b"169.254.169.254", b"other.example", b"[::ffff:10.0.0.1]"):
        async with answering(moved % target) as port:
            policy = AddressPolicy(hosts=("127.0.0.1", "169.254.169.254", "::ffff:a00:1"), networks=LOOPBACK)
            async with guarded_client(policy) as client:
                with pytest.raises(AddressRefusedError):
                    await client.get(f"http://127.0.0.1:{port}/", follow_redirects=True)


async def test_what_does_not_resolve_or_answer_is_an_error_of_the_client(
    unused_tcp_port_factory: Callable[[], int],
) -> None:
    async with guarded_client(AddressPolicy(networks=LOOPBACK), timeout=5.0) as client:
        with pytest.raises(httpx2.ConnectError):
            await client.get(f"http://127.0.0.1:{unused_tcp_port_factory()}/")
        with pytest.raises(httpx2.ConnectError):
            await client.get("http://nowhere.invalid/")
