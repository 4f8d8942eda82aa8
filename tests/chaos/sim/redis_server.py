"""A queue server in memory: the commands that Stillhouse uses, with its own Lua scripts run by a real Lua.

Everything is bytes, as on the wire. One command is one step, so scripts are atomic. Expiry and idle times follow
`time.time()`, which is virtual in a simulation. tests/chaos/test_simulation.py holds it against a real server.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

from lupa import lua51
from redis.exceptions import ResponseError

Id = tuple[int, int]


@dataclass
class Pending:
    consumer: bytes
    since_ms: int
    deliveries: int


@dataclass
class Group:
    last: Id
    pending: dict[Id, Pending] = field(default_factory=dict)


@dataclass
class Stream:
    entries: dict[Id, list[bytes]] = field(default_factory=dict)
    last: Id = (0, 0)
    groups: dict[bytes, Group] = field(default_factory=dict)


class ZSet(dict[bytes, float]):
    pass


def now_ms() -> int:
    return int(time.time() * 1000)


def raw(value: Any) -> bytes:
    """An argument as it travels."""
    if isinstance(value, bytes):
        return value
    return repr(value).encode() if isinstance(value, float) else str(value).encode()


def parse_id(text: bytes) -> Id:
    first, _, second = text.partition(b"-")
    return int(first), int(second or 0)


def show_id(entry_id: Id) -> bytes:
    return b"%d-%d" % entry_id


class RedisServer:
    """All data; `call` runs one command."""

    def __init__(self) -> None:
        self._data: dict[bytes, Any] = {}
        self._expiry: dict[bytes, int] = {}
        self.on_change: Callable[[bytes], None] = lambda key: None
        """Called with a stream that got an entry or is gone."""
        self.on_script: Callable[[str, Sequence[Any], Sequence[Any], Any], None] = lambda *_: None
        """Called with every script that ran: its text, keys, arguments and answer."""

    def call(self, *parts: Any) -> Any:
        """Run a command; answers bytes, int, None, b"OK" or lists of these."""
        name, *args = [raw(part) for part in parts]
        return getattr(self, f"_{name.decode().lower()}")(*args)

    def flush(self) -> None:
        """Lose everything."""
        gone, self._data, self._expiry = list(self._data), {}, {}
        for key in gone:
            self.on_change(key)

    def names(self) -> list[bytes]:
        return sorted(key for key in list(self._data) if self._find(key) is not None)

    # -- keys --------------------------------------------------------------------------------------------------------

    def _find(self, key: bytes) -> Any:
        if key in self._expiry and self._expiry[key] <= now_ms():
            del self._data[key], self._expiry[key]
        return self._data.get(key)

    def _get(self, key: bytes) -> bytes | None:
        return self._find(key)

    def _make(self, key: bytes, kind: type) -> Any:
        value = self._find(key)
        if value is None:
            value = self._data[key] = kind()
        return value

    def _ping(self) -> bytes:
        return b"PONG"

    def _exists(self, *keys: bytes) -> int:
        return sum(self._find(key) is not None for key in keys)

    def _del(self, *keys: bytes) -> int:
        number = 0
        for key in keys:
            if self._find(key) is not None:
                del self._data[key]
                self._expiry.pop(key, None)
                self.on_change(key)
                number += 1
        return number

    _unlink = _del

    def _set(self, key: bytes, value: bytes, *options: bytes) -> bytes:
        self._data[key] = value
        self._expiry.pop(key, None)
        if options:
            unit = 1000 if options[0] == b"EX" else 1
            self._expiry[key] = now_ms() + int(options[1]) * unit
        return b"OK"

    def _incr(self, key: bytes) -> int:
        value = int(self._get(key) or 0) + 1
        self._set(key, b"%d" % value)
        return value

    def _pexpire(self, key: bytes, ms: bytes) -> int:
        if self._find(key) is None:
            return 0
        self._expiry[key] = now_ms() + int(ms)
        return 1

    # -- hashes, sets, sorted sets -----------------------------------------------------------------------------------

    def _hset(self, key: bytes, *pairs: bytes) -> int:
        held = self._make(key, dict)
        fresh = sum(name not in held for name in pairs[::2])
        held.update(zip(pairs[::2], pairs[1::2], strict=True))
        return fresh

    def _hsetnx(self, key: bytes, name: bytes, value: bytes) -> int:
        held = self._make(key, dict)
        if name in held:
            return 0
        held[name] = value
        return 1

    def _hget(self, key: bytes, name: bytes) -> bytes | None:
        return (self._find(key) or {}).get(name)

    def _hmget(self, key: bytes, *names: bytes) -> list[bytes | None]:
        held = self._find(key) or {}
        return [held.get(name) for name in names]

    def _hgetall(self, key: bytes) -> dict[bytes, bytes]:
        return dict(self._find(key) or {})

    def _hkeys(self, key: bytes) -> list[bytes]:
        return list(self._find(key) or {})

    def _hdel(self, key: bytes, *names: bytes) -> int:
        held = self._find(key) or {}
        number = sum(held.pop(name, None) is not None for name in names)
        if key in self._data and not held:
            del self._data[key]
        return number

    def _sadd(self, key: bytes, *members: bytes) -> int:
        held = self._make(key, set)
        before = len(held)
        held.update(members)
        return len(held) - before

    def _smembers(self, key: bytes) -> list[bytes]:
        return sorted(self._find(key) or ())

    def _sismember(self, key: bytes, member: bytes) -> int:
        return int(member in (self._find(key) or ()))

    def _srem(self, key: bytes, *members: bytes) -> int:
        held = self._find(key) or set()
        number = len(held & set(members))
        held -= set(members)
        if key in self._data and not held:
            del self._data[key]
        return number

    def _rpush(self, key: bytes, *items: bytes) -> int:
        held = self._make(key, list)
        held += items
        return len(held)

    def _llen(self, key: bytes) -> int:
        return len(self._find(key) or ())

    def _lindex(self, key: bytes, index: bytes) -> bytes | None:
        held = self._find(key) or []
        return held[int(index)] if -len(held) <= int(index) < len(held) else None

    def _lrange(self, key: bytes, first: bytes, last: bytes) -> list[bytes]:
        """To the end only."""
        held: list[bytes] = self._find(key) or []
        return held[int(first) :]

    def _zadd(self, key: bytes, score: bytes, member: bytes) -> int:
        held = self._make(key, ZSet)
        is_new = member not in held
        held[member] = float(score)
        return int(is_new)

    def _zrem(self, key: bytes, *members: bytes) -> int:
        held = self._find(key) or {}
        number = sum(held.pop(member, None) is not None for member in members)
        if key in self._data and not held:
            del self._data[key]
        return number

    def _zrange(self, key: bytes, low: bytes, high: bytes) -> list[tuple[bytes, float]]:
        held = self._find(key) or {}
        return sorted(held.items(), key=lambda item: (item[1], item[0]))

    # -- streams -----------------------------------------------------------------------------------------------------

    def _xadd(self, key: bytes, *args: bytes) -> bytes:
        rest = list(args)
        most = None
        if rest[0] == b"MAXLEN":
            most = int(rest[2] if rest[1] == b"~" else rest[1])
            rest = rest[3 if rest[1] == b"~" else 2 :]
        stream: Stream = self._make(key, Stream)
        stream.last = max((now_ms(), 0), (stream.last[0], stream.last[1] + 1))
        stream.entries[stream.last] = rest[1:]
        while most is not None and len(stream.entries) > most:
            del stream.entries[next(iter(stream.entries))]
        self.on_change(key)
        return show_id(stream.last)

    def _xlen(self, key: bytes) -> int:
        stream = self._find(key)
        return len(stream.entries) if stream else 0

    def _xdel(self, key: bytes, *ids: bytes) -> int:
        stream = self._find(key)
        return sum(stream.entries.pop(parse_id(i), None) is not None for i in ids) if stream else 0

    def _xrange(self, key: bytes, low: bytes, high: bytes, *options: bytes) -> list[list[Any]]:
        stream = self._find(key)
        after = parse_id(low[1:]) if low.startswith(b"(") else (-1, -1)
        found = [[show_id(i), fields] for i, fields in stream.entries.items() if i > after] if stream else []
        return found[: int(options[1])] if options else found

    def _xgroup(self, action: bytes, key: bytes, name: bytes, start: bytes, *options: bytes) -> bytes:
        stream: Stream = self._make(key, Stream)
        if name in stream.groups:
            raise ResponseError("BUSYGROUP Consumer Group name already exists")
        stream.groups[name] = Group(stream.last if start == b"$" else parse_id(start))
        return b"OK"

    def _group(self, key: bytes, name: bytes) -> tuple[Stream, Group]:
        stream = self._find(key)
        if stream is None or name not in stream.groups:
            raise ResponseError(f"NOGROUP No such key '{key.decode()}' or consumer group '{name.decode()}'")
        return stream, stream.groups[name]

    def _xreadgroup(self, name: bytes, consumer: bytes, count: bytes, *keys: bytes) -> list[list[Any]]:
        """Without blocking: that is the client's part."""
        found = []
        for key in keys:
            self._group(key, name)
        for key in keys:
            stream, group = self._group(key, name)
            ids = [i for i in stream.entries if i > group.last][: int(count)]
            for entry_id in ids:
                group.pending[entry_id] = Pending(consumer, now_ms(), 1)
                group.last = entry_id
            if ids:
                found.append([key, [[show_id(i), stream.entries[i]] for i in ids]])
        return found

    def _xack(self, key: bytes, name: bytes, *ids: bytes) -> int:
        stream = self._find(key)
        if stream is None or name not in stream.groups:
            return 0
        return sum(stream.groups[name].pending.pop(parse_id(i), None) is not None for i in ids)

    def _xpending(self, key: bytes, name: bytes, *args: bytes) -> list[Any]:
        _, group = self._group(key, name)
        if not args:
            return [len(group.pending)]  # and more that nobody reads
        idle_ms = 0
        if args[0].upper() == b"IDLE":
            idle_ms, args = int(args[1]), args[2:]
        low, high, count, consumer = (*args, b"")[:4]
        found = []
        for entry_id, held in sorted(group.pending.items()):
            if now_ms() - held.since_ms < idle_ms:
                continue
            is_between = (low == b"-" or parse_id(low) <= entry_id) and (high == b"+" or entry_id <= parse_id(high))
            if is_between and consumer in (b"", held.consumer):
                found.append([show_id(entry_id), held.consumer, now_ms() - held.since_ms, held.deliveries])
        return found[: int(count)]

    def _xclaim(self, key: bytes, name: bytes, consumer: bytes, min_idle: bytes, *args: bytes) -> list[bytes]:
        """Always with JUSTID: the entries' content is not asked for, and the delivery does not count."""
        _, group = self._group(key, name)
        ids = [arg for arg in args if b"-" in arg]
        options = list(args[len(ids) :])
        since, count = now_ms(), None
        if b"IDLE" in options:
            since -= int(options[options.index(b"IDLE") + 1])
        if b"RETRYCOUNT" in options:
            count = int(options[options.index(b"RETRYCOUNT") + 1])
        claimed = []
        for entry_id in map(parse_id, ids):
            held = group.pending.get(entry_id)
            if held is not None and now_ms() - held.since_ms >= int(min_idle):
                held.consumer, held.since_ms = consumer, since
                held.deliveries = held.deliveries if count is None else count
                claimed.append(show_id(entry_id))
        return claimed

    def _xautoclaim(
        self, key: bytes, name: bytes, consumer: bytes, min_idle: bytes, start: bytes, _: bytes, count: bytes
    ) -> list[Any]:
        stream, group = self._group(key, name)
        claimed: list[list[Any]] = []
        for entry_id in sorted(i for i in group.pending if i >= parse_id(start)):
            if len(claimed) == int(count):
                return [show_id(entry_id), claimed]
            held = group.pending[entry_id]
            if now_ms() - held.since_ms < int(min_idle):
                continue
            if entry_id not in stream.entries:
                del group.pending[entry_id]
                continue
            group.pending[entry_id] = Pending(consumer, now_ms(), held.deliveries + 1)
            claimed.append([show_id(entry_id), stream.entries[entry_id]])
        return [b"0-0", claimed]

    def run_script(self, text: str, keys: Sequence[Any], args: Sequence[Any]) -> Any:
        """Run one of Stillhouse's scripts."""
        lua, function = _compiled(text)
        _servers[:] = [self]
        tables = [lua.table_from([raw(value) for value in values]) for values in (keys, args)]
        try:
            answer = _answer(function(*tables))
            self.on_script(text, keys, args, answer)
            return answer
        except lua51.LuaError as error:
            raise ResponseError(str(error).partition("\n")[0]) from None


lupa: Any = lua51
_servers: list[RedisServer] = []


@cache
def _runtime() -> Any:
    lua = lupa.LuaRuntime(encoding=None, unpack_returned_tuples=True)
    make = lua.eval(
        b"function(run) unpack = unpack or table.unpack; redis = {}"
        b" redis.pcall = run"
        b" redis.call = function(...) local r = run(...)"
        b" if type(r) == 'table' and r.err then error(r.err, 0) end return r end end"
    )
    make(_call_from_lua)
    return lua


@cache
def _compiled(text: str) -> tuple[Any, Any]:
    lua = _runtime()
    return lua, lua.eval(b"function(KEYS, ARGV) " + text.encode() + b"\nend")


def _call_from_lua(*parts: Any) -> Any:
    try:
        answer = _servers[0].call(*parts)
    except ResponseError as error:
        return _runtime().table_from({b"err": str(error).encode()})
    return _to_lua(answer)


def _to_lua(value: Any) -> Any:
    if value is None:
        return False
    if isinstance(value, list):
        return _runtime().table_from([_to_lua(item) for item in value])
    if isinstance(value, tuple):  # a member with its score, which a script gets only when it asks for it
        return _to_lua(value[0])
    return value


def _answer(value: Any) -> Any:
    """What a script returns, as the client reads it."""
    if value is None or value is False:
        return None
    if lupa.lua_type(value) == "table":
        if value[b"err"] is not None:
            raise ResponseError(value[b"err"].decode())
        return [_answer(item) for item in value.values()]
    return int(value) if isinstance(value, float) else value
