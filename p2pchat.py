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


