#!/usr/bin/env python3
"""p2pchat: chat for a room full of machines on one network. One file, nothing to install.

    python p2pchat.py server                 # discovery server, port 9999: introduces peers to one another
    python p2pchat.py peer --user Alice      # the chat; works with no server, too

Peers talk directly to each other. The server only introduces them; when it is gone, gossip among the
peers keeps the network together. On the wire: TCP, one JSON object a line, UTF-8, at most 1 MiB,

    {"type": "MSG_CHAT", "sender_id": "Alice@192.168.1.10:10001", "to": "*", "content": "Hi!", "id": 7}

A peer's id is username@ip:port; beside it every process has a random `instance`. A link between two peers
opens with MSG_HELLO in both directions; chat messages on it are numbered (`id`) and acknowledged. Peers probe
each other, exchange what they know of others (gossip), and answer MSG_SYNC_PEERS_REQUEST from anyone.
README.md has the whole format.

One thread, one loop, and no call that blocks. The sections, each of which uses only what stands above it:

    constants          every tunable, with its unit and its reason
    text               what may be shown: cleaning, display width, wrapping
    messages           the codec: bytes in, checked messages out
    membership         who is there: records, merging, tombstones, digests
    loop               selectors, timers, connections, datagrams
    discovery server   DiscoveryServer
    peer node          PeerNode: links, delivery, failure detection, gossip; tells its interface by events
    chat view          the model behind the interfaces: messages, input line, commands, rendering
    interfaces         curses, plain lines, JSON lines
    command line       argparse and main()

It is not encrypted and has no passwords: whoever is on the network can read and can join.
"""

import argparse
import collections
import errno
import functools
import hashlib
import heapq
import ipaddress
import itertools
import json
import logging
import os
import random
import selectors
import signal
import socket
import sys
import time
import unicodedata
from typing import (
    Any,
    Callable,
    Deque,
    Dict,
    FrozenSet,
    Iterable,
    Iterator,
    List,
    NamedTuple,
    NoReturn,
    Optional,
    Sequence,
    Set,
    Tuple,
    Union,
)

__version__ = "1.0"

# ======================================================================================================
# Constants
#
# Facts of the protocol and bounds, each with its unit and why it has that value. Seconds and bytes,
# unless it says otherwise. What a user may change stands in Settings and ServerSettings instead, with
# the option of the same name on the command line.
# ======================================================================================================

DEFAULT_PORT = 9999  # the server's TCP port, and the UDP port on which everybody looks for everybody
LAN_GROUP = "239.255.99.99"  # multicast group of the beacons: administratively scoped, never routed on

# What one message may hold.
MAX_LINE = 1024 * 1024  # bytes of one message on the wire: room for a list of some 6,000 peers
MAX_TEXT = 16 * 1024  # bytes of UTF-8 in one chat text: several screenfuls of code
MAX_NAME = 32  # characters of a user name
MAX_ID = 128  # characters of a peer id: a name, an address and a port, with room to spare
MAX_PEERS = 4096  # records in a list, on the wire as in memory: about 1 KiB each in memory
MAX_INCARNATION = 2**53 - 1  # the largest integer that every JSON parser keeps
MAX_RAISE = 1 << 20  # how far hearsay may raise a known incarnation: owners raise theirs one by one

# Connections.
RECEIVE_SIZE = 256 * 1024  # read from a socket at a time: big enough to be fast, small enough to be fair
SEND_SIZE = 256 * 1024  # joined into one send: as much as a socket's buffer takes at once
MAX_OUTPUT = 8 * 1024 * 1024  # owed to a reader that does not read: past it, it is cut off
STALL_TIMEOUT = 10.0  # so long may output wait without a byte of it being taken
LINE_TIMEOUT = 10.0  # so long may a message be half there
DRAIN_TIMEOUT = 3.0  # so long may a closing connection take to deliver its last words
ACCEPT_BATCH = 128  # connections accepted in one turn: a burst of 1,000 is in after eight turns
ACCEPT_PAUSE = 0.5  # when descriptors are used up, accepting rests so long
MAX_STRANGERS = 1500  # connections from one address that have not yet said who they are

# Membership (SWIM with Lifeguard's lessons; the times of the design).
PROBE_INTERVAL = 2.0  # between two probes of a neighbour: two may be lost before it counts as quiet
NEIGHBOURS = 2  # peers that each peer probes; as many others probe it
QUIET_AFTER = 5.0  # silence after which a neighbour is marked quiet and others are asked to try
SUSPICION = 6.0  # further silence after which it is gone: 11 s after its last sign of life
REFUSED_SUSPICION = 3.0  # the same when its address refuses connections: time for others to say it lives
HEARSAY_SUSPICION = 2.5  # somebody says that it is gone: time for its own answer to a probe
PROBE_HELPERS = 3  # peers asked to try one that we cannot reach
TOMBSTONE_TIME = 3600.0  # how long a removed peer is remembered, so that no old list brings it back
RETRY_INTERVAL = 5.0  # between two tries of a lost peer, one at random: halves of a cut network meet again
NEWS_INTERVAL = 0.2  # between two rounds of passing on news (memberlist's gossip interval)
NEWS_FANOUT = 3  # peers told in one round
NEWS_ROUNDS = 4  # times an item is sent on, times the number of digits of the number of peers
NEWS_BATCH = 200  # items told at a time: some 30 KiB
CLOCK_JUMP = 10.0  # a clock that is so far off says that the machine slept

# Links between peers.
IDLE_LINKS = 64  # links kept open without being used; some fifty peers are all linked to each other
IDLE_TIME = 30.0  # unused for so long, a link beyond that number is closed
MAX_DIALS = 64  # connections being opened at once
HELLO_TIME = 10.0  # a connection to a peer that has not said who it is by then is closed

# Delivery.
OUTBOX_MESSAGES = 50_000  # waiting for one receiver's acknowledgement
OUTBOX_BYTES = 4 * 1024 * 1024  # the same in bytes
UNREACHABLE_TIME = 15.0  # others say it lives, but we find no way to it: then its messages have failed
CUT_OFF_FACTOR = 4  # sending so many times one's budget, all refused, ends the connection
BAN_TIME = 60.0  # and no other is accepted from that instance for so long

# Discovery.
NEWS_GATHER = 0.01  # the server gathers joins and leaves for so long and sends them as one message
RETRY_SERVER_MIN, RETRY_SERVER_MAX = 1.0, 20.0  # between two tries to reach the server: doubled each time
SETTLE_TIME = 2.0  # whoever is on the local network has answered by then
BEACON_ALONE, BEACON_SETTLED = 1.0, 10.0  # between two beacons, alone and in company
BEACON_SIZE = 512  # bytes; every beacon is padded to it, so an answer is never longer than its question
MAX_BEACON_DIALS = 8  # connections under way that beacons led to
BEACON_ANSWERS = 20  # answered in one second, at most

LOG_REPEATS = 20  # lines of one kind that bad input may cause in a minute: nobody fills a disk with them

Address = Tuple[str, int]
Event = Dict[str, Any]  # what --json prints, without the time
Message = Dict[str, Any]

log = logging.getLogger("p2pchat")


class ServerSettings(NamedTuple):
    """What a discovery server can be told; seconds."""

    host: str = "0.0.0.0"  # where it listens
    port: int = DEFAULT_PORT
    heartbeat_timeout: float = 30.0  # a peer silent for so long is dropped
    check_interval: float = 10.0  # how often silence is looked for: what a drop may be late by
    lan: bool = True  # answers to peers that look for a server on the local network


class Settings(NamedTuple):
    """What a peer can be told; seconds and bytes."""

    username: Optional[str] = None  # None: the interface asks
    server: Optional[Address] = None  # None: 127.0.0.1:9999, and those found on the local network
    host: str = "0.0.0.0"  # where it listens; a concrete address is also the one it is known by
    port: int = 0  # 0: chosen by the system
    heartbeat_interval: float = 10.0  # to the server; it drops who is silent for its own timeout
    gossip_interval: float = 5.0  # one random peer is asked each time; less converges faster and costs more
    timeout: float = 5.0  # for a peer connection to open and answer, and for leaving
    join: Tuple[Address, ...] = ()  # peers or servers named by hand
    lan: bool = True  # looks for others on the local network
    budget: int = 1024 * 1024  # bytes of chat accepted from one sender a minute; 0: no limit
    log_file: Optional[str] = None


# ======================================================================================================
# Text
#
# What may be shown, and how wide it is. Every name and text from the network goes through clean(), once,
# as it comes in: what is left can be read, and do nothing else. Widths are those on which terminals agree;
# where they don't (joined emoji, skin tones, characters that this Python does not know) a glyph is clipped to
# the part that is certain, so that no line spills. Pure functions, no state.
# ======================================================================================================

MAX_MARKS = 6  # combining marks on one character: Hebrew and Tibetan need four or five

_ZWNJ, _ZWJ, _TEXT_STYLE, _EMOJI_STYLE, _UNKNOWN = "\u200c", "\u200d", "\ufe0e", "\ufe0f", "\ufffd"
_JOINERS = _ZWNJ + _ZWJ
_INVISIBLE = frozenset(map(chr, (
    0x034F, 0x115F, 0x1160, 0x17B4, 0x17B5, 0x2065, 0x3164, 0xFFA0, *range(0xFE00, 0xFE0E), *range(0xFFF0, 0xFFF9))))
_JOINING_SCRIPTS = ((0x0600, 0x0DFF), (0x1000, 0x109F), (0x1780, 0x18AF), (0xA840, 0xA87F), (0xFB50, 0xFDFF),
                    (0xFE70, 0xFEFE), (0x11000, 0x114DF))  # Arabic, Indic, Myanmar, Khmer, Mongolian


def clean(text: str, newlines: bool = False) -> str:
    """Return a text that can only be read: no controls, no direction overrides, nothing hidden.

    With `newlines`, line breaks and tabs stay; else they become blanks. Control characters become pictures."""
    if text.isascii() and text.isprintable():
        return text
    if newlines:
        text = text.replace("\r\n", "\n").translate(_LINES)
    else:
        text = text.translate(_ONE_LINE)
    return text if text.isascii() else _clean_in_context("".join(map(_replacement, text)))


def check_username(name: str) -> str:
    """Return the name as it is used (NFC). Raises ValueError with a sentence that says what would be right."""
    if not name.strip():
        raise ValueError(f"A name is needed: 1 to {MAX_NAME} characters.")
    if name != name.strip():
        raise ValueError("A name may not begin or end with a blank.")
    name = unicodedata.normalize("NFC", name) if not _has_surrogates(name) else name
    if len(name) > MAX_NAME:
        raise ValueError(f"A name may have at most {MAX_NAME} characters; this one has {len(name)}.")
    for character in "@*":
        if character in name:
            raise ValueError(f"A name may not hold {character!r}; letters, digits and blanks are fine.")
    blanks = any(character.isspace() and character != " " for character in name)
    if blanks or clean(name) != name or _UNKNOWN in name:
        raise ValueError("A name may hold only characters that can be shown, no control or invisible ones.")
    if not any(unicodedata.category(character)[0] in "LNPSC" and character != "\u2800" for character in name):
        raise ValueError("A name needs a letter, digit or symbol that can be seen.")
    return name


def graphemes(text: str) -> List[str]:
    """Cut a text into what a reader takes for one character: a base and its marks, an emoji sequence, a flag."""
    if text.isascii():
        return list(text)
    clusters: List[str] = []
    for character in text:
        if clusters and _extends(clusters[-1], character):
            clusters[-1] += character
        else:
            clusters.append(character)
    return clusters


def width(text: str) -> int:
    """Columns that a text takes on a terminal."""
    if text.isascii():
        return len(text)
    return sum(glyph(cluster)[1] for cluster in graphemes(text))


def cut(text: str, cols: int, mark: str = "") -> str:
    """The beginning of a text that fits into so many columns; where something is missing, it ends with `mark`."""
    if text.isascii() and len(text) <= cols:
        return text
    if width(text) <= cols:
        return "".join(glyph(cluster)[0] for cluster in graphemes(text))
    room = cols - width(mark) if width(mark) < cols else cols
    return _fitting(graphemes(text), room)[0] + (mark if room < cols else "")


def pad(text: str, cols: int) -> str:
    """A text cut or filled with blanks to exactly so many columns."""
    text = cut(text, cols)
    return text + " " * (cols - width(text))


def wrap(text: str, cols: int) -> List[str]:
    """Lines of at most `cols` columns, broken between words, or within those that are longer than a line."""
    lines: List[str] = []
    for line in text.split("\n"):
        line = line.expandtabs(4).rstrip()
        if width(line) <= cols:
            lines.append(cut(line, cols))
        else:
            lines += _wrap_line(graphemes(line), max(1, cols))
    return lines


@functools.lru_cache(maxsize=8192)
def glyph(cluster: str) -> Tuple[str, int]:
    """What is drawn for a cluster, and its columns: the part of it on whose width terminals agree."""
    base = cluster[0]
    category = unicodedata.category(base)
    if category in ("Cn", "Co", "Cc", "Cs"):
        return _UNKNOWN, 1
    columns = 2 if unicodedata.east_asian_width(base) in "WF" else 0 if category in ("Mn", "Me", "Cf") else 1
    if _is_flag(base):
        return (cluster, 2) if len(cluster) == 2 else (_UNKNOWN, 1)
    if _is_pictograph(base):
        return base, columns
    rest = [character for character in cluster[1:] if character not in (_EMOJI_STYLE, _TEXT_STYLE)]
    spacing = sum(unicodedata.category(character) == "Mc" for character in rest)
    return base + "".join(rest), columns + spacing


def _wrap_line(clusters: List[str], cols: int) -> List[str]:
    """One line that is too long. A break eats the blanks around it; a word longer than a line is cut."""
    lines = []
    while clusters:
        piece, count = _fitting(clusters, cols)
        if count < len(clusters) and not clusters[count].isspace():
            blank = next((at for at in range(count - 1, 0, -1) if clusters[at].isspace()), 0)
            wide = next((at for at in range(count, 0, -1) if glyph(clusters[at - 1])[1] == 2), 0)
            count = max(blank + 1 if blank else 0, wide) or count  # ideographs are words by themselves
            piece = _fitting(clusters[:count], cols)[0]
        lines.append(piece.rstrip())
        while count < len(clusters) and clusters[count] == " ":
            count += 1
        clusters = clusters[count:]
    return lines


def _fitting(clusters: List[str], cols: int) -> Tuple[str, int]:
    """As many clusters as fit, as they are drawn, and how many those are: at least one, even if it can't be drawn."""
    used, drawn = 0, []
    for cluster in clusters:
        text, columns = (cluster, 1) if cluster.isascii() else glyph(cluster)
        if used + columns > cols:
            break
        used += columns
        drawn.append(text)
    return "".join(drawn), len(drawn) or 1


def _clean_in_context(text: str) -> str:
    """Take out joiners and styles where nothing needs them, and marks beyond what a character can carry."""
    kept: List[str] = []
    marks = 0
    for position, character in enumerate(text):
        before = kept[-1] if kept else "\n"
        if character in _JOINERS:
            if not _joins(character, before, text[position + 1:position + 2]):
                continue
        elif character in (_TEXT_STYLE, _EMOJI_STYLE):
            if not (_is_pictograph(before) or before in "0123456789#*©®"):
                continue
        elif unicodedata.category(character)[0] == "M":
            marks += 1
            if marks > MAX_MARKS:
                continue
            if before == "\n":
                kept.append("\u25cc")  # a mark with nothing to stand on would stand on our own text
        else:
            marks = 0
        kept.append(character)
    return "".join(kept)


def _joins(joiner: str, before: str, after: str) -> bool:
    """Whether a joiner means something here: between emoji, or within a script that is written with it."""
    if not after:
        return False
    if joiner == _ZWJ and _is_pictograph(after):
        return _is_pictograph(before) or before == _EMOJI_STYLE
    return _in_joining_script(before) and (_in_joining_script(after) or after.isspace())


def _in_joining_script(character: str) -> bool:
    return any(first <= ord(character) <= last for first, last in _JOINING_SCRIPTS)


def _is_pictograph(character: str) -> bool:
    return "\U0001f000" <= character <= "\U0001faff" or "\u2190" <= character <= "\u2bff"


def _is_flag(character: str) -> bool:
    """Whether it is one of the letters of which two make a flag."""
    return "\U0001f1e6" <= character <= "\U0001f1ff"


def _extends(cluster: str, character: str) -> bool:
    """Whether a character belongs to the cluster before it."""
    if character.isascii() or cluster == "\n":
        return False
    if character in _JOINERS or unicodedata.category(character)[0] == "M":
        return True
    if "\U0001f3fb" <= character <= "\U0001f3ff":  # skin tones
        return _is_pictograph(cluster[0])
    if _is_flag(character):
        return len(cluster) == 1 and _is_flag(cluster)
    if cluster[-1] == _ZWJ:
        return _is_pictograph(character)
    return "\u1160" <= character <= "\u11ff" and "\u1100" <= cluster[0] <= "\u11ff"  # the parts of a Korean syllable


def _has_surrogates(text: str) -> bool:
    return any("\ud800" <= character <= "\udfff" for character in text)


@functools.lru_cache(maxsize=4096)
def _replacement(character: str) -> str:
    """What stands for a character in a cleaned text, wherever it stands."""
    if character in _INVISIBLE or "\U000e0000" <= character <= "\U000e0fff":
        return ""
    category = unicodedata.category(character)
    if category == "Cf":
        return character if character in _JOINERS else ""
    if category in ("Cs", "Co") or (category == "Cc" and character not in "\n\t"):
        return _UNKNOWN
    if category == "Cn" and (ord(character) & 0xFFFE == 0xFFFE or "\ufdd0" <= character <= "\ufdef"):
        return _UNKNOWN  # never to be assigned; others may be assigned in a newer Unicode than ours
    return character


# The control characters below 128 have pictures of their own, which start at U+2400.
_LINES: Dict[int, Any] = {**{code: chr(0x2400 + code) for code in range(32)}, 127: "\u2421", 9: "\t", 10: "\n",
                          13: "\n", 0x85: "\n", 0x2028: "\n", 0x2029: "\n"}
_ONE_LINE: Dict[int, Any] = {**_LINES, **{code: " " for code in (9, 10, 13, 0x85, 0x2028, 0x2029)}}


# ======================================================================================================
# Messages
#
# The codec: bytes in, checked messages out, and the other way round. It knows no sockets and no time.
# Whatever bytes come in, the one exception that leaves this section is BadMessage; anything else is a
# bug of ours. A message that left it has the four keys, in the right types, and the content that its
# type asks for. What its claims are worth is for others to judge.
# ======================================================================================================

MSG_REGISTER = "MSG_REGISTER"
MSG_REGISTER_ACK = "MSG_REGISTER_ACK"
MSG_HEARTBEAT = "MSG_HEARTBEAT"
MSG_UNREGISTER = "MSG_UNREGISTER"
MSG_PEER_LIST_UPDATE = "MSG_PEER_LIST_UPDATE"
MSG_CHAT = "MSG_CHAT"
MSG_CHAT_ACK = "MSG_CHAT_ACK"
MSG_CHAT_REFUSED = "MSG_CHAT_REFUSED"
MSG_SYNC_PEERS_REQUEST = "MSG_SYNC_PEERS_REQUEST"
MSG_SYNC_PEERS_RESPONSE = "MSG_SYNC_PEERS_RESPONSE"
MSG_PEER_NEWS = "MSG_PEER_NEWS"
MSG_HELLO = "MSG_HELLO"
MSG_PROBE = "MSG_PROBE"
MSG_PROBE_ACK = "MSG_PROBE_ACK"
MSG_PROBE_REQUEST = "MSG_PROBE_REQUEST"
MSG_PROBE_RESULT = "MSG_PROBE_RESULT"
MSG_BEACON = "MSG_BEACON"
MSG_ERROR = "MSG_ERROR"

EVERYONE = "*"  # in `to`: meant for all
ALIVE, SUSPECT, DEAD, LEFT = "alive", "suspect", "dead", "left"  # a record's status, weakest word first
RANK = {ALIVE: 0, SUSPECT: 1, DEAD: 2, LEFT: 3}  # at the same incarnation the higher one wins


class BadMessage(ValueError):
    """Bytes that are not a valid message; the text says why, in words for the one who sent them."""


def create_message(msg_type: str, sender_id: str, content: Any, to: str = EVERYONE, **extra: Any) -> bytes:
    """Return one message as the bytes that go on the wire, its newline included.

    Raises ValueError for what JSON cannot hold or what is longer than MAX_LINE."""
    message = {"type": msg_type, "sender_id": sender_id, "to": to, "content": content}
    message.update(extra)
    data = _ENCODER.encode(message).encode("ascii") + b"\n"
    if len(data) > MAX_LINE:
        raise ValueError(f"a message of {len(data)} bytes is longer than {MAX_LINE}")
    return data


def create_chat(sender_id: str, text: str, to: str, sequence: int) -> bytes:
    """The same for a chat message: what is sent most is not encoded by the general way."""
    quote = json.encoder.encode_basestring_ascii
    line = f'{{"type":"MSG_CHAT","sender_id":{quote(sender_id)},"to":{quote(to)},"content":{quote(text)},"id":{sequence}}}\n'
    return line.encode("ascii")


def create_raw(msg_type: str, sender_id: str, to: str, content: str) -> bytes:
    """The same for a content that is JSON already: what goes to a thousand is encoded once."""
    head = f'{{"type":"{msg_type}","sender_id":{json.dumps(sender_id)},"to":{json.dumps(to)},"content":'
    return f"{head}{content}}}\n".encode("ascii")


def in_lists(encoded: Iterable[str]) -> List[str]:
    """Join encoded records by commas into as few texts as messages can hold: one, nearly always, and never none."""
    lists: List[List[str]] = [[]]
    size = 0
    for record in encoded:
        if size + len(record) > MAX_LINE - 1024 and lists[-1]:
            lists.append([])
            size = 0
        lists[-1].append(record)
        size += len(record) + 1
    return [",".join(records) for records in lists]


def parse_message(data: bytes) -> Optional[Message]:
    """Return the message that `data` is, with or without its newline; None if it is not one valid message."""
    try:
        return parse_line(data)
    except BadMessage:
        return None


def parse_line(line: bytes) -> Message:
    """Return the message on one line. Raises BadMessage, which says what is wrong."""
    if len(line) > MAX_LINE:
        raise BadMessage(f"longer than {MAX_LINE} bytes")
    try:
        text = line.decode("utf-8").strip(_BLANKS)
    except UnicodeDecodeError:
        raise BadMessage("not UTF-8") from None
    if "\n" in text:
        raise BadMessage("more than one line")
    message, end = _decode(text, 0)
    if end != len(text):
        raise BadMessage("more than one JSON value on a line")
    return _checked(message)


class MessageReader:
    """Cuts a stream of bytes into messages, however the stream was cut into pieces."""

    __slots__ = ("_partial", "error")

    def __init__(self) -> None:
        self._partial = bytearray()
        self.error: Optional[str] = None  # once set, the stream is spoilt and nothing more comes out

    @property
    def partial(self) -> int:
        """How many bytes of an unfinished message are held."""
        return len(self._partial)

    def feed(self, data: bytes) -> List[Message]:
        """Take the next piece; return the messages that it completes, those before a bad one included."""
        if self.error is not None:
            return []
        cut = data.rfind(b"\n") + 1
        complete = bytes(self._partial) + data[:cut] if cut else b""
        if cut:
            self._partial = bytearray(data[cut:])
        else:
            self._partial += data
        messages = self._messages(complete)
        if len(self._partial) > MAX_LINE:
            self._spoil(f"longer than {MAX_LINE} bytes")
        return messages

    def finish(self) -> List[Message]:
        """The stream has ended, which ends a message too."""
        return self.feed(b"\n") if self._partial else []

    def _messages(self, data: bytes) -> List[Message]:
        """Parse whole lines: decoded at once, each message where the one before it ended."""
        try:
            text = data.decode("utf-8")
        except UnicodeDecodeError:
            return self._one_by_one(data)
        messages: List[Message] = []
        position, length = 0, len(text)
        try:
            while position < length:
                newline = text.find("\n", position)
                if newline - position > MAX_LINE:
                    raise BadMessage(f"longer than {MAX_LINE} bytes")
                if text[position] == "{":
                    message, end = _decode(text, position)
                    if end != newline:  # something behind it, or a value that spans lines
                        message = parse_line(text[position:newline].encode("utf-8"))
                    messages.append(_checked(message))
                elif text[position:newline].strip(_BLANKS):  # an empty line is nothing
                    messages.append(parse_line(text[position:newline].encode("utf-8")))
                position = newline + 1
        except BadMessage as error:
            self._spoil(str(error))
        return messages

    def _one_by_one(self, data: bytes) -> List[Message]:
        """The slow way, for a buffer that is not UTF-8 throughout: what comes before the bad line counts."""
        messages: List[Message] = []
        try:
            for line in data.split(b"\n"):
                if line.strip():
                    messages.append(parse_line(line))
        except BadMessage as error:
            self._spoil(str(error))
        return messages

    def _spoil(self, reason: str) -> None:
        self.error = reason
        self._partial = bytearray()


def _checked(message: Any) -> Message:
    """Return a decoded value if it is a valid message, with the content that its type asks for."""
    if type(message) is not dict:
        raise BadMessage("not a JSON object")
    try:
        kind, sender, to, content = message["type"], message["sender_id"], message["to"], message["content"]
    except KeyError as key:
        raise BadMessage(f"no {key.args[0]!r} in it") from None
    if not (type(kind) is type(sender) is type(to) is str):
        raise BadMessage("type, sender_id and to must be strings")
    if len(kind) > MAX_ID or len(sender) > MAX_ID or len(to) > MAX_ID:
        raise BadMessage(f"type, sender_id or to longer than {MAX_ID} characters")
    check = _CONTENT_CHECKS.get(kind)
    if check is not None:
        check(message, content)
    return message


def _decode(text: str, position: int) -> Tuple[Any, int]:
    """One JSON value of `text` and where it ends. Whatever the parser raises becomes BadMessage."""
    try:
        return _DECODER.raw_decode(text, position)
    except BadMessage:
        raise
    except (ValueError, RecursionError, MemoryError) as error:
        raise BadMessage("nested too deep" if isinstance(error, RecursionError) else "not JSON") from None


def _no_constant(name: str) -> Any:
    raise BadMessage(f"{name} is not JSON")


def _short_int(digits: str) -> int:
    if len(digits) > 20:
        raise BadMessage("a number of more than 20 digits")
    return int(digits)


def _short_float(digits: str) -> float:
    if len(digits) > 40 or float(digits) in (float("inf"), float("-inf")):
        raise BadMessage("a number that is too large")
    return float(digits)


_BLANKS = " \t\r\n"
_ENCODER = json.JSONEncoder(separators=(",", ":"), allow_nan=False)
_DECODER = json.JSONDecoder(parse_constant=_no_constant, parse_int=_short_int, parse_float=_short_float)


# What each type's content must be. A check raises BadMessage with the key and what would be right.


def need(condition: bool, what: str) -> None:
    """Raise BadMessage, saying what was expected, unless the condition holds."""
    if not condition:
        raise BadMessage(what)


def is_count(value: Any, most: int = MAX_INCARNATION) -> bool:
    """Whether a JSON value is an integer from 0 to `most` (True is none)."""
    return type(value) is int and 0 <= value <= most


def is_status(value: Any) -> bool:
    """Whether a JSON value is one of the words for a record's status."""
    return type(value) is str and value in RANK


def is_port(value: Any) -> bool:
    """Whether a JSON value is a TCP port that can be dialled."""
    return is_count(value, 65535) and value > 0


@functools.lru_cache(maxsize=MAX_PEERS)
def is_username(name: str) -> bool:
    """Whether a name is one that may be used, in just this spelling."""
    try:
        return check_username(name) == name
    except ValueError:
        return False


@functools.lru_cache(maxsize=MAX_PEERS)
def is_peer_ip(ip: str) -> bool:
    """Whether a text is an IPv4 address that one machine can have."""
    try:
        address = ipaddress.IPv4Address(ip)
    except ValueError:
        return False
    reserved = address.is_multicast or address.is_unspecified or address.is_reserved
    return not reserved and str(address) == ip


def is_loopback(ip: str) -> bool:
    """Whether an address never leaves its machine."""
    return ip.startswith("127.")


def split_id(peer_id: str) -> Optional[Tuple[str, str, int]]:
    """(username, ip, port) of a peer id; None if it is not one."""
    username, at, address = peer_id.rpartition("@")
    ip, colon, port = address.rpartition(":")
    if not (at and colon and port.isascii() and port.isdigit() and len(port) <= 5):
        return None
    valid = is_username(username) and is_peer_ip(ip) and is_port(int(port)) and str(int(port)) == port
    return (username, ip, int(port)) if valid else None


def check_peer(peer: Any) -> None:
    """A peer on the wire: its id must be made of its own parts; what membership adds may be missing."""
    need(type(peer) is dict, "a peer must be an object")
    username, ip, port = peer.get("username"), peer.get("ip"), peer.get("port")
    need(type(username) is str and is_username(username), "a peer's username must be 1 to 32 characters that can be shown")
    need(type(ip) is str and is_peer_ip(ip), "a peer's ip must be the IPv4 address of one machine")
    need(is_port(port), "a peer's port must be 1 to 65535")
    need(peer.get("id") == f"{username}@{ip}:{port}", "a peer's id must be username@ip:port")
    _check_identity(peer)
    need(is_status(peer.get("status", ALIVE)), "a peer's status must be alive, suspect, dead or left")
    need(is_count(peer.get("age", 0)), "a peer's age must be a number of seconds")


def _check_identity(content: Dict[str, Any]) -> None:
    instance = content.get("instance", "")
    need(type(instance) is str and len(instance) <= 32 and instance.isascii() and (not instance or instance.isalnum()),
         "an instance must be at most 32 letters and digits")
    need(is_count(content.get("incarnation", 0)), "an incarnation must be an integer from 0 to 2**53 - 1")


def _check_peers(peers: Any, what: str) -> None:
    need(type(peers) is list and len(peers) <= MAX_PEERS, f"{what} must be a list of at most {MAX_PEERS} peers")
    for peer in peers:
        check_peer(peer)


def _check_chat(message: Message, text: Any) -> None:
    if type(text) is not str:
        raise BadMessage("the content of MSG_CHAT must be a text")
    if len(text) > MAX_TEXT // 4 and len(text.encode("utf-8", "surrogatepass")) > MAX_TEXT:
        raise BadMessage(f"a text longer than {MAX_TEXT} bytes")
    if not is_count(message.get("id", 0)):
        raise BadMessage("the id of MSG_CHAT must be an integer from 0 to 2**53 - 1")


def _check_upto(message: Message, content: Any) -> None:
    need(type(content) is dict and is_count(content.get("upto")), "content must be {\"upto\": a message's id}")


def _check_refused(message: Message, content: Any) -> None:
    need(type(content) is dict and is_count(content.get("id")) and is_count(content.get("upto"))
         and type(content.get("reason")) is str and len(content["reason"]) <= MAX_TEXT,
         'content must be {"id": first, "upto": last, "reason": words}')


def _check_register(message: Message, content: Any) -> None:
    need(type(content) is dict, 'content must be {"username", "port"}')
    username = content.get("username")
    need(type(username) is str, "username must be a text")
    need(is_username(username), "username must be 1 to 32 characters that can be shown, without @")
    need(is_port(content.get("port")), "port must be an integer from 1 to 65535")
    _check_identity(content)


def _check_register_ack(message: Message, content: Any) -> None:
    need(type(content) is dict and type(content.get("peer_id")) is str and split_id(content["peer_id"]) is not None,
         'content must be {"peer_id": username@ip:port, "peer_list"}')
    _check_peers(content.get("peer_list"), "peer_list")


def _check_update(message: Message, content: Any) -> None:
    need(type(content) is dict, 'content must be {"joined": [...], "left": [...]}')
    _check_peers(content.get("joined"), "joined")
    left = content.get("left")
    need(type(left) is list and len(left) <= MAX_PEERS, "left must be a list")
    for gone in left:
        need(type(gone) is dict and type(gone.get("id")) is str and split_id(gone["id"]) is not None
             and type(gone.get("reason", "")) is str, 'left must hold {"id", "reason"}')
        _check_identity(gone)


def _check_sync_request(message: Message, content: Any) -> None:
    need(content is None or type(content) is dict, "content must be null or {\"digest\"}")
    digest = (content or {}).get("digest", "")
    need(type(digest) is str and len(digest) <= 64, "digest must be a short text")


def _check_sync_response(message: Message, content: Any) -> None:
    need(type(content) is dict, 'content must be {"peer_list": [...]}')
    _check_peers(content.get("peer_list"), "peer_list")


def _check_news(message: Message, content: Any) -> None:
    need(type(content) is dict, 'content must be {"peers": [...]}')
    _check_peers(content.get("peers"), "peers")


def _check_hello(message: Message, content: Any) -> None:
    need(type(content) is dict, 'content must be {"peer": {...}}')
    check_peer(content.get("peer"))
    need(bool(content["peer"].get("instance")), "a peer that says hello must have an instance")
    you = content.get("you", {})
    need(type(you) is dict and type(you.get("ip", "")) is str and len(you.get("ip", "")) <= MAX_ID,
         "you must be an object with the ip that was seen")
    need(is_count(you.get("above", 0)), "above must be an incarnation")


def _check_probe(message: Message, content: Any) -> None:
    need(type(content) is dict and is_count(content.get("number")), 'content must be {"number"}')
    need(is_count(content.get("incarnation", 0)) and is_status(content.get("status", ALIVE)),
         "incarnation or status is wrong")


def _check_probe_about(message: Message, content: Any) -> None:
    need(type(content) is dict, 'content must be {"peer": {...}}')
    check_peer(content.get("peer"))


def _check_beacon(message: Message, content: Any) -> None:
    need(type(content) is dict and is_port(content.get("port")) and content.get("role") in ("peer", "server"),
         'content must be {"role": "peer" or "server", "port"}')
    _check_identity(content)


def _check_error(message: Message, content: Any) -> None:
    need(type(content) is dict and type(content.get("reason")) is str, 'content must be {"reason": words}')


_CONTENT_CHECKS: Dict[str, Callable[[Message, Any], None]] = {
    MSG_REGISTER: _check_register,
    MSG_REGISTER_ACK: _check_register_ack,
    MSG_PEER_LIST_UPDATE: _check_update,
    MSG_CHAT: _check_chat,
    MSG_CHAT_ACK: _check_upto,
    MSG_CHAT_REFUSED: _check_refused,
    MSG_SYNC_PEERS_REQUEST: _check_sync_request,
    MSG_SYNC_PEERS_RESPONSE: _check_sync_response,
    MSG_PEER_NEWS: _check_news,
    MSG_HELLO: _check_hello,
    MSG_PROBE: _check_probe,
    MSG_PROBE_ACK: _check_probe,
    MSG_PROBE_REQUEST: _check_probe_about,
    MSG_PROBE_RESULT: _check_probe_about,
    MSG_BEACON: _check_beacon,
    MSG_ERROR: _check_error,
}


# ======================================================================================================
# Membership
#
# Who is there. A *record* is what is said of a peer on the wire; a *Peer* is what we hold of it; a
# *tombstone* is a Peer that is gone. The rules are SWIM's (Das, Gupta, Motivala 2002) as HashiCorp's
# memberlist runs them, with one change: hearsay adds peers, but it removes none. An accusation (suspect,
# dead, left) by somebody else only makes us ask the accused, who may live to deny it. So one liar, or one
# bad cable, empties nobody's list. Pure: time and randomness come in as arguments, changes go out as lists.
# ======================================================================================================

JOINED, GONE, RENAMED = "joined", "left", "renamed"  # kinds of Change: the events that they become

# What became of a record that was heard.
NEW = "new"  # it changed the list, and is worth passing on
KNOWN = "known"  # nothing new
STALE = "stale"  # we know better: the one who said it should be told
ACCUSED = "accused"  # it says that a peer is gone whom we hold to be there: ask it
CONFLICT = "conflict"  # another instance at an id that is taken: look which one answers there
IMPLAUSIBLE = "implausible"  # not believed, not answered


class Peer:
    """A peer as we know it. Times are seconds on the loop's clock."""

    __slots__ = ("username", "ip", "port", "id", "instance", "incarnation", "status", "added", "heard",
                 "vouched", "unverified", "removed", "quiet", "rtt", "_public", "_weight", "_ring")

    def __init__(self, username: str, ip: str, port: int, instance: str = "", incarnation: int = 0) -> None:
        self.instance = instance  # drawn at random by its process; "" for a program that has none
        self.incarnation = incarnation  # raised by its owner only
        self.status = ALIVE
        self.added = 0.0  # when we learned of it
        self.heard = 0.0  # when it last spoke to us itself; 0 for never
        self.vouched = 0.0  # when somebody last said to have heard it
        self.unverified: Optional[float] = None  # since when nobody could vouch for it: our network was gone
        self.removed = 0.0  # when it went: for tombstones
        self.quiet = False
        self.rtt: Optional[float] = None
        self.place(username, ip, port)

    @classmethod
    def from_wire(cls, record: Dict[str, Any]) -> "Peer":
        """The peer that a checked record describes."""
        return cls(record["username"], record["ip"], record["port"],
                   record.get("instance", ""), record.get("incarnation", 0))

    def place(self, username: str, ip: str, port: int) -> None:
        """Give it a name and an address."""
        self.username, self.ip, self.port = username, ip, port
        self.id = f"{username}@{ip}:{port}"
        self._public: Optional[Dict[str, Any]] = None
        self._weight: Optional[Tuple[int, int]] = None
        self._ring: Optional[int] = None

    @property
    def key(self) -> str:
        """What it is remembered by: its instance, or for want of one its id."""
        return self.instance or self.id

    @property
    def address(self) -> Address:
        """Where it can be dialled."""
        return self.ip, self.port

    @property
    def public(self) -> Dict[str, Any]:
        """What the interfaces are told of it. Shared: not to be changed."""
        if self._public is None:
            self._public = {"id": self.id, "ip": self.ip, "port": self.port, "username": self.username}
        return self._public

    @property
    def weight(self) -> int:
        """Its share in the digest of a list."""
        if self._weight is None or self._weight[0] != self.incarnation:
            self._weight = (self.incarnation, hash64(f"{self.id} {self.instance} {self.incarnation}"))
        return self._weight[1]

    @property
    def ring(self) -> int:
        """Its place on the ring that decides who probes whom: the same for everybody."""
        if self._ring is None:
            self._ring = hash64(self.id)
        return self._ring

    @property
    def gone(self) -> bool:
        """Whether this is a tombstone."""
        return self.status in (DEAD, LEFT)

    def last_sign(self) -> float:
        """When there was last a sign of life, from itself or through others."""
        return max(self.added, self.heard, self.vouched)

    def wire(self, now: float, status: Optional[str] = None) -> Dict[str, Any]:
        """The record to send. Ages travel, never times of day: clocks differ."""
        record = dict(self.public, instance=self.instance, incarnation=self.incarnation)
        status = status or self.status
        if status != ALIVE:
            record["status"] = status
        since = self.removed if self.gone else self.unverified
        if since is not None:
            record["age"] = max(0, int(now - since))
        return record


class Change(NamedTuple):
    """What happened to the list: `old` is how a renamed peer was known, `reason` why one left."""

    kind: str
    peer: Peer
    reason: str = ""
    old: Optional[Dict[str, Any]] = None


Heard = Tuple[str, Peer, List[Change]]


class PeerList:
    """Everybody else who is there, and tombstones of those who were. Never holds oneself."""

    def __init__(self, me: Peer) -> None:
        self.me = me
        self._present: Dict[str, Peer] = {}  # by id
        self._by_key: Dict[str, Peer] = {}  # tombstones as well
        self._sorted: Optional[List[Peer]] = None
        self._names: Optional[Dict[str, List[Peer]]] = None

    def __len__(self) -> int:
        return len(self._present)

    def present(self) -> List[Peer]:
        """Those who are there, by name; a list that may be kept but not changed."""
        if self._sorted is None:
            self._sorted = sorted(self._present.values(), key=lambda peer: (peer.username.casefold(), peer.id))
        return self._sorted

    def tombstones(self) -> List[Peer]:
        """Those who are gone, the first to go first."""
        return [peer for peer in self._by_key.values() if peer.gone]

    def get(self, peer_id: str) -> Optional[Peer]:
        """The one present with this id."""
        return self._present.get(peer_id)

    def by_key(self, key: str) -> Optional[Peer]:
        """The one with this instance, present or gone."""
        return self._by_key.get(key)

    # -- what is said of peers -------------------------------------------------------------------------

    def hear(self, record: Dict[str, Any], now: float) -> Heard:
        """Take in what somebody says of a third: (verdict, the peer as we know it, changes)."""
        peer = Peer.from_wire(record)
        status, age = record.get("status", ALIVE), record.get("age", 0)
        known = self._by_key.get(peer.key)
        if known is None:
            return self._hear_unknown(peer, status, age, now)
        if peer.incarnation > known.incarnation + MAX_RAISE:
            return IMPLAUSIBLE, known, []
        if known.gone:
            return self._hear_of_gone(known, peer, status, now)
        if peer.incarnation < known.incarnation:
            return STALE, known, []
        if status != ALIVE:
            return ACCUSED, known, []
        if peer.incarnation == known.incarnation:
            return KNOWN, known, []
        if peer.address != known.address:
            return CONFLICT, known, []  # nobody is moved by hearsay: that would divert its messages
        known.vouched = now
        return self._update(known, peer)

    def confirm(self, record: Dict[str, Any], now: float) -> Heard:
        """Take in what a peer says of itself over its own connection, which is believed."""
        peer = Peer.from_wire(record)
        known = self._by_key.get(peer.key)
        changes = self._displace(peer, now)
        if known is None:
            changes += self._add(peer, now)
        elif known.gone:
            if peer.incarnation <= known.incarnation <= peer.incarnation + MAX_RAISE:
                return STALE, known, changes  # it must raise its incarnation, or others will not believe us
            changes += self._revive(known, peer, now)
            peer = known
        else:
            verdict, peer, more = self._update(known, peer)
            changes += more
            if verdict == KNOWN and known.incarnation > record.get("incarnation", 0):
                verdict = STALE
            peer.heard = now
            return verdict, peer, changes
        peer.heard = now
        return (NEW if changes else KNOWN), peer, changes

    def remove(self, peer: Peer, status: str, reason: str, now: float) -> List[Change]:
        """Bury a peer: it stays as a tombstone. Returns nothing when it was gone already."""
        if peer.gone or self._present.get(peer.id) is not peer:
            return []
        del self._present[peer.id]
        peer.status, peer.removed, peer.quiet = status, now, False
        self._by_key.pop(peer.key, None)
        self._by_key[peer.key] = peer  # at the end: tombstones are in the order of their going
        self._changed()
        self._bound_tombstones(now)
        return [Change(GONE, peer, reason)]

    # -- choosing --------------------------------------------------------------------------------------

    def digest(self) -> str:
        """A short text that two lists share if they hold the same peers, oneself included."""
        total = self.me.weight
        for peer in self._present.values():
            total ^= peer.weight
        return f"{total:016x}"

    def sample(self, rng: random.Random, count: int, among: Iterable[Peer]) -> List[Peer]:
        """Up to `count` peers at random."""
        pool = sorted(among, key=lambda peer: peer.id)  # an order that is the same in every run
        return rng.sample(pool, min(count, len(pool)))

    def neighbours(self, count: int) -> Tuple[List[Peer], List[Peer]]:
        """The `count` peers behind us on the ring, whom we probe, and those before us, who probe us.

        So each is probed by `count` others, whatever the number of peers: the cost for one is constant."""
        ring = sorted(self._present.values(), key=lambda peer: (peer.ring, peer.id))
        if len(ring) <= count:
            return ring, ring
        position = sum(1 for peer in ring if (peer.ring, peer.id) < (self.me.ring, self.me.id))
        turned = ring[position:] + ring[:position]
        return turned[:count], turned[-count:]

    # -- names -----------------------------------------------------------------------------------------

    def label(self, peer: Peer) -> str:
        """The shortest text that tells a peer from all others: its name, name@ip, or its id."""
        others = [other for other in self._namesakes(peer.username) if other.key != peer.key]
        if not others:
            return peer.username
        if all(other.ip != peer.ip for other in others):
            return f"{peer.username}@{peer.ip}"
        return peer.id

    def find(self, text: str) -> List[Peer]:
        """Those present whom a typed text names: exactly as written if anybody is, or in any case."""
        text = unicodedata.normalize("NFC", text.strip())
        text = text[1:] if text.startswith("@") else text
        name = text.partition("@")[0]
        matches = [peer for peer in self._namesakes(name)
                   if peer is not self.me and _names(peer, text.casefold())]
        exact = [peer for peer in matches if peer.username == name]
        return exact or matches

    def _namesakes(self, name: str) -> List[Peer]:
        if self._names is None:
            self._names = {}
            for peer in [self.me, *self.present()]:
                self._names.setdefault(peer.username.casefold(), []).append(peer)
        return self._names.get(name.casefold(), [])

    def me_changed(self) -> None:
        """Our own name or address is another now."""
        self._names = None

    # -- the rules -------------------------------------------------------------------------------------

    def _hear_unknown(self, peer: Peer, status: str, age: int, now: float) -> Heard:
        if age > TOMBSTONE_TIME:
            return IMPLAUSIBLE, peer, []  # nobody has heard of it for longer than we remember the dead
        if status in (DEAD, LEFT):
            if len(self._by_key) < 2 * MAX_PEERS and peer.instance:
                peer.status, peer.removed = status, now - age
                self._by_key[peer.key] = peer
            return KNOWN, peer, []
        holder = self._present.get(peer.id)
        if holder is not None:
            return (CONFLICT if peer.instance else KNOWN), holder, []
        if age:
            peer.unverified = now - age
        changes = self._add(peer, now)
        return (NEW if changes else IMPLAUSIBLE), peer, changes

    def _hear_of_gone(self, known: Peer, peer: Peer, status: str, now: float) -> Heard:
        if status in (DEAD, LEFT):
            known.incarnation = max(known.incarnation, peer.incarnation)
            return KNOWN, known, []
        if peer.incarnation <= known.incarnation:
            return STALE, known, []
        if peer.id in self._present:
            return CONFLICT, self._present[peer.id], []
        return NEW, known, self._revive(known, peer, now)

    def _add(self, peer: Peer, now: float) -> List[Change]:
        if len(self._present) >= MAX_PEERS or peer.key == self.me.key or peer.id == self.me.id:
            return []
        peer.added = now
        self._present[peer.id] = peer
        self._by_key[peer.key] = peer
        self._changed()
        return [Change(JOINED, peer)]

    def _revive(self, known: Peer, peer: Peer, now: float) -> List[Change]:
        known.place(peer.username, peer.ip, peer.port)
        known.status, known.incarnation = ALIVE, peer.incarnation
        known.unverified = None
        return self._add(known, now)

    def _update(self, known: Peer, peer: Peer) -> Heard:
        """A newer word on a peer that is there; it may have another name or address by now."""
        if peer.incarnation <= known.incarnation:
            return KNOWN, known, []
        if peer.id == known.id:
            known.incarnation = peer.incarnation
            return NEW, known, []
        if peer.id in self._present or peer.id == self.me.id:
            return CONFLICT, self._present.get(peer.id, known), []
        old = known.public
        del self._present[known.id]
        known.place(peer.username, peer.ip, peer.port)
        known.incarnation = peer.incarnation
        self._present[known.id] = known
        self._changed()
        return NEW, known, [Change(RENAMED, known, old=old)]

    def _displace(self, peer: Peer, now: float) -> List[Change]:
        """Another instance answers at this id: the one that we knew there is no more."""
        holder = self._present.get(peer.id)
        if holder is None or holder.key == peer.key:
            return []
        return self.remove(holder, DEAD, "restarted", now)

    def _bound_tombstones(self, now: float) -> None:
        """Forget the oldest: after their time, or when there are too many."""
        tombs = self.tombstones()
        excess = len(tombs) - MAX_PEERS
        for peer in tombs:
            if excess > 0 or now - peer.removed > TOMBSTONE_TIME:
                del self._by_key[peer.key]
                excess -= 1

    def _changed(self) -> None:
        self._sorted = None
        self._names = None


class News:
    """What is being passed on: a record each, for as many sendings as memberlist's retransmit rule asks.

    Sendings = NEWS_ROUNDS * digits of the number of peers: enough to reach nearly all; gossip finds the rest."""

    def __init__(self) -> None:
        self._left: Dict[str, List[Any]] = {}  # key -> [peer, status, sendings left]

    def __bool__(self) -> bool:
        return bool(self._left)

    def add(self, peer: Peer, status: str, size: int) -> None:
        """Pass this on, in place of what was being said of the same peer."""
        self._left.pop(peer.key, None)
        if len(self._left) < MAX_PEERS:
            self._left[peer.key] = [peer, status, NEWS_ROUNDS * len(str(size + 1))]

    def drop(self, peer: Peer, status: str) -> None:
        """It is no longer true."""
        if self._left.get(peer.key, (None, ""))[1] == status:
            del self._left[peer.key]

    def take(self, sendings: int, now: float) -> List[Dict[str, Any]]:
        """The records to send to `sendings` peers now, the least told first."""
        items = sorted(self._left.items(), key=lambda item: -item[1][2])[:NEWS_BATCH]
        for key, item in items:
            item[2] -= sendings
            if item[2] <= 0:
                del self._left[key]
        return [item[0].wire(now, item[1]) for _, item in items]


def hash64(text: str) -> int:
    """64 bits of a good hash, the same on every machine."""
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8", "replace"), digest_size=8).digest(), "big")


def _names(peer: Peer, text: str) -> bool:
    """Whether a casefolded text is the peer's name, name@ip or id."""
    name = peer.username.casefold()
    return text in (name, f"{name}@{peer.ip}", f"{name}@{peer.ip}:{peer.port}")


# ======================================================================================================
# Loop
#
# One thread, one loop, no call that blocks. A turn waits for the next deadline or the next readiness,
# handles what is ready, then the timers that are due, then sends what was queued: one send a connection
# and turn. Everything that touches time, randomness or the network goes through a Loop, so a test can
# hand out a simulated one. This section knows nothing of chat. An exception in a handler costs the
# connection that it belongs to, never the loop.
# ======================================================================================================

CONNECTING, OPEN, DRAINING, CLOSED = "connecting", "open", "draining", "closed"

_WOULD_BLOCK = {errno.EAGAIN, errno.EWOULDBLOCK, errno.EINTR}
_IN_PROGRESS = {errno.EINPROGRESS, errno.EWOULDBLOCK, getattr(errno, "WSAEWOULDBLOCK", errno.EINPROGRESS)}
_NO_ROOM = {errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM}
REFUSED = "refused"  # what `closed` is told when nobody listens at the address; other reasons are only words


class Timer:
    """A call that is to come. A deadline is never changed: cancel the timer and make another."""

    __slots__ = ("when", "_callback", "_args")

    def __init__(self, when: float, callback: Callable[..., None], args: Tuple[Any, ...]) -> None:
        self.when = when
        self._callback: Optional[Callable[..., None]] = callback
        self._args = args

    def cancel(self) -> None:
        """Make sure that it does not fire; harmless when it has."""
        self._callback = None
        self._args = ()

    @property
    def active(self) -> bool:
        """Whether it is still to come."""
        return self._callback is not None

    def fire(self) -> None:
        """Make the call, once."""
        callback, args = self._callback, self._args
        self.cancel()
        if callback is not None:
            callback(*args)


class Handler:
    """What a connection tells its owner. `closed` comes exactly once, and nothing comes after it."""

    def opened(self) -> None:
        """A connection that was dialled is open."""

    def received(self, messages: List[Message]) -> None:
        """Messages came, in order: as many as one read completed."""

    def spoilt(self, reason: str) -> None:
        """What came is not a message; nothing further will be read."""

    def closed(self, reason: str) -> None:
        """The connection is gone; REFUSED when nobody listened."""


class Connection:
    """A TCP connection that carries messages: a buffer each way, bounds and time limits.

    States: connecting -> open -> draining -> closed. `close` sends what is queued first, `abort` drops
    it; both may be called in any state, and from within the handler."""

    def __init__(self, loop: "Loop", remote: Address, state: str) -> None:
        self.loop = loop
        self.remote = remote
        self.local: Address = ("", 0)
        self.state = state
        self.handler = Handler()
        self._reader = MessageReader()
        self._line_started = 0.0
        self._line_timer: Optional[Timer] = None

    def send(self, data: bytes) -> None:
        """Queue bytes; they go out at the end of this turn. Does nothing once it is closing."""
        raise NotImplementedError

    def close(self, reason: str) -> None:
        """Send what is queued, end the stream, wait a little for the other side, close."""
        raise NotImplementedError

    def abort(self, reason: str) -> None:
        """Close at once; the handler hears of it in the next turn."""
        raise NotImplementedError

    def feed(self, data: bytes) -> None:
        """Take bytes from the network and hand on the messages in them."""
        if self.state != OPEN:
            return
        partial = self._reader.partial
        self._hand_over(self._reader.feed(data))
        if self._reader.partial and (not partial or self._reader.partial < partial + len(data)):
            self._line_started = self.loop.now()
        if self._reader.partial and self._line_timer is None:
            self._line_timer = self.loop.call_later(LINE_TIMEOUT, self._check_line)

    def end_of_stream(self) -> None:
        """The other side will send no more, which ends its last message; ours still goes out."""
        if self.state == OPEN:
            self._hand_over(self._reader.finish())
        self.close("closed by the other side")

    def _hand_over(self, messages: List[Message]) -> None:
        if messages:
            self.handler.received(messages)
        if self._reader.error is not None and self.state == OPEN:
            self.handler.spoilt(self._reader.error)
            self.close(self._reader.error)

    def _check_line(self) -> None:
        """A message that was begun must be ended: one byte a second is no way to hold a place."""
        self._line_timer = None
        if self.state != OPEN or not self._reader.partial:
            return
        left = self._line_started + LINE_TIMEOUT - self.loop.now()
        if left > 0:
            self._line_timer = self.loop.call_later(left, self._check_line)
            return
        self.handler.spoilt("half a message, and then nothing")
        self.close("half a message, and then nothing")

    def _forget_timers(self) -> None:
        if self._line_timer is not None:
            self._line_timer.cancel()


class SocketConnection(Connection):
    """A Connection over a real socket."""

    def __init__(self, loop: "Loop", sock: socket.socket, remote: Address, state: str) -> None:
        super().__init__(loop, remote, state)
        self._socket = sock
        self._output: Deque[bytes] = collections.deque()
        self._owed = 0  # bytes in _output
        self._interest = 0
        self._queued = False  # whether the loop will flush it at the end of this turn
        self._reason = ""
        self._deadline: Optional[Timer] = None  # of the dial, of stalled output, or of draining
        sock.setblocking(False)
        try:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        except OSError:
            pass  # the other side is gone already: reading will tell
        if state == OPEN:
            self._learn_local()
        self._set_interest(selectors.EVENT_WRITE if state == CONNECTING else selectors.EVENT_READ)

    def dial_within(self, timeout: float) -> None:
        """Give the dial a time limit, seconds."""
        self._deadline = self.loop.call_later(timeout, self.abort, f"no answer within {timeout:g} s")

    def send(self, data: bytes) -> None:
        if self.state not in (OPEN, CONNECTING):
            return
        self._output.append(data)
        self._owed += len(data)
        if self._owed > MAX_OUTPUT:
            self.abort("it does not read what it is sent")
        elif not self._queued and self.state == OPEN:
            self._queued = True
            self.loop.flush_later(self)

    def close(self, reason: str) -> None:
        if self.state == CONNECTING:
            self.abort(reason)
        if self.state != OPEN:
            return
        self.state = DRAINING
        self._reason = reason
        self._replace_deadline(DRAIN_TIMEOUT, reason)
        self._queued = True
        self.loop.flush_later(self)

    def abort(self, reason: str) -> None:
        if self.state == CLOSED:
            return
        self.state = CLOSED
        self._set_interest(0)
        self._socket.close()
        self._output.clear()
        self._owed = 0
        self._forget_timers()
        if self._deadline is not None:
            self._deadline.cancel()
        self.loop.call_later(0, self.handler.closed, self._reason or reason)

    def ready(self, events: int) -> None:
        """The selector says that something can be done."""
        if self.state == CONNECTING:
            self._connected()
            return
        if events & selectors.EVENT_WRITE:
            self.flush()
        if events & selectors.EVENT_READ and self.state != CLOSED:
            self._read()

    def flush(self) -> None:
        """Send what is queued, as much as the system takes; ask to be called again for the rest."""
        self._queued = False
        before = self._owed
        while self._output and self.state != CLOSED:
            if not self._send_some():
                break
        if self.state == CLOSED:
            return
        if not self._output:
            self._all_sent()
        elif self.state == OPEN and (self._owed < before or self._deadline is None):
            self._replace_deadline(STALL_TIMEOUT, "it does not read what it is sent")
        self._set_interest(selectors.EVENT_READ | (selectors.EVENT_WRITE if self._output else 0))

    def _send_some(self) -> bool:
        """One send of many queued pieces; False when the system takes no more for now."""
        pieces, size = [], 0
        while self._output and size < SEND_SIZE:
            piece = self._output.popleft()
            pieces.append(piece)
            size += len(piece)
        data = b"".join(pieces) if len(pieces) > 1 else pieces[0]
        try:
            sent = self._socket.send(data)
        except OSError as error:
            sent = 0
            if error.errno not in _WOULD_BLOCK:
                self.abort(_words(error))
                return False
        self._owed -= sent
        if sent < len(data):
            self._output.appendleft(data[sent:])
            return False
        return True

    def _all_sent(self) -> None:
        if self.state == DRAINING:
            try:
                self._socket.shutdown(socket.SHUT_WR)  # then read on: a close with input unread is a reset
            except OSError as error:
                self.abort(_words(error))
        elif self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None

    def _read(self) -> None:
        try:
            data = self._socket.recv(RECEIVE_SIZE)
        except OSError as error:
            if error.errno not in _WOULD_BLOCK:
                self.abort(_words(error))
            return
        if data:
            self.feed(data)
        elif self.state == DRAINING:
            self._ended_while_draining()
        else:
            self.end_of_stream()

    def _ended_while_draining(self) -> None:
        """The other side is done as well: all is said unless output is still waiting."""
        if self._output:
            self._set_interest(selectors.EVENT_WRITE)
        else:
            self.abort(self._reason)

    def _connected(self) -> None:
        code = self._socket.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        if code:
            self.abort(_words(OSError(code, os.strerror(code))))
            return
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None
        self.state = OPEN
        self._learn_local()
        self._set_interest(selectors.EVENT_READ)
        self.handler.opened()
        self.loop.flush_later(self)

    def _learn_local(self) -> None:
        try:
            self.local = self._socket.getsockname()[:2]
        except OSError:
            pass

    def _set_interest(self, interest: int) -> None:
        """The one place that tells the selector what this connection waits for."""
        if interest != self._interest:
            self.loop.set_interest(self._socket, self._interest, interest, self.ready, self)
            self._interest = interest

    def _replace_deadline(self, timeout: float, reason: str) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
        self._deadline = self.loop.call_later(timeout, self.abort, reason)


class Listener:
    """Accepts connections. `accept(connection)` returns the handler, or None to turn it away."""

    def __init__(self, loop: "Loop", host: str, port: int, accept: Callable[[Connection], Optional[Handler]]) -> None:
        """Raises OSError when the address can't be had."""
        self._loop = loop
        self._accept = accept
        self._socket = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
        try:
            if os.name == "posix":  # elsewhere the option lets two programs share a port
                self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            self._socket.bind((host, port))
            self._socket.listen(4096)  # the system caps it; a small one makes a burst wait for SYN retries
            self._socket.setblocking(False)
        except (OSError, OverflowError):
            self._socket.close()
            raise
        self.address: Address = self._socket.getsockname()[:2]
        self._watching = False
        self._watch()

    def close(self) -> None:
        """Stop listening."""
        self._unwatch()
        self._socket.close()

    def _ready(self, events: int) -> None:
        for _ in range(ACCEPT_BATCH):
            try:
                sock, remote = self._socket.accept()
            except OSError as error:
                if error.errno in _NO_ROOM:
                    self._pause(error)
                if error.errno not in (errno.ECONNABORTED, errno.EPROTO):
                    return
                continue
            connection = SocketConnection(self._loop, sock, remote[:2], OPEN)
            handler = self._accept(connection)
            if handler is None:
                connection.abort("turned away")
            else:
                connection.handler = handler

    def _pause(self, error: OSError) -> None:
        """No descriptors: those who are here go on, newcomers wait in the backlog; spinning helps nobody."""
        limited_log("descriptors", logging.WARNING, "[P2P] accepting pauses: %s", _words(error))
        self._unwatch()
        self._loop.call_later(ACCEPT_PAUSE, self._watch)

    def _watch(self) -> None:
        if not self._watching and self._socket.fileno() >= 0:
            self._loop.set_interest(self._socket, 0, selectors.EVENT_READ, self._ready, None)
            self._watching = True

    def _unwatch(self) -> None:
        if self._watching:
            self._loop.set_interest(self._socket, selectors.EVENT_READ, 0, self._ready, None)
            self._watching = False


class Strangers:
    """Connections that have not yet said who they are: bounded for each address, the oldest goes first."""

    def __init__(self, most: int = MAX_STRANGERS) -> None:
        self._most = most
        self._by_ip: Dict[str, Dict[Connection, None]] = {}

    def add(self, connection: Connection) -> None:
        """One more; too many from its address cost the oldest of them its connection."""
        ip = connection.remote[0]
        waiting = self._by_ip.setdefault(ip, {})
        waiting[connection] = None
        if len(waiting) > self._most:
            oldest = next(iter(waiting))
            limited_log("strangers", logging.WARNING, "[P2P] too many silent connections from %s", ip)
            self.discard(oldest)
            oldest.abort("too many silent connections")

    def discard(self, connection: Connection) -> None:
        """It has said who it is, or is gone."""
        ip = connection.remote[0]
        waiting = self._by_ip.get(ip)
        if waiting is not None:
            waiting.pop(connection, None)
            if not waiting:
                del self._by_ip[ip]


class Lan:
    """Beacons: datagrams to everybody on the local network, and straight answers to them.

    One socket on the port that all share hears what is sent to the group or broadcast. One socket for
    each local address sends, so that a datagram leaves by every interface, and hears straight answers."""

    def __init__(self, loop: "Loop", host: str, port: int, heard: Callable[[bytes, Address], Optional[bytes]]) -> None:
        """`heard(datagram, sender)` returns the answer, if any. Raises OSError when there is no way."""
        self._loop = loop
        self._host = host
        self._port = port
        self._heard = heard
        self._senders: Dict[str, socket.socket] = {}
        # Bound to the group, a socket hears nothing else: nothing that came from outside the loopback.
        self._shared = self._open(LAN_GROUP if is_loopback(host) and os.name == "posix" else "", port)
        self.refresh()

    def refresh(self) -> None:
        """Follow the machine's addresses: cables are plugged, leases change."""
        current = set(self._addresses())
        for ip in sorted(set(self._senders) - current):
            self._drop(ip)
        for ip in sorted(current - set(self._senders)):
            self._add(ip)

    def shout(self, data: bytes) -> None:
        """Send a datagram to everybody, out of every local address."""
        for ip, sock in sorted(self._senders.items()):
            targets = [LAN_GROUP] if is_loopback(ip) else [LAN_GROUP, "255.255.255.255"]
            for target in targets:
                try:
                    sock.sendto(data, (target, self._port))
                except OSError as error:
                    log.debug("[P2P] no beacon from %s to %s: %s", ip, target, _words(error))

    def close(self) -> None:
        """Stop sending and hearing."""
        for ip in list(self._senders):
            self._drop(ip)
        self._close(self._shared)

    def _addresses(self) -> List[str]:
        if self._host not in ("", "0.0.0.0"):
            return [self._host]
        found = self._loop.local_addresses()
        return [ip for ip in found if not is_loopback(ip)] or found

    def _add(self, ip: str) -> None:
        try:
            sock = self._open(ip, 0)
        except OSError as error:
            log.debug("[P2P] no beacons from %s: %s", ip, _words(error))
            return
        self._senders[ip] = sock
        member = socket.inet_aton(LAN_GROUP) + socket.inet_aton(ip)
        for option, value in ((socket.IP_MULTICAST_IF, socket.inet_aton(ip)), (socket.IP_MULTICAST_TTL, 1)):
            sock.setsockopt(socket.IPPROTO_IP, option, value)
        try:
            self._shared.setsockopt(socket.IPPROTO_IP, socket.IP_ADD_MEMBERSHIP, member)
        except OSError as error:
            log.debug("[P2P] not in the group on %s: %s", ip, _words(error))

    def _drop(self, ip: str) -> None:
        self._close(self._senders.pop(ip))
        member = socket.inet_aton(LAN_GROUP) + socket.inet_aton(ip)
        try:
            self._shared.setsockopt(socket.IPPROTO_IP, socket.IP_DROP_MEMBERSHIP, member)
        except OSError:
            pass  # the interface went away and took the membership along

    def _open(self, ip: str, port: int) -> socket.socket:
        sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        try:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_BROADCAST, 1)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if sys.platform == "linux":
                sock.setsockopt(socket.IPPROTO_IP, 49, 0)  # IP_MULTICAST_ALL: only what this socket joined
            elif hasattr(socket, "SO_REUSEPORT"):
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
            sock.bind((ip, port))
            sock.setblocking(False)
        except OSError:
            sock.close()
            raise
        self._loop.set_interest(sock, 0, selectors.EVENT_READ, functools.partial(self._ready, sock), None)
        return sock

    def _close(self, sock: socket.socket) -> None:
        self._loop.set_interest(sock, selectors.EVENT_READ, 0, None, None)
        sock.close()

    def _ready(self, sock: socket.socket, events: int) -> None:
        for _ in range(64):
            try:
                data, sender = sock.recvfrom(2048)
            except OSError:
                return
            answer = self._heard(data, sender[:2])
            if answer is not None:
                self._answer(sock, answer, sender[:2])

    def _answer(self, sock: socket.socket, data: bytes, to: Address) -> None:
        """Straight back: from the socket that heard it, or from the address nearest to the asker."""
        if sock is self._shared:
            asker = int(ipaddress.IPv4Address(to[0]))
            nearest = min(self._senders, key=lambda ip: int(ipaddress.IPv4Address(ip)) ^ asker, default=None)
            if nearest is None:
                return
            sock = self._senders[nearest]
        try:
            sock.sendto(data, to)
        except OSError as error:
            log.debug("[P2P] no answer to %s: %s", to[0], _words(error))


Ready = Callable[[int], None]


class Loop:
    """The real loop: the system's clock, randomness and sockets."""

    def __init__(self, rng: Optional[random.Random] = None) -> None:
        self.random = rng or random.Random()
        self._selector = selectors.DefaultSelector()
        self._timers: List[Tuple[float, int, Timer]] = []
        self._count = itertools.count()
        self._unflushed: List[SocketConnection] = []
        self._stopped = False
        self._signals: Dict[int, Callable[[], None]] = {}
        self._wake: Optional[Tuple[socket.socket, socket.socket]] = None

    def now(self) -> float:
        """Seconds on a clock that only goes forward."""
        return time.monotonic()

    def wall(self) -> float:
        """Unix time, seconds: for people, never for decisions."""
        return time.time()

    def call_later(self, delay: float, callback: Callable[..., None], *args: Any) -> Timer:
        """Call back after `delay` seconds; with 0 in the next turn."""
        timer = Timer(self.now() + delay, callback, args)
        heapq.heappush(self._timers, (timer.when, next(self._count), timer))
        return timer

    def listen(self, host: str, port: int, accept: Callable[[Connection], Optional[Handler]]) -> Listener:
        """Listen on an address. Raises OSError."""
        return Listener(self, host, port, accept)

    def connect(self, address: Address, handler: Handler, timeout: float) -> Connection:
        """Dial an IPv4 address; `handler` hears `opened`, or `closed` with the reason within `timeout` s."""
        try:
            sock = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
        except OSError as error:
            return self._stillborn(address, handler, error)
        connection = SocketConnection(self, sock, address, CONNECTING)
        connection.handler = handler
        try:
            code = sock.connect_ex(address)
        except (OSError, OverflowError) as error:  # not an address at all
            connection.abort(_words(error))
            return connection
        if code and code not in _IN_PROGRESS:
            connection.abort(_words(OSError(code, os.strerror(code))))
        else:
            connection.dial_within(timeout)
        return connection

    def lan(self, host: str, port: int, heard: Callable[[bytes, Address], Optional[bytes]]) -> Lan:
        """Open the beacon sockets. Raises OSError."""
        return Lan(self, host, port, heard)

    def local_addresses(self) -> List[str]:
        """The machine's own IPv4 addresses, the one towards the outside first, loopback last."""
        return find_local_addresses()

    def watch(self, fileobj: Any, callback: Callable[[], None]) -> None:
        """Call back whenever a file can be read; an exception there leaves `run`: it is the program's own.

        Raises PermissionError or ValueError for a file that can't be waited for."""
        self._selector.register(fileobj, selectors.EVENT_READ, (lambda events: callback(), self))

    def unwatch(self, fileobj: Any) -> None:
        """Stop watching."""
        self._selector.unregister(fileobj)

    def on_signal(self, signum: int, callback: Callable[[], None]) -> None:
        """Call back, from the loop, when a signal comes. Only from the main thread."""
        if self._wake is None:
            self._wake = socket.socketpair()
            for end in self._wake:
                end.setblocking(False)
            signal.set_wakeup_fd(self._wake[1].fileno(), warn_on_full_buffer=False)
            self.watch(self._wake[0], self._signalled)
        self._signals[signum] = callback
        signal.signal(signum, lambda *_: None)

    def run(self) -> None:
        """Turn until stopped."""
        self._stopped = False
        while not self._stopped:
            self.turn()

    def stop(self) -> None:
        """Let `run` return after this turn."""
        self._stopped = True

    def close(self) -> None:
        """Give back the selector and the signals' descriptors."""
        if self._wake is not None:
            signal.set_wakeup_fd(-1)
            for end in self._wake:
                end.close()
        self._selector.close()

    def turn(self, longest: Optional[float] = None) -> None:
        """Wait for something, at most `longest` seconds, and handle all that is ready and due."""
        for key, events in self._selector.select(self._patience(longest)):
            callback, owner = key.data
            if owner is self:
                callback(events)
            else:
                self._call_out(callback, owner, events)
        now = self.now()
        due: List[Timer] = []
        while self._timers and self._timers[0][0] <= now:
            due.append(heapq.heappop(self._timers)[2])
        for timer in due:  # what these schedule waits for the next turn
            self._call_out(timer.fire, None)
        self._flush()

    def flush_later(self, connection: SocketConnection) -> None:
        """Send what a connection has queued at the end of this turn."""
        self._unflushed.append(connection)

    def set_interest(self, sock: socket.socket, old: int, new: int, ready: Optional[Ready], owner: Optional[Connection]) -> None:
        """Change what the selector waits for on a socket; 0 is nothing."""
        if new and old:
            self._selector.modify(sock, new, (ready, owner))
        elif new:
            self._selector.register(sock, new, (ready, owner))
        elif old:
            self._selector.unregister(sock)

    def failed(self, connection: Optional[Connection]) -> None:
        """An exception that nobody caught: our bug. It costs the connection, not the loop."""
        log.exception("[P2P] an error in the program; %s", "the connection is closed" if connection else "it goes on")
        if connection is not None:
            connection.abort("an error in the program")

    def _call_out(self, callback: Callable[..., None], connection: Optional[Connection], *args: Any) -> None:
        """The one place from which handlers are called."""
        try:
            callback(*args)
        except Exception:
            self.failed(connection)

    def _patience(self, longest: Optional[float]) -> Optional[float]:
        while self._timers and not self._timers[0][2].active:
            heapq.heappop(self._timers)
        if self._unflushed:
            return 0.0
        if not self._timers:
            return longest
        wait = max(0.0, self._timers[0][0] - self.now())
        return wait if longest is None else min(wait, longest)

    def _flush(self) -> None:
        queued, self._unflushed = self._unflushed, []
        for connection in queued:
            if connection.state != CLOSED:
                self._call_out(connection.flush, connection)

    def _signalled(self) -> None:
        assert self._wake is not None
        try:
            signums = self._wake[0].recv(64)
        except OSError:
            return
        for signum in sorted(set(signums)):
            callback = self._signals.get(signum)
            if callback is not None:
                callback()

    def _stillborn(self, address: Address, handler: Handler, error: OSError) -> Connection:
        """A connection for which there was no descriptor: closed from the start."""
        connection = Connection(self, address, CLOSED)
        self.call_later(0, handler.closed, _words(error))
        return connection


class Ticker:
    """Calls back every `interval` seconds, for the first time at a random offset into the first interval."""

    def __init__(self, loop: Loop, interval: float, callback: Callable[[], None]) -> None:
        self._loop = loop
        self._interval = interval
        self._callback = callback
        self._timer = loop.call_later(interval * loop.random.random(), self._tick)

    def cancel(self) -> None:
        """Stop it."""
        self._timer.cancel()

    def _tick(self) -> None:
        self._timer = self._loop.call_later(self._interval, self._tick)  # first: an error must not end it
        self._callback()


def find_local_addresses() -> List[str]:
    """This machine's IPv4 addresses: the one a datagram to the outside would leave by, then each interface's."""
    found: List[str] = []
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))  # sends nothing: it only asks for the route
            found.append(probe.getsockname()[0])
        except OSError:
            pass  # no default route
        found += _interface_addresses(probe)
    unique = list(dict.fromkeys(ip for ip in found if is_peer_ip(ip)))
    return [ip for ip in unique if not is_loopback(ip)] + [ip for ip in unique if is_loopback(ip)] or ["127.0.0.1"]


def _interface_addresses(sock: socket.socket) -> List[str]:
    try:
        import fcntl
    except ImportError:  # Windows: there the host name resolves to all of them
        try:
            return socket.gethostbyname_ex(socket.gethostname())[2]
        except OSError:
            return []
    request = 0x8915 if sys.platform == "linux" else 0xC0206921  # SIOCGIFADDR
    found = []
    for _, name in socket.if_nameindex():
        try:
            answer = fcntl.ioctl(sock.fileno(), request, name.encode()[:15].ljust(40, b"\0"))
            found.append(socket.inet_ntoa(answer[20:24]))
        except OSError:
            pass  # an interface without an IPv4 address
    return found


def raise_descriptor_limit() -> int:
    """Ask for as many descriptors as the system allows without root; return how many there are."""
    try:
        import resource
    except ImportError:
        return 512
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = 65536 if hard == resource.RLIM_INFINITY else min(hard, 65536)
    if soft != resource.RLIM_INFINITY and soft < wanted and soft >= 256:
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
            return wanted
        except (OSError, ValueError):
            pass
    return soft


class _LogLimiter:
    """Counts lines of one kind, so that a hostile peer can't fill a disk with them."""

    def __init__(self) -> None:
        self._counts: Dict[str, Tuple[float, int]] = {}

    def allows(self, kind: str, now: float) -> bool:
        """Whether another line of this kind may be written; the last one says that the rest is left out."""
        start, count = self._counts.get(kind, (now, 0))
        if now - start >= 60:
            start, count = now, 0
        self._counts[kind] = (start, count + 1)
        if count == LOG_REPEATS:
            log.warning("[P2P] more of this kind (%s) is left out for a minute", kind)
        return count < LOG_REPEATS


_log_limiter = _LogLimiter()


def limited_log(kind: str, level: int, text: str, *args: Any) -> None:
    """Log what somebody else can cause, at most LOG_REPEATS lines of one kind a minute. `kind` is ours."""
    if log.isEnabledFor(level) and _log_limiter.allows(kind, time.monotonic()):
        log.log(level, text, *args)


def _words(error: Exception) -> str:
    """An error of the system in words; REFUSED for the one that proves that nobody is there."""
    code = getattr(error, "errno", None)
    if code in (errno.ECONNREFUSED, getattr(errno, "WSAECONNREFUSED", errno.ECONNREFUSED)):
        return REFUSED
    return (getattr(error, "strerror", None) or str(error) or type(error).__name__).lower()


# ======================================================================================================
# Discovery server
#
# Introduces peers to one another, and does nothing else: no chat passes through it. Each connection has
# a Session; one that has registered stands in `_peers` under its id. Joins and leaves are gathered for
# NEWS_GATHER seconds, encoded once, and sent to all: a thousand peers that come at once cost each of them
# one list and a few messages.
# ======================================================================================================


class Session(Handler):
    """One connection to the server: of a registered peer, or of somebody who asks."""

    def __init__(self, server: "DiscoveryServer", connection: Connection) -> None:
        self.server = server
        self.connection = connection
        self.peer_id: Optional[str] = None
        self.last_heard = server.loop.now()

    def received(self, messages: List[Message]) -> None:
        self.last_heard = self.server.loop.now()
        for message in messages:
            handle = self.server.handlers.get(message["type"])
            if handle is not None and self.connection.state == OPEN:
                handle(self, message)

    def spoilt(self, reason: str) -> None:
        limited_log("bad input", logging.WARNING, "[Server] bad input from %s:%d: %s", *self.connection.remote, reason)
        self.error(reason)

    def closed(self, reason: str) -> None:
        self.server.session_closed(self, reason)

    def send(self, msg_type: str, content: Any) -> None:
        """Send one message to this session."""
        to = self.peer_id or ""
        self.connection.send(create_message(msg_type, self.server.id, content, to))

    def error(self, reason: str) -> None:
        """Say what was wrong; to the other side, in words."""
        self.send(MSG_ERROR, {"reason": clean(reason)[:500], "role": "server"})

    def refuse(self, reason: str) -> None:
        """Say what was wrong and close."""
        limited_log("refused", logging.WARNING, "[Server] refused %s:%d: %s", *self.connection.remote, reason)
        self.error(reason)
        self.connection.close(reason)


class DiscoveryServer:
    """The server. Use: DiscoveryServer(loop, settings).start(), then run the loop."""

    def __init__(self, loop: Loop, settings: Optional[ServerSettings] = None) -> None:
        self.loop = loop
        self.settings = settings or ServerSettings()
        self.id = ""
        self.handlers: Dict[str, Callable[[Session, Message], None]] = {
            MSG_REGISTER: self._register,
            MSG_HEARTBEAT: self._heartbeat,
            MSG_UNREGISTER: self._unregister,
            MSG_SYNC_PEERS_REQUEST: self._sync_request,
            MSG_HELLO: self._hello,
            MSG_CHAT: self._chat,
        }
        self._listener: Optional[Listener] = None
        self._lan: Optional[Lan] = None
        self._monitor: Optional[Ticker] = None
        self._sessions: Dict[Session, None] = {}
        self._strangers = Strangers()  # not registered
        self._peers: Dict[str, Session] = {}
        self._encoded: Dict[str, str] = {}  # each registered peer's record as JSON
        self._joined: Dict[str, None] = {}  # ids, since the last broadcast
        self._left: Dict[str, Dict[str, Any]] = {}
        self._gathering: Optional[Timer] = None

    # -- starting and stopping -------------------------------------------------------------------------

    @property
    def address(self) -> Address:
        """Where it listens."""
        assert self._listener is not None, "not started"
        return self._listener.address

    def start(self) -> None:
        """Listen. Raises OSError when the port can't be had."""
        log.info("[Server] starting")
        self._listener = self.loop.listen(self.settings.host, self.settings.port, self._accept)
        self.id = f"server@{self.address[0]}:{self.address[1]}"
        self._monitor = Ticker(self.loop, self.settings.check_interval, self._drop_silent)
        if self.settings.lan:
            try:
                self._lan = self.loop.lan(self.settings.host, DEFAULT_PORT, self._beacon)
            except OSError as error:
                log.warning("[Server] can't be found on the local network: %s", error)
        log.info("[Server] listening on %s:%d", *self.address)

    def stop(self) -> None:
        """Say goodbye to everybody and close; the last words go out while the loop still turns."""
        log.info("[Server] goodbye")
        for closable in (self._listener, self._lan, self._monitor):
            if isinstance(closable, Ticker):
                closable.cancel()
            elif closable is not None:
                closable.close()
        for session in list(self._sessions):
            session.connection.close("the server stops")

    @property
    def peer_ids(self) -> List[str]:
        """Who is registered."""
        return sorted(self._peers)

    # -- connections -----------------------------------------------------------------------------------

    def _accept(self, connection: Connection) -> Optional[Handler]:
        session = Session(self, connection)
        self._sessions[session] = None
        self._strangers.add(connection)
        return session

    def session_closed(self, session: Session, reason: str) -> None:
        """A connection is gone, and with it the peer that was registered over it."""
        self._sessions.pop(session, None)
        self._strangers.discard(session.connection)
        if session.peer_id is not None and self._peers.get(session.peer_id) is session:
            self._drop(session, f"connection lost: {reason}")

    def _drop_silent(self) -> None:
        limit = self.loop.now() - self.settings.heartbeat_timeout
        silent = [each for each in self._sessions if each.last_heard < limit]
        for session in [each for each in silent if each.peer_id is not None]:
            log.info("[Monitor] timeout: %s", session.peer_id)
            self._drop(session, "timed out")
        for session in silent:
            session.refuse(f"nothing heard for {self.settings.heartbeat_timeout:g} s")

    # -- what peers say --------------------------------------------------------------------------------

    def _register(self, session: Session, message: Message) -> None:
        content = message["content"]
        ip = self._reachable_ip(session.connection, content)
        peer_id = f"{content['username']}@{ip}:{content['port']}"
        if len(self._peers) >= MAX_PEERS and peer_id not in self._peers:
            session.refuse(f"the server is full: {MAX_PEERS} peers")
            return
        former = self._peers.get(peer_id)
        if former is not None and former is not session:
            self._drop(former, "registered anew")
            former.refuse("somebody registered under the same id")
        if session.peer_id not in (None, peer_id):
            self._drop(session, "renamed")
        self._strangers.discard(session.connection)
        session.peer_id = peer_id
        self._peers[peer_id] = session
        record = {"id": peer_id, "ip": ip, "port": content["port"], "username": content["username"]}
        record.update((key, content[key]) for key in ("instance", "incarnation") if key in content)
        self._encoded[peer_id] = json.dumps(record, separators=(",", ":"))
        self._joined[peer_id] = None
        log.info("[Server] registered %s", peer_id)
        self._gather()

    def _reachable_ip(self, connection: Connection, content: Dict[str, Any]) -> str:
        """The address that the server sees; for a peer on the server's own machine one that others can reach."""
        seen = connection.remote[0]
        if not is_loopback(seen):
            return seen
        own, claimed = self.loop.local_addresses(), content.get("ip")
        if claimed in own:
            return str(claimed)
        return seen if is_loopback(self.settings.host) else own[0]

    def _heartbeat(self, session: Session, message: Message) -> None:
        if session.peer_id is None:
            session.refuse("register first")
        elif self._is_own(session, message):
            session.send(MSG_HEARTBEAT, None)

    def _unregister(self, session: Session, message: Message) -> None:
        if session.peer_id is None:
            session.refuse("you are not registered on this connection")
        elif self._is_own(session, message):
            self._drop(session, "left")
            session.connection.close("left")

    def _is_own(self, session: Session, message: Message) -> bool:
        """Whether a message speaks for the peer of its own connection; nobody speaks for another."""
        if message["sender_id"] == session.peer_id:
            return True
        session.refuse(f"sender_id is not yours, which is {session.peer_id}")
        return False

    def _sync_request(self, session: Session, message: Message) -> None:
        for peers in in_lists(self._encoded.values()):
            content = f'{{"peer_list":[{peers}]}}'
            session.connection.send(create_raw(MSG_SYNC_PEERS_RESPONSE, self.id, message["sender_id"], content))

    def _hello(self, session: Session, message: Message) -> None:
        session.error("this is a discovery server: say MSG_REGISTER")

    def _chat(self, session: Session, message: Message) -> None:
        session.error("this is a discovery server: chat goes from peer to peer")

    def _beacon(self, data: bytes, sender: Address) -> Optional[bytes]:
        """Somebody looks for a server: here is one. Never longer than the question."""
        message = parse_message(data)
        if message is None or message["type"] != MSG_BEACON or not message["content"].get("server_wanted"):
            return None
        return make_beacon(self.id, {"role": "server", "port": self.address[1]}, len(data))

    # -- news ------------------------------------------------------------------------------------------

    def _drop(self, session: Session, reason: str) -> None:
        peer_id = session.peer_id
        assert peer_id is not None
        session.peer_id = None
        del self._peers[peer_id]
        record = json.loads(self._encoded.pop(peer_id))
        self._joined.pop(peer_id, None)
        gone = {"id": peer_id, "reason": clean(reason)}
        gone.update((key, record[key]) for key in ("instance", "incarnation") if key in record)
        self._left[peer_id] = gone
        log.info("[Server] dropped %s: %s", peer_id, reason)
        self._gather()

    def _gather(self) -> None:
        if self._gathering is None:
            self._gathering = self.loop.call_later(NEWS_GATHER, self._broadcast)

    def _broadcast(self) -> None:
        """Tell the newcomers who is there, and everybody else who came and went."""
        self._gathering = None
        newcomers = [self._peers[peer_id] for peer_id in self._joined]
        others = [session for peer_id, session in self._peers.items() if peer_id not in self._joined]
        gone = json.dumps(list(self._left.values()), separators=(",", ":"))
        for joined in in_lists(self._encoded[peer_id] for peer_id in self._joined):
            update = create_raw(MSG_PEER_LIST_UPDATE, self.id, EVERYONE, f'{{"joined":[{joined}],"left":{gone}}}')
            gone = "[]"
            for session in others:
                session.connection.send(update)
        self._introduce(newcomers)
        log.info("[Broadcast] %d joined, %d left: told %d and answered %d",
                 len(self._joined), len(self._left), len(others), len(newcomers))
        self._joined.clear()
        self._left.clear()

    def _introduce(self, newcomers: List[Session]) -> None:
        """Answer those who have registered. The list is encoded once; only the first bytes differ."""
        if not newcomers:
            return
        first, *rest = in_lists(self._encoded.values())
        tail = f'"peer_list":[{first}]}}}}\n'.encode("ascii")
        more = [create_raw(MSG_PEER_LIST_UPDATE, self.id, EVERYONE, f'{{"joined":[{peers}],"left":[]}}') for peers in rest]
        for session in newcomers:
            peer_id = json.dumps(session.peer_id)
            head = f'{{"type":"{MSG_REGISTER_ACK}","sender_id":{json.dumps(self.id)},"to":{peer_id},"content":{{"peer_id":{peer_id},'
            for piece in (head.encode("ascii"), tail, *more):
                session.connection.send(piece)


def make_beacon(sender_id: str, content: Dict[str, Any], size: int) -> bytes:
    """A beacon padded to `size` bytes, or b"" when it does not fit: an answer is never longer than its question."""
    bare = create_message(MSG_BEACON, sender_id, content, pad="")
    return create_message(MSG_BEACON, sender_id, content, pad=" " * (size - len(bare))) if len(bare) <= size else b""


